import type { Within } from "../../../../controller/kube/gangs/rooms.ts";

/** Every way to seat the gang, without any cleverness. */
export function canSeat(
  devices: readonly number[],
  nodes: readonly { name: string; free: number; domain: string; zone: string | undefined }[],
  within: Within,
): boolean {
  const search = (worker: number, used: readonly (typeof nodes)[number][]): boolean => {
    if (worker === devices.length) {
      const isLinked = new Set(used.map(({ domain }) => domain)).size === 1;
      if (within === "nvlink" || isLinked) return isLinked;
      if (within === "zone") return used.every(({ zone }) => zone !== undefined && zone === used[0]?.zone);
      return true;
    }
    return nodes.some(
      (node) => !used.includes(node) && node.free >= (devices[worker] ?? 0) && search(worker + 1, [...used, node]),
    );
  };
  return search(0, []);
}

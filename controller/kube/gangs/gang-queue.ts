// Who asks for places now, and in which order; and how it is said what is waited for.

import { type GpuNode, whyNot } from "../inventory/inventory.ts";
import { type GangPod, gangKey } from "./gang-pods.ts";
import type { Finding } from "./gang-state.ts";
import type { GangWish, GangWorld, WaitCode } from "./reservations.ts";
import type { Room } from "./rooms.ts";

export type Candidate =
  | { kind: "ready"; wish: GangWish }
  /** It cannot be placed whatever is free. */
  | { kind: "blocked"; wish: GangWish; code: WaitCode; text: string };

/** Nodes and taints named in one message. */
const NAMED_MAX = 4;

/** Wishes without a reservation: priority, then age, then name. */
export function candidatesOf(world: GangWorld, findings: readonly Finding[]): Candidate[] {
  const byKey = new Map(findings.map((finding) => [finding.key, finding]));
  const byGroup = Map.groupBy(findings, ({ pods }) => pods[0]?.group ?? "");
  const asking = world.wishes.filter((wish) => (byKey.get(gangKey(wish))?.verdict.kind ?? "open") === "open");
  const ordered = asking.toSorted(
    (one, other) =>
      other.priority - one.priority || one.sinceMs - other.sinceMs || (gangKey(one) < gangKey(other) ? -1 : 1),
  );
  return ordered.map((wish): Candidate => {
    const key = gangKey(wish);
    const block = (code: WaitCode, text: string): Candidate => ({ kind: "blocked", wish, code, text });
    const older = (byGroup.get(wish.group) ?? []).filter((finding) => finding.key !== key);
    if (older.length > 0) {
      const count = older.reduce((sum, { pods }) => sum + pods.length, 0);
      return block("older-incarnation", `${count} pods of another incarnation have not gone yet`);
    }
    const pods = byKey.get(key)?.pods ?? [];
    const missing = wish.devices.flatMap((devices, worker) => (isThere(pods, worker, devices) ? [] : [worker]));
    if (missing.length > 0 || pods.length !== wish.devices.length) {
      return block("pods-missing", `${pods.length} of ${wish.devices.length} pods are there as they shall be`);
    }
    const gates = new Set(pods.flatMap(({ foreignGates }) => foreignGates));
    if (gates.size > 0) return block("foreign-gate", `waiting for ${[...gates].toSorted().join(", ")} to open`);
    return { kind: "ready", wish };
  });
}

function isThere(pods: readonly GangPod[], worker: number, devices: number): boolean {
  return (
    pods.filter((pod) => pod.worker === worker).length === 1 &&
    pods.some((pod) => pod.worker === worker && pod.devices === devices)
  );
}

/** `2 nodes with 8 free GPUs each are needed in one zone: there is too little free (n2: 6 free; n3: it is cordoned)`. */
export function waitingText(
  wish: GangWish,
  why: string,
  seen: { all: readonly GpuNode[]; rooms: readonly Room[] },
): string {
  const sizes = [...new Set(wish.devices)].toSorted((one, other) => other - one).join(" or ");
  const count =
    wish.devices.length === 1
      ? `1 node with ${sizes} free GPUs is`
      : `${wish.devices.length} nodes with ${sizes} free GPUs each are`;
  const place = { any: "", zone: " in one zone", nvlink: " within one NVLink domain" }[wish.within];
  const best = seen.rooms
    .filter(({ free }) => free > 0)
    .toSorted((one, other) => other.free - one.free || (one.name < other.name ? -1 : 1))
    .slice(0, NAMED_MAX)
    .map(({ name, free }) => `${name}: ${free} free`);
  const used = new Set(seen.rooms.map(({ name }) => name));
  const shut: string[] = [];
  for (const node of seen.all) {
    if (shut.length === NAMED_MAX) break;
    if (used.has(node.name)) continue;
    const failed = `avoided, it failed this group ${wish.failedOn[node.name] ?? 0} times`;
    shut.push(`${node.name}: ${whyNot(node, wish.selection) ?? failed}`);
  }
  const named = [...best, ...shut];
  return `${count} needed${place}: ${why} (${named.length > 0 ? named.join("; ") : "no node has a free GPU"})`;
}

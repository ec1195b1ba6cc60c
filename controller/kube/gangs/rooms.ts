// Where the pods of one gang go: a node of its own for each, close together, in rooms that they leave least of. Pure; the
// first of equal answers by name.

export type Room = { name: string; free: number; domain: string; zone: string | undefined };

/** What all nodes of a gang must share; they share the closest they can in any case. */
export type Within = "any" | "zone" | "nvlink";

/** Names by index of `demands`, or undefined where there is no room. */
export function findRooms(demands: readonly number[], rooms: readonly Room[], within: Within): string[] | undefined {
  const least = Math.min(...demands);
  const [only] = demands;
  if (demands.length === 1 && only !== undefined) return smallest(only, rooms);
  const usable = rooms.filter(({ free }) => free >= least);
  if (usable.length < demands.length) return undefined;
  const levels: ((room: Room) => string | undefined)[] = [({ domain }) => domain];
  if (within !== "nvlink") levels.push(({ zone }) => zone);
  if (within === "any") levels.push(() => "");
  for (const keyOf of levels) {
    const found = tightest(demands, usable, keyOf);
    if (found !== undefined) return found;
  }
  return undefined;
}

function smallest(demand: number, rooms: readonly Room[]): string[] | undefined {
  let best: Room | undefined;
  for (const room of rooms) {
    if (room.free < demand) continue;
    if (best === undefined || room.free < best.free || (room.free === best.free && room.name < best.name)) best = room;
  }
  return best && [best.name];
}

/** Among the sets of rooms that share a key the one with the least left over: whole sets stay whole for larger gangs. */
function tightest(
  demands: readonly number[],
  rooms: readonly Room[],
  keyOf: (room: Room) => string | undefined,
): string[] | undefined {
  let best: { names: string[]; left: number; key: string } | undefined;
  for (const [key, members] of Map.groupBy(rooms, keyOf)) {
    if (key === undefined || members.length < demands.length) continue;
    const left = members.reduce((sum, { free }) => sum + free, 0);
    if (best !== undefined && (left > best.left || (left === best.left && key > best.key))) continue;
    const names = seat(demands, members);
    if (names !== undefined) best = { names, left, key };
  }
  return best?.names;
}

/**
 * The largest demand first into the smallest room that holds it. That finds a way wherever there is one: every room that
 * holds the demand holds all later ones too, so taking the smallest of them leaves the best rest.
 */
function seat(demands: readonly number[], rooms: readonly Room[]): string[] | undefined {
  const byFree: Room[][] = [];
  for (const room of rooms) (byFree[room.free] ??= []).push(room);
  for (const bucket of byFree) bucket?.sort((one, other) => (one.name < other.name ? 1 : -1));
  const names = new Array<string>(demands.length);
  const order = demands
    .map((_, index) => index)
    .toSorted((one, other) => (demands[other] ?? 0) - (demands[one] ?? 0) || one - other);
  for (const index of order) {
    let free = demands[index] ?? 0;
    while (free < byFree.length && (byFree[free]?.length ?? 0) === 0) free++;
    const room = byFree[free]?.pop();
    if (room === undefined) return undefined;
    names[index] = room.name;
  }
  return names;
}

/**
 * The rooms a gang without room waits for, and what of them is kept free for it: those that lack least, all of them with the
 * devices in principle (`rooms` has the allocatable count as `total`). Empty where no set of nodes could ever hold it.
 */
export function waitFor(
  demands: readonly number[],
  rooms: readonly (Room & { total: number })[],
  within: Within,
): Map<string, number> {
  const keyOf =
    within === "nvlink" ? (room: Room) => room.domain : within === "zone" ? (room: Room) => room.zone : () => "";
  let best: { kept: Map<string, number>; missing: number; key: string } | undefined;
  for (const [key, members] of Map.groupBy(rooms, keyOf)) {
    if (key === undefined) continue;
    const found = nearest(demands, members);
    if (found === undefined) continue;
    if (best === undefined || found.missing < best.missing || (found.missing === best.missing && key < best.key)) {
      best = { ...found, key };
    }
  }
  return best?.kept ?? new Map();
}

function nearest(
  demands: readonly number[],
  rooms: readonly (Room & { total: number })[],
): { kept: Map<string, number>; missing: number } | undefined {
  const kept = new Map<string, number>();
  let missing = 0;
  for (const demand of demands.toSorted((one, other) => other - one)) {
    const lack = (room: Room): number => Math.max(0, demand - room.free);
    let best: Room | undefined;
    for (const room of rooms) {
      if (room.total < demand || kept.has(room.name)) continue;
      if (best === undefined || lack(room) < lack(best) || (lack(room) === lack(best) && room.name < best.name))
        best = room;
    }
    if (best === undefined) return undefined;
    kept.set(best.name, Math.min(demand, Math.max(0, best.free)));
    missing += lack(best);
  }
  return { kept, missing };
}

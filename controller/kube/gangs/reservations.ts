// The reservation ledger: which gang gets which GPUs, all of them or none. One step at a time, from what is seen; the only
// memory are reservations whose patches have not been seen yet, and losing that loses nothing. Owns the decisions; applying
// them (patches, deletes) and telling them is the caller's.
//
//   G1  no GPU has two owners: what pods hold, what is reserved and what is newly reserved never exceeds what a node has.
//   G2  no half outlives T: a gang of which some pods have places is whole `wholeMs` after its reservation, or is released.
//   G3  same ledger and world, in any order: same decisions.
//   G4  one incarnation of a group at a time: nothing is reserved while pods of another one are there.
//   G5  what is written on pods wins over memory; two reservations written on pods of one gang release it.
//
// Order: priority, then age, then name. A gang that has no room keeps the rooms it lacks least of free for itself, from
// everybody after it, until `keepMs` after it was wished for; then others may pass (back-fill), because a gang that waits for
// hardware that never comes must not idle what is there. One that no set of nodes could ever hold keeps nothing.

import { type GpuNode, type Selection, whyNot } from "../inventory/inventory.ts";
import { type GangPod, gangKey, type Reservation, type Seat } from "./gang-pods.ts";
import { type Candidate, candidatesOf, waitingText } from "./gang-queue.ts";
import { type Finding, unboundSeats, verdictOn } from "./gang-state.ts";
import { findRooms, type Room, type Within, waitFor } from "./rooms.ts";

export type GangWish = {
  /** `namespace/name` of the ReplicaGroup. */
  group: string;
  incarnation: bigint;
  /** GPUs of each worker, by index. */
  devices: readonly number[];
  priority: number;
  /** Since when the group wants places; kept over its incarnations. */
  sinceMs: number;
  selection: Selection;
  within: Within;
  /** How often a gang of this group has failed on a node. */
  failedOn: Readonly<Record<string, number>>;
};

/** All of one look: nodes (with what bound pods hold subtracted) and pods must be from the same lists. */
export type GangWorld = {
  nowMs: number;
  nodes: readonly GpuNode[];
  /** One for each group whose incarnation may live, serving or not. */
  wishes: readonly GangWish[];
  pods: readonly GangPod[];
};

export type GangLimits = {
  /** T: from the reservation to every pod being bound. Binding takes seconds; preemption of others takes their grace. */
  wholeMs: number;
  keepMs: number;
  nodeFailuresMax: number;
};

export const gangLimits: GangLimits = { wholeMs: 120_000, keepMs: 600_000, nodeFailuresMax: 2 };

export type WaitCode =
  | "pods-missing"
  | "older-incarnation"
  | "newer-incarnation"
  | "foreign-gate"
  | "binding"
  | "behind"
  | "capacity-short"
  | "never-fits";
export type ReleaseCode =
  | "not-wanted"
  | "not-whole"
  | "torn"
  | "opened-by-another"
  | "pod-ended"
  | "pod-gone"
  | "misplaced"
  | "node-lost"
  | "devices-taken";

export type GangDecision =
  /** Open the gates of all pods of the incarnation, each with its seat and the whole reservation. */
  | ({ kind: "reserve" } & Reservation)
  | { kind: "wait"; group: string; incarnation: bigint; code: WaitCode; text: string }
  /** Delete every pod of the incarnation; repeated until they are gone. `blamed`: nodes on which pods were not whole. */
  | { kind: "release"; group: string; incarnation: bigint; code: ReleaseCode; text: string; blamed: readonly string[] };

/** By `gangKey`. */
export type Ledger = ReadonlyMap<string, Reservation>;

/** What the pods say: all that is left after a failover, and all that is needed. */
export function rebuild(pods: readonly GangPod[]): Ledger {
  const ledger = new Map<string, Reservation>();
  for (const [key, members] of gangsOf(pods)) {
    const written = members.flatMap((pod) => pod.written ?? []);
    const [first] = written;
    const [pod] = members;
    if (first === undefined || pod === undefined || written.some((other) => !isSame(first, other))) continue;
    ledger.set(key, { group: pod.group, incarnation: pod.incarnation, ...first });
  }
  return ledger;
}

function isSame(
  one: { seats: readonly Seat[]; sinceMs: number },
  other: { seats: readonly Seat[]; sinceMs: number },
): boolean {
  if (one.sinceMs !== other.sinceMs || one.seats.length !== other.seats.length) return false;
  return one.seats.every(({ node, devices }, index) => {
    const seat = other.seats[index];
    return seat !== undefined && seat.node === node && seat.devices === devices;
  });
}

export function gangsOf(pods: readonly GangPod[]): Map<string, GangPod[]> {
  const sorted = pods.toSorted((one, other) => one.worker - other.worker || (one.name < other.name ? -1 : 1));
  const gangs = Map.groupBy(sorted, gangKey);
  return new Map([...gangs].toSorted(([one], [other]) => (one < other ? -1 : 1)));
}

export type GangStep = {
  ledger: Ledger;
  decisions: readonly GangDecision[];
  wakeMs: number;
  /** Seats that are counted though no bound pod holds their GPUs yet. */
  unbound: readonly UnboundSeat[];
};

export type UnboundSeat = { group: string; node: string; devices: number };

export function step(memory: Ledger, world: GangWorld, limits: GangLimits = gangLimits): GangStep {
  const gangs = gangsOf(world.pods);
  const known = recall(memory, rebuild(world.pods), gangs);
  const wishes = new Map(world.wishes.map((wish) => [wish.group, wish]));
  const nodes = new Map(world.nodes.map((node) => [node.name, node]));
  const findings = [...gangs].map(([key, pods]): Finding => {
    const gang = { key, pods, reservation: known.get(key), wish: wishes.get(pods[0]?.group ?? "") };
    return { ...gang, verdict: verdictOn(gang, { nodes, nowMs: world.nowMs, limits }) };
  });
  const space = new Space(world.nodes, findings);
  space.giveUpOverdrawn();
  const kept = new Map<string, Reservation>();
  const decisions: GangDecision[] = [];
  const wakes: number[] = [];
  for (const { key, pods, verdict, reservation } of findings) {
    const [pod] = pods;
    if (pod === undefined || verdict.kind === "open") continue;
    const { group, incarnation } = pod;
    if (verdict.kind === "release") {
      decisions.push({ ...verdict, group, incarnation });
      continue;
    }
    if (reservation !== undefined) kept.set(key, reservation);
    if (verdict.wait === undefined) continue;
    decisions.push({ kind: "wait", group, incarnation, ...verdict.wait });
    if (reservation !== undefined) wakes.push(reservation.sinceMs + limits.wholeMs);
  }
  const unbound = findings.flatMap((finding) =>
    unboundSeats(finding).map(({ node, devices }) => ({ group: finding.pods[0]?.group ?? "", node, devices })),
  );
  for (const seat of unbound) space.take(seat);
  for (const candidate of candidatesOf(world, findings)) {
    const decision = place(candidate, space, { nowMs: world.nowMs, limits, wakes });
    if (decision.kind === "reserve") {
      const { kind: _, ...reservation } = decision;
      kept.set(gangKey(reservation), reservation);
      wakes.push(reservation.sinceMs + limits.wholeMs);
      for (const { node, devices } of reservation.seats) unbound.push({ group: reservation.group, node, devices });
    }
    decisions.push(decision);
  }
  const future = wakes.filter((wake) => wake > world.nowMs);
  return { ledger: kept, decisions, wakeMs: Math.min(...future, Number.POSITIVE_INFINITY), unbound };
}

/** Pods first; memory only for gangs on whose pods nothing is written yet. */
function recall(
  memory: Ledger,
  written: Ledger,
  gangs: ReadonlyMap<string, readonly GangPod[]>,
): Map<string, Reservation> {
  const known = new Map(written);
  for (const [key, reservation] of memory) {
    const pods = gangs.get(key);
    if (pods?.every((pod) => pod.written === undefined && pod.state === "waiting" && !pod.isLeaving))
      known.set(key, reservation);
  }
  return known;
}

// ---- room ----

/** What is free on each node, during one step. */
class Space {
  readonly nodes: readonly GpuNode[];
  readonly #findings: readonly Finding[];
  readonly #rooms: ReadonlyMap<string, OpenRoom>;
  /** Nodes by selection: most wishes of a deployment ask for the same ones. */
  readonly #open = new Map<string, readonly OpenRoom[]>();

  constructor(nodes: readonly GpuNode[], findings: readonly Finding[]) {
    this.nodes = nodes.toSorted((one, other) => (one.name < other.name ? -1 : 1));
    this.#findings = findings;
    const rooms = this.nodes.map(({ name, domain, zone, allocatable, held }): [string, OpenRoom] => {
      const free = allocatable - held;
      return [name, { name, domain, zone, total: allocatable, free, unkept: free }];
    });
    this.#rooms = new Map(rooms);
  }

  /** By name; what they have free changes as gangs are placed. */
  openTo(selection: Selection): readonly OpenRoom[] {
    const key = JSON.stringify(selection);
    const found =
      this.#open.get(key) ??
      this.nodes.flatMap((node) => (whyNot(node, selection) === undefined ? (this.#rooms.get(node.name) ?? []) : []));
    this.#open.set(key, found);
    return found;
  }

  /** Reservations whose GPUs went to others: the least of priority is given up first, then the youngest. */
  giveUpOverdrawn(): void {
    const free = new Map([...this.#rooms.values()].map((room) => [room.name, room.free]));
    const sorted = this.#findings
      .filter(({ verdict }) => verdict.kind === "keep")
      .toSorted(
        (one, other) =>
          (other.wish?.priority ?? 0) - (one.wish?.priority ?? 0) ||
          (one.reservation?.sinceMs ?? 0) - (other.reservation?.sinceMs ?? 0) ||
          (one.key < other.key ? -1 : 1),
      );
    for (const finding of sorted) {
      const seats = unboundSeats(finding);
      const short = seats.find(({ node, devices }) => (free.get(node) ?? 0) < devices);
      if (short === undefined) {
        for (const { node, devices } of seats) free.set(node, (free.get(node) ?? 0) - devices);
        continue;
      }
      const text = `GPUs of node ${short.node} that were reserved for it went to other pods`;
      finding.verdict = { kind: "release", code: "devices-taken", text, blamed: [] };
    }
  }

  take({ node, devices }: { node: string; devices: number }): void {
    const room = this.#rooms.get(node);
    if (room === undefined) return;
    room.free -= devices;
    room.unkept -= devices;
  }

  keep(rooms: ReadonlyMap<string, number>): void {
    for (const [node, devices] of rooms) {
      const room = this.#rooms.get(node);
      if (room !== undefined) room.free -= devices;
    }
  }
}

/** `unkept`: as if no gang had asked to keep anything; both are below 0 where more is held than there is. */
type OpenRoom = { -readonly [Key in keyof Room]: Room[Key] } & { total: number; unkept: number };

type Moment = { nowMs: number; limits: GangLimits; wakes: number[] };

function place(candidate: Candidate, space: Space, { nowMs, limits, wakes }: Moment): GangDecision {
  const { wish } = candidate;
  const { group, incarnation, devices, within } = wish;
  const wait = (code: WaitCode, text: string): GangDecision => ({ kind: "wait", group, incarnation, code, text });
  if (candidate.kind === "blocked") return wait(candidate.code, candidate.text);
  const open = space.openTo(wish.selection);
  const hasFailed = Object.values(wish.failedOn).some((times) => times >= limits.nodeFailuresMax);
  const trusted = hasFailed ? open.filter(({ name }) => (wish.failedOn[name] ?? 0) < limits.nodeFailuresMax) : open;
  const keepUntilMs = wish.sinceMs + limits.keepMs;
  // Nodes that failed it are avoided while the others have room, or could have it and are worth waiting for; with nothing else
  // they are better than nothing.
  const isEnough =
    !hasFailed ||
    findRooms(devices, trusted, within) !== undefined ||
    (nowMs < keepUntilMs && findRooms(devices, whole(trusted), within) !== undefined);
  const rooms = isEnough ? trusted : open;
  const names = findRooms(devices, rooms, within);
  if (names !== undefined) {
    const seats = names.map((node, worker): Seat => ({ worker, node, devices: devices[worker] ?? 0 }));
    for (const seat of seats) space.take(seat);
    return { kind: "reserve", group, incarnation, sinceMs: nowMs, seats };
  }
  const unkept = rooms.map((room) => ({ ...room, free: room.unkept }));
  const isBehind = findRooms(devices, unkept, within) !== undefined;
  const target = waitFor(devices, rooms, within);
  const explain = (why: string): string => waitingText(wish, why, { all: space.nodes, rooms: unkept });
  if (target.size === 0) return wait("never-fits", explain("no set of nodes could hold it"));
  if (nowMs < keepUntilMs) {
    space.keep(target);
    wakes.push(keepUntilMs);
  }
  if (isBehind) return wait("behind", explain("what is free is kept for gangs before it"));
  return wait("capacity-short", explain("there is too little free"));
}

/** As if nobody held anything. */
function whole(rooms: readonly OpenRoom[]): Room[] {
  return rooms.map((room) => ({ ...room, free: room.total }));
}

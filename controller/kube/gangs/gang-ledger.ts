// The reservation ledger kept up to date: after a change only the gangs that it can concern are decided anew, with what all
// others hold taken off the nodes. Owns which gangs those are; the decisions themselves are `step` of reservations.ts.
//
//   D1  ledger and decisions are those that one `step` over all gangs with the same memory would answer. Gangs meet in
//       nothing but the room on nodes: where GPUs are short for what is reserved already, all of them are looked at.
//   D2  gangs that wait or are to go are looked at with every change: whatever it is, it may have made room.
import { isDeepStrictEqual } from "node:util";
import type { GpuNode } from "../inventory/inventory.ts";
import { type GangPod, gangKey, type Reservation } from "./gang-pods.ts";
import {
  type GangDecision,
  type GangLimits,
  type GangStep,
  type GangWish,
  type Ledger,
  step,
  type UnboundSeat,
} from "./reservations.ts";

/** What there is now. All of one moment. */
export type GangSource = {
  nodes(): readonly GpuNode[];
  nodeOf(name: string): GpuNode | undefined;
  /** Of every group that has a wish or pods. */
  groups(): Iterable<string>;
  wishOf(group: string): GangWish | undefined;
  /** Of all its incarnations. */
  podsOf(group: string): readonly GangPod[];
};

export type GangChange = {
  nowMs: number;
  /** Whose wish or pods have changed. */
  groups: ReadonlySet<string>;
  /** Nodes that may count as something else. */
  nodes: ReadonlySet<string>;
};

type Entry = {
  ledger: readonly Reservation[];
  decisions: readonly GangDecision[];
  unbound: readonly UnboundSeat[];
};

const NOTHING: Entry = { ledger: [], decisions: [], unbound: [] };

export class GangLedger {
  readonly #source: GangSource;
  readonly #limits: GangLimits;
  readonly #entries = new Map<string, Entry>();
  /** Groups of which something waits or goes and has nothing reserved (D2), and when time alone may change that. */
  readonly #waiting = new Set<string>();
  #waitingDueMs = Number.POSITIVE_INFINITY;
  /** By group: when what is reserved for it must be whole. */
  readonly #dueMs = new Map<string, number>();
  /** By node: the sum of all `unbound`, and the groups that have seats there. */
  readonly #charged = new Map<string, number>();
  readonly #seated = new Map<string, Set<string>>();
  /** As they were looked at last. */
  #known: Map<string, GpuNode> | undefined;

  constructor(source: GangSource, limits: GangLimits) {
    this.#source = source;
    this.#limits = limits;
  }

  /** When a decision may change by time alone. */
  get wakeMs(): number {
    let wakeMs = this.#waitingDueMs;
    for (const dueMs of this.#dueMs.values()) wakeMs = Math.min(wakeMs, dueMs);
    return wakeMs;
  }

  decisionOf(group: string, incarnation: bigint): GangDecision | undefined {
    return this.#entries.get(group)?.decisions.find((each) => each.incarnation === incarnation);
  }

  reservationOf(group: string, incarnation: bigint): Reservation | undefined {
    return this.#entries.get(group)?.ledger.find((each) => each.incarnation === incarnation);
  }

  /** Answers the groups of which something else is decided now. */
  update({ nowMs, groups, nodes }: GangChange): string[] {
    const dirty = new Set([...groups, ...this.#waiting, ...this.#onNodes(nodes)]);
    for (const [group, dueMs] of this.#dueMs) if (dueMs <= nowMs) dirty.add(group);
    const made = this.#stepOver(dirty, nowMs);
    const isShort = made.decisions.some((each) => each.kind === "release" && each.code === "devices-taken");
    if (!isShort) return this.#take(dirty, made);
    const all = new Set([...this.#source.groups(), ...this.#entries.keys()]);
    return this.#take(all, this.#stepOver(all, nowMs));
  }

  /** Groups that sit on a node that is another one now, or that has too little for what is reserved on it. */
  #onNodes(names: ReadonlySet<string>): string[] {
    this.#known ??= new Map(this.#source.nodes().map((node) => [node.name, node]));
    const concerned: string[] = [];
    for (const name of names) {
      const before = this.#known.get(name);
      const node = this.#source.nodeOf(name);
      if (node === undefined) this.#known.delete(name);
      else this.#known.set(name, node);
      const isShort = node === undefined || (this.#charged.get(name) ?? 0) > node.allocatable - node.held;
      if (isShort || !isSameNode(before, node)) concerned.push(...(this.#seated.get(name) ?? []));
    }
    return concerned;
  }

  #stepOver(groups: ReadonlySet<string>, nowMs: number): GangStep {
    const memory = new Map<string, Reservation>();
    const own = new Map<string, number>();
    const pods: GangPod[] = [];
    const wishes: GangWish[] = [];
    for (const group of groups) {
      const { ledger, unbound } = this.#entries.get(group) ?? NOTHING;
      for (const reservation of ledger) memory.set(gangKey(reservation), reservation);
      for (const { node, devices } of unbound) own.set(node, (own.get(node) ?? 0) + devices);
      pods.push(...this.#source.podsOf(group));
      const wish = this.#source.wishOf(group);
      if (wish !== undefined) wishes.push(wish);
    }
    const nodes = this.#nodesFor({ memory, pods, wishes }).map((node): GpuNode => {
      const others = (this.#charged.get(node.name) ?? 0) - (own.get(node.name) ?? 0);
      return others === 0 ? node : { ...node, held: node.held + others };
    });
    return step(memory, { nowMs, nodes, wishes, pods }, this.#limits);
  }

  /** All of them where somebody asks for places, else those on which somebody sits. */
  #nodesFor(asked: { memory: Ledger; pods: readonly GangPod[]; wishes: readonly GangWish[] }): readonly GpuNode[] {
    const { memory, pods, wishes } = asked;
    const written = pods.filter((pod) => pod.written !== undefined);
    const placed = new Set([...memory.keys(), ...written.map(gangKey)]);
    if (wishes.some((wish) => !placed.has(gangKey(wish)))) return this.#source.nodes();
    const seats = [...memory.values(), ...written.flatMap((pod) => pod.written ?? [])].flatMap((each) => each.seats);
    return [...new Set(seats.map(({ node }) => node))].flatMap((name) => this.#source.nodeOf(name) ?? []);
  }

  #take(groups: ReadonlySet<string>, made: GangStep): string[] {
    const ledger = Map.groupBy(made.ledger.values(), ({ group }) => group);
    const decisions = Map.groupBy(made.decisions, ({ group }) => group);
    const unbound = Map.groupBy(made.unbound, ({ group }) => group);
    const changed: string[] = [];
    for (const group of groups) {
      const before = this.#entries.get(group) ?? NOTHING;
      const entry: Entry = {
        ledger: ledger.get(group) ?? [],
        decisions: decisions.get(group) ?? [],
        unbound: unbound.get(group) ?? [],
      };
      this.#count(group, before, -1);
      this.#count(group, entry, 1);
      if (entry.ledger.length + entry.decisions.length + entry.unbound.length === 0) this.#entries.delete(group);
      else this.#entries.set(group, entry);
      this.#await(group, entry);
      const isSame =
        isDeepStrictEqual(before.decisions, entry.decisions) && isDeepStrictEqual(before.ledger, entry.ledger);
      if (!isSame) changed.push(group);
    }
    this.#waitingDueMs = this.#waiting.size === 0 ? Number.POSITIVE_INFINITY : made.wakeMs;
    return changed;
  }

  #count(group: string, { ledger, unbound }: Entry, sign: 1 | -1): void {
    for (const { node, devices } of unbound) {
      const charged = (this.#charged.get(node) ?? 0) + sign * devices;
      if (charged === 0) this.#charged.delete(node);
      else this.#charged.set(node, charged);
    }
    for (const { node } of ledger.flatMap(({ seats }) => seats)) {
      const groups = this.#seated.get(node) ?? new Set();
      if (sign === 1) this.#seated.set(node, groups.add(group));
      else if (groups.delete(group) && groups.size === 0) this.#seated.delete(node);
    }
  }

  #await(group: string, { ledger, decisions }: Entry): void {
    const isPlaced = (decision: GangDecision) => ledger.some(({ incarnation }) => incarnation === decision.incarnation);
    if (decisions.some((decision) => !isPlaced(decision))) this.#waiting.add(group);
    else this.#waiting.delete(group);
    const waits = decisions.filter(({ kind }) => kind !== "release");
    const due = ledger.filter(({ incarnation }) => waits.some((each) => each.incarnation === incarnation));
    if (due.length === 0) this.#dueMs.delete(group);
    else this.#dueMs.set(group, Math.min(...due.map(({ sinceMs }) => sinceMs + this.#limits.wholeMs)));
  }
}

/** But for what is held there. */
function isSameNode(one: GpuNode | undefined, other: GpuNode | undefined): boolean {
  if (one === undefined || other === undefined) return one === other;
  return isDeepStrictEqual({ ...one, held: 0, free: 0 }, { ...other, held: 0, free: 0 });
}

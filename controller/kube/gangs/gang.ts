// All gangs of this controller, in one place and one at a time: the reservation ledger between the stores it is rebuilt from
// and the groups that ask it. Owns the ledger's memory and who asks; writes nothing to the server.
//
//   Q1  a decision is made in one moment, over all groups: no other comes between its look and its memory (no await).
//   Q2  a group that asks before it has begun, or whose pods are not all there yet, stands in the ledger with the pods it
//       will have: what is reserved for it stays reserved until they are there.
//   Q3  a gate that may have been opened counts as open: until the store shows a newer version of the pod, a patch without an
//       answer keeps its seats from everybody else.
//   Q4  who is to be woken is told after each change: groups of which something else is decided now, and those that have not
//       begun when there is something else to plan on.
//   Q5  nothing here is needed after a failover: groups (with the nodes that failed them) and pods say it all.
import type { ReplicaGroup } from "../../api/parse.ts";
import type { Inventory } from "../../plan/hardware.ts";
import { type KubeObject, keyOf } from "../api/client.ts";
import type { Beside } from "../groups/group-beside.ts";
import { groupOf, recordOf } from "../groups/group-record.ts";
import { LiveInventory } from "../inventory/live-inventory.ts";
import type { Delta, Store } from "../watch/store.ts";
import { GangLedger } from "./gang-ledger.ts";
import { type GangPod, gangPod, type Reservation } from "./gang-pods.ts";
import { type GangLimits, type GangWish, gangLimits } from "./reservations.ts";

/** What the pods of a group need and are, whatever its incarnation. */
export type GroupWish = Pick<GangWish, "devices" | "priority" | "selection" | "within"> & {
  /** Port of a worker's gRPC server. */
  port: number;
  /** A closed pod of this worker, owned by the group; see workerPod of pods.ts. */
  podOf: (group: KubeObject, incarnation: bigint, worker: number) => KubeObject;
  /** What stands beside the pods of this incarnation; see group-objects.ts. */
  besideOf: (group: KubeObject, incarnation: bigint) => readonly Beside[];
};

export type GangStores = {
  groups: Store;
  /** Of the whole cluster: others' pods hold GPUs too. */
  pods: Store;
  nodes: Store;
  /** Undefined where the server has no ResourceSlices. */
  slices: Store | undefined;
};

export type GangsOptions = {
  stores: GangStores;
  /** Undefined where its plan is not known yet: then nothing is decided about it. */
  wishOf: (group: ReplicaGroup) => GroupWish | undefined;
  limits?: GangLimits;
};

export type Place =
  | { kind: "reserved"; reservation: Reservation }
  | { kind: "waiting"; code: string; text: string }
  /** The incarnation has lost its places, or may not have them. */
  | { kind: "released"; code: string; text: string; blamed: readonly string[] };

type Ask = { incarnation: bigint; sinceMs: number; untilMs: number };

/** Who has not asked again for so long wants it no more. Above the longest back-off between two passes. */
const ASK_MS = 30_000;

/** One who waits for the ledger. */
export type Watcher = {
  ring: () => void;
  /** It has not begun: what there is to plan on is its business. */
  isOpen: () => boolean;
  nowMs: () => number;
};

export class Gangs {
  readonly #options: GangsOptions;
  readonly #live: LiveInventory;
  readonly #ledger: GangLedger;
  /** By group: the incarnation it wants to begin (Q2), since when, and until when that counts. */
  readonly #asking = new Map<string, Ask>();
  /** By a pod's UID: what a patch on its way writes, and the version it was made for (Q3). */
  readonly #opening = new Map<string, { version: string; reservation: Reservation }>();
  /** Workers' pods by group and key, and the group of each. */
  readonly #pods = new Map<string, Map<string, KubeObject>>();
  readonly #groupOf = new Map<string, string>();
  readonly #watchers = new Map<string, Watcher>();
  /** Since the last decision. */
  readonly #changed = { groups: new Set<string>(), nodes: new Set<string>() };
  #isDecisionDue = false;

  constructor(options: GangsOptions) {
    this.#options = options;
    const { groups, pods, nodes, slices } = options.stores;
    this.#live = new LiveInventory({ nodes, pods, slices });
    const source = {
      nodes: () => this.#live.of().nodes,
      nodeOf: (name: string) => this.#live.nodeOf(name),
      groups: () => new Set([...this.#pods.keys(), ...[...groups.all()].map(keyOf)]),
      wishOf: (group: string) => this.#wishOf(group),
      podsOf: (group: string) => this.#podsOf(group),
    };
    this.#ledger = new GangLedger(source, options.limits ?? gangLimits);
    for (const object of pods.all()) this.#onPod({ kind: "added", object });
    for (const object of groups.all()) this.touch(keyOf(object));
    pods.subscribe((delta) => this.#onPod(delta));
    groups.subscribe(({ object }) => this.touch(keyOf(object)));
    this.#live.subscribe((node) => this.#onNode(node));
  }

  /** When a place may change by time alone. */
  get wakeMs(): number {
    let wakeMs = this.#ledger.wakeMs;
    for (const { untilMs } of this.#asking.values()) wakeMs = Math.min(wakeMs, untilMs);
    return wakeMs;
  }

  /** Q4, until the group is forgotten. */
  watch(group: string, watcher: Watcher): void {
    this.#watchers.set(group, watcher);
  }

  /** What the group wishes for, or its pods, may have changed. */
  touch(group: string): void {
    this.#changed.groups.add(group);
    this.#decideSoon();
  }

  /** For `wishOf` of one group. */
  wishOf(group: ReplicaGroup): GroupWish | undefined {
    return this.#options.wishOf(group);
  }

  /**
   * A place for what has not begun: it stands in the ledger from now on, until it has begun, or for ASK_MS. Answers since when
   * it asks.
   */
  ask(group: string, incarnation: bigint, nowMs: number): { place: Place; sinceMs: number } {
    const before = this.#asking.get(group);
    const isSame = before?.incarnation === incarnation;
    const sinceMs = before?.sinceMs ?? nowMs;
    this.#asking.set(group, { incarnation, sinceMs, untilMs: nowMs + ASK_MS });
    // What was given back before it began is asked for anew: no incarnation has ended by it.
    if (!isSame || this.#ledger.decisionOf(group, incarnation)?.kind === "release") this.touch(group);
    return { place: this.placeOf(group, incarnation, nowMs), sinceMs };
  }

  withdraw(group: string): void {
    if (this.#asking.delete(group)) this.touch(group);
  }

  placeOf(group: string, incarnation: bigint, nowMs: number): Place {
    this.#decide(nowMs);
    const decision = this.#ledger.decisionOf(group, incarnation);
    if (decision?.kind === "release") return { ...decision, kind: "released" };
    const reservation = this.#ledger.reservationOf(group, incarnation);
    if (reservation !== undefined) return { kind: "reserved", reservation };
    if (decision?.kind === "wait") return { kind: "waiting", code: decision.code, text: decision.text };
    return { kind: "waiting", code: "unknown-plan", text: "its plan is not known yet" };
  }

  /** Before the patch is sent. */
  opening({ metadata }: KubeObject, reservation: Reservation): void {
    this.#opening.set(metadata.uid ?? "", { version: metadata.resourceVersion ?? "", reservation });
    this.touch(reservation.group);
  }

  /** What the hardware could hold of this wish: who gets what is free is the ledger's, by priority, not the first one's to look. */
  inventory({ selection }: GroupWish): Inventory {
    return this.#live.plannable(selection, "all");
  }

  #decide(nowMs: number): void {
    const { groups, nodes } = this.#changed;
    if (groups.size === 0 && nodes.size === 0 && nowMs < this.wakeMs) return;
    for (const [group, { untilMs }] of this.#asking) {
      if (untilMs > nowMs) continue;
      this.#asking.delete(group);
      groups.add(group);
    }
    // Whole milliseconds, as annotations have them: what is remembered and what is written are the same reservation.
    const changed = this.#ledger.update({ nowMs: Math.floor(nowMs), groups, nodes });
    groups.clear();
    nodes.clear();
    for (const group of changed) this.#watchers.get(group)?.ring();
  }

  /** After all that changes in one go, such as a list. */
  #decideSoon(): void {
    const [watcher] = this.#watchers.values();
    if (this.#isDecisionDue || watcher === undefined) return;
    this.#isDecisionDue = true;
    queueMicrotask(() => {
      this.#isDecisionDue = false;
      try {
        this.#decide(watcher.nowMs());
      } catch {
        // Whoever asks meets it again, and says it.
        for (const { ring } of this.#watchers.values()) ring();
      }
    });
  }

  #onNode(node: string): void {
    this.#changed.nodes.add(node);
    for (const { isOpen, ring } of this.#watchers.values()) if (isOpen()) ring();
    this.#decideSoon();
  }

  #onPod({ kind, object }: Pick<Delta, "kind" | "object">): void {
    const key = keyOf(object);
    const before = this.#groupOf.get(key);
    const now = kind === "deleted" ? undefined : gangPod(object)?.group;
    if (before !== undefined && before !== now) {
      const pods = this.#pods.get(before);
      if (pods?.delete(key) && pods.size === 0) this.#pods.delete(before);
      this.#groupOf.delete(key);
      this.#opening.delete(object.metadata.uid ?? "");
      this.touch(before);
    }
    if (now === undefined) return;
    const pods = this.#pods.get(now) ?? new Map<string, KubeObject>();
    this.#pods.set(now, pods.set(key, object));
    this.#groupOf.set(key, now);
    this.touch(now);
  }

  /** Of the group: those that are there, and those that will be. */
  #podsOf(group: string): GangPod[] {
    const pods = [...(this.#pods.get(group)?.values() ?? [])].flatMap((object): GangPod[] => {
      const pod = gangPod(object);
      const { uid = "", resourceVersion } = object.metadata;
      const opening = this.#opening.get(uid);
      if (pod === undefined || opening === undefined) return pod ? [pod] : [];
      if (opening.version !== resourceVersion) this.#opening.delete(uid);
      if (opening.version !== resourceVersion) return [pod];
      const { seats, sinceMs } = opening.reservation;
      return [{ ...pod, state: "released", written: { seats, sinceMs } }];
    });
    const wish = this.#wishOf(group);
    return wish === undefined ? pods : [...pods, ...imagined(wish, pods)];
  }

  #wishOf(key: string): GangWish | undefined {
    const object = this.#options.stores.groups.get(key);
    const group = object && readGroup(object);
    if (group === undefined || group.metadata.deletionTimestamp !== undefined) return undefined;
    const wish = this.#options.wishOf(group);
    if (wish === undefined) return undefined;
    const record = recordOf(group);
    if (record.begun) this.#asking.delete(key);
    const incarnation = record.begun ? record.incarnation : this.#asking.get(key)?.incarnation;
    if (incarnation === undefined) return undefined;
    const { devices, priority, selection, within } = wish;
    const sinceMs = Date.parse(object?.metadata.creationTimestamp ?? "") || 0;
    return { group: key, incarnation, devices, priority, selection, within, sinceMs, failedOn: record.failedNodes };
  }

  /** The group has gone. */
  forget(group: string): void {
    this.#watchers.delete(group);
    this.withdraw(group);
  }
}

/** Pods that are still to be created, as they will be: closed. Not where one of the gang is further: then one has gone. */
function imagined(wish: GangWish, pods: readonly GangPod[]): GangPod[] {
  const { group, incarnation } = wish;
  const there = pods.filter((pod) => pod.incarnation === incarnation);
  if (there.some(({ state, isLeaving }) => state !== "waiting" || isLeaving)) return [];
  const [namespace = ""] = group.split("/");
  return wish.devices.flatMap((devices, worker): GangPod[] => {
    if (there.some((pod) => pod.worker === worker)) return [];
    const name = `${group}#${incarnation}/${worker}`;
    const none = { node: "", isLeaving: false, foreignGates: [], written: undefined };
    return [{ name, namespace, group, incarnation, worker, devices, state: "waiting", ...none }];
  });
}

const known = new WeakMap<KubeObject, ReplicaGroup>();

/** One that cannot be read wants nothing here; its own observe says why. */
function readGroup(object: KubeObject): ReplicaGroup | undefined {
  const found = known.get(object);
  if (found !== undefined) return found;
  try {
    const group = groupOf(object);
    known.set(object, group);
    return group;
  } catch {
    return undefined;
  }
}

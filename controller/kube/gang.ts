// All gangs of this controller, in one place and one at a time: the reservation ledger between the stores it is rebuilt from
// and the groups that ask it. Owns the ledger's memory and who asks; writes nothing to the server.
//
//   Q1  a decision is made in one moment, over all groups: no other comes between its look and its memory (no await).
//   Q2  a group that asks before it has begun, or whose pods are not all there yet, stands in the ledger with the pods it
//       will have: what is reserved for it stays reserved until they are there.
//   Q3  a gate that may have been opened counts as open: until the store shows a newer version of the pod, a patch without an
//       answer keeps its seats from everybody else.
//   Q4  nothing here is needed after a failover: groups (with the nodes that failed them) and pods say it all.
import type { ReplicaGroup } from "../api/parse.ts";
import type { Inventory } from "../plan/hardware.ts";
import { type KubeObject, keyOf } from "./client.ts";
import { type GangPod, gangKey, gangPod, type Reservation } from "./gang-pods.ts";
import type { Beside } from "./group-beside.ts";
import { groupOf, recordOf } from "./group-record.ts";
import { type ClusterInventory, inventoryOf, plannable } from "./inventory.ts";
import { type GangLimits, type GangStep, type GangWish, gangLimits, step } from "./reservations.ts";
import type { Store } from "./store.ts";

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

export class Gangs {
  readonly #options: GangsOptions;
  readonly #limits: GangLimits;
  /** By group: the incarnation it wants to begin (Q2), since when, and until when that counts. */
  readonly #asking = new Map<string, Ask>();
  /** By a pod's UID: what a patch on its way writes, and the version it was made for (Q3). */
  readonly #opening = new Map<string, { version: string; reservation: Reservation }>();
  #last: GangStep = { ledger: new Map(), decisions: [], wakeMs: Number.POSITIVE_INFINITY };
  #isStale = true;

  constructor(options: GangsOptions) {
    this.#options = options;
    this.#limits = options.limits ?? gangLimits;
    const stale = () => {
      this.#isStale = true;
    };
    const { groups, pods, nodes, slices } = options.stores;
    for (const store of [groups, pods, nodes, slices]) store?.subscribe(stale);
  }

  /** When a place may change by time alone. */
  get wakeMs(): number {
    return Math.min(this.#last.wakeMs, ...[...this.#asking.values()].map(({ untilMs }) => untilMs));
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
    if (!isSame) this.#isStale = true;
    return { place: this.placeOf(group, incarnation, nowMs), sinceMs };
  }

  withdraw(group: string): void {
    if (this.#asking.delete(group)) this.#isStale = true;
  }

  placeOf(group: string, incarnation: bigint, nowMs: number): Place {
    this.#decide(nowMs);
    const decision = this.#last.decisions.find((each) => each.group === group && each.incarnation === incarnation);
    if (decision?.kind === "release") return { ...decision, kind: "released" };
    const reservation = this.#last.ledger.get(gangKey({ group, incarnation }));
    if (reservation !== undefined) return { kind: "reserved", reservation };
    if (decision?.kind === "wait") return { kind: "waiting", code: decision.code, text: decision.text };
    return { kind: "waiting", code: "unknown-plan", text: "its plan is not known yet" };
  }

  /** Before the patch is sent. */
  opening({ metadata }: KubeObject, reservation: Reservation): void {
    this.#opening.set(metadata.uid ?? "", { version: metadata.resourceVersion ?? "", reservation });
    this.#isStale = true;
  }

  /** What there is to plan on for this wish; what others have reserved and not yet taken counts as free. */
  inventory({ selection }: GroupWish): Inventory {
    return plannable(this.#view(), selection, "free");
  }

  #view(): ClusterInventory {
    const { pods, nodes, slices } = this.#options.stores;
    return inventoryOf({ nodes: [...nodes.all()], pods: [...pods.all()], slices: [...(slices?.all() ?? [])] });
  }

  #decide(nowMs: number): void {
    if (!this.#isStale && nowMs < this.wakeMs) return;
    for (const [group, { untilMs }] of this.#asking) if (untilMs <= nowMs) this.#asking.delete(group);
    const pods = this.#pods();
    const wishes = [...this.#options.stores.groups.all()].flatMap((object) => this.#wishOf(object) ?? []);
    // Whole milliseconds, as annotations have them: what is remembered and what is written are the same reservation.
    const world = {
      nowMs: Math.floor(nowMs),
      nodes: this.#view().nodes,
      wishes,
      pods: [...pods, ...imagined(wishes, pods)],
    };
    this.#last = step(this.#last.ledger, world, this.#limits);
    this.#isStale = false;
  }

  #pods(): GangPod[] {
    const seen = new Set<string>();
    const pods = [...this.#options.stores.pods.all()].flatMap((object): GangPod[] => {
      const pod = gangPod(object);
      const { uid = "", resourceVersion } = object.metadata;
      const opening = this.#opening.get(uid);
      if (pod === undefined || opening === undefined || opening.version !== resourceVersion) return pod ? [pod] : [];
      seen.add(uid);
      const { seats, sinceMs } = opening.reservation;
      return [{ ...pod, state: "released", written: { seats, sinceMs } }];
    });
    for (const uid of [...this.#opening.keys()]) if (!seen.has(uid)) this.#opening.delete(uid);
    return pods;
  }

  #wishOf(object: KubeObject): GangWish | undefined {
    const group = readGroup(object);
    if (group === undefined || group.metadata.deletionTimestamp !== undefined) return undefined;
    const wish = this.#options.wishOf(group);
    if (wish === undefined) return undefined;
    const key = keyOf(object);
    const record = recordOf(group);
    if (record.begun) this.#asking.delete(key);
    const incarnation = record.begun ? record.incarnation : this.#asking.get(key)?.incarnation;
    if (incarnation === undefined) return undefined;
    const { devices, priority, selection, within } = wish;
    const sinceMs = Date.parse(object.metadata.creationTimestamp ?? "") || 0;
    return { group: key, incarnation, devices, priority, selection, within, sinceMs, failedOn: record.failedNodes };
  }

  /** The group has gone. */
  forget(group: string): void {
    this.withdraw(group);
  }
}

/** Pods that are still to be created, as they will be: closed. Not where one of the gang is further: then one has gone. */
function imagined(wishes: readonly GangWish[], pods: readonly GangPod[]): GangPod[] {
  const byGang = Map.groupBy(pods, gangKey);
  return wishes.flatMap((wish) => {
    const there = byGang.get(gangKey(wish)) ?? [];
    if (there.some(({ state, isLeaving }) => state !== "waiting" || isLeaving)) return [];
    const [namespace = ""] = wish.group.split("/");
    return wish.devices.flatMap((devices, worker): GangPod[] => {
      if (there.some((pod) => pod.worker === worker)) return [];
      const { group, incarnation } = wish;
      const name = `${group}#${incarnation}/${worker}`;
      const none = { node: "", isLeaving: false, foreignGates: [], written: undefined };
      return [{ name, namespace, group, incarnation, worker, devices, state: "waiting", ...none }];
    });
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

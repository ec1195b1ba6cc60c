// A copy of a cluster on which things may be tried: the stores of the controller, filled once, with its inventory and its
// reservation ledger over them. Owns how an object comes, goes and is bound there; decides nothing.
//
//   S1  what is removed takes with it what it owns, as the garbage collector would.
//   S2  a gang is bound whole, on the seats of the ledger, or not at all.

import type { ReplicaGroup } from "../../api/parse.ts";
import type { GroupView, StoredPlan } from "../../reconcile/deployment/world.ts";
import type { KubeObject } from "../api/client.ts";
import { keyOf as keyOfObject } from "../api/client.ts";
import { fieldsOf } from "../api/fields.ts";
import { Gangs, type GroupWish } from "../gangs/gang.ts";
import { gangPod, RESERVED_AT, type Reservation, SEATS, seatsText } from "../gangs/gang-pods.ts";
import { groupOf, recordOf, withRecord } from "../groups/group-record.ts";
import { orderOf, wishOf } from "../groups/group-wishes.ts";
import { podName } from "../groups/pods.ts";
import { parseTemplate } from "../groups/worker-template.ts";
import { ClusterView } from "../inventory/cluster-view.ts";
import { podFacts } from "../inventory/pod-facts.ts";
import { groupViewOf, storedPlanOf } from "../owners/deployment-objects.ts";
import { Store } from "../watch/store.ts";

export const KINDS = ["nodes", "pods", "slices", "deployments", "pools", "plans", "groups"] as const;
export type Snapshot = Readonly<Record<(typeof KINDS)[number], readonly KubeObject[]>>;

export type Seat = { worker: number; node: string; devices: number; firstRank: number };
export type Placed = { group: string; plan: string; seats: readonly Seat[]; isNew: boolean };
/** Why a group has no places, in the ledger's words. */
export type Unplaced = { group: string; plan: string; code: string; text: string };

/** Beyond every revision of etcd, which counts writes. */
const FIRST_VERSION = 10n ** 18n;
/** The pods of a try are never created: only GPUs and places of the template's pods count. */
const TEMPLATE = parseTemplate("", "");

export class Stage {
  readonly nowMs: number;
  readonly #stores: Record<(typeof KINDS)[number], Store>;
  readonly #gangs: Gangs;
  /** Groups that had their places before anything was tried. */
  readonly #bound: ReadonlySet<string>;
  #version = FIRST_VERSION;

  constructor(snapshot: Snapshot, nowMs: number) {
    const filled = (kind: (typeof KINDS)[number]): Store => {
      const store = new Store();
      store.replace(snapshot[kind], "");
      return store;
    };
    this.nowMs = nowMs;
    this.#stores = {
      nodes: filled("nodes"),
      pods: filled("pods"),
      slices: filled("slices"),
      deployments: filled("deployments"),
      pools: filled("pools"),
      plans: filled("plans"),
      groups: filled("groups"),
    };
    this.#gangs = new Gangs({ stores: this.#stores, wishOf: (group) => this.#wishOf(group) });
    this.#bound = new Set(this.places().keys());
  }

  /** As of now: a view remembers for a second, and here no time passes. */
  view(): ClusterView {
    return new ClusterView(this.#stores);
  }

  node(name: string): KubeObject | undefined {
    return this.#stores.nodes.get(name);
  }

  nodeNames(): string[] {
    return [...this.#stores.nodes.all()].map(({ metadata }) => metadata.name).toSorted();
  }

  ownerAt(kind: string, key: string): KubeObject | undefined {
    return (kind === "DraftPool" ? this.#stores.pools : this.#stores.deployments).get(key);
  }

  /** Applied as by `kubectl apply`: what is there keeps its identity and status. */
  takeUp(object: KubeObject): KubeObject {
    const key = keyOfObject(object);
    const before = this.ownerAt(object.kind, key);
    const { uid = `try-${object.kind}-${key}`, generation = 0, creationTimestamp } = before?.metadata ?? {};
    const taken: KubeObject = {
      ...object,
      status: object.status ?? before?.status,
      metadata: {
        ...before?.metadata,
        ...object.metadata,
        annotations: { ...before?.metadata.annotations, ...object.metadata.annotations },
        uid,
        generation: generation + 1,
        creationTimestamp: creationTimestamp ?? new Date(this.nowMs).toISOString(),
      },
    };
    this.#put(object.kind === "DraftPool" ? "pools" : "deployments", taken);
    return taken;
  }

  /** A new object of this kind; one that is there keeps its identity and status. */
  add(kind: (typeof KINDS)[number], object: KubeObject): void {
    const before = this.#stores[kind].get(keyOfObject(object));
    const uid = before?.metadata.uid ?? `try-${object.kind}-${keyOfObject(object)}`;
    const creationTimestamp = before?.metadata.creationTimestamp ?? new Date(this.nowMs).toISOString();
    this.#put(kind, { ...before, ...object, metadata: { ...object.metadata, uid, creationTimestamp } });
  }

  /** S1. Nothing happens where it is not there. */
  remove(kind: (typeof KINDS)[number], key: string): void {
    const object = this.#stores[kind].get(key);
    if (object === undefined) return;
    this.#stores[kind].remove(object);
    const { uid } = object.metadata;
    if (uid === undefined) return;
    for (const owned of ["plans", "groups", "pods"] as const) {
      for (const each of this.#stores[owned].ownedBy(uid)) this.remove(owned, keyOfObject(each));
    }
  }

  /** The node goes and what runs there; a gang that loses a pod begins anew, as a whole. */
  removeNode(name: string): void {
    this.remove("nodes", name);
    for (const pod of [...this.#stores.pods.all()]) {
      if (podFacts(pod).node !== name) continue;
      this.remove("pods", keyOfObject(pod));
      const group = this.#stores.groups.get(gangPod(pod)?.group ?? "");
      if (group === undefined) continue;
      for (const other of this.#stores.pods.ownedBy(group.metadata.uid ?? "")) this.remove("pods", keyOfObject(other));
      const record = recordOf(groupOf(group));
      const next = { ...record, incarnation: record.incarnation + 1n, begun: false };
      const { phase: _, placement: __, ...status } = fieldsOf(withRecord(group.status, next));
      this.#put("groups", { ...group, status });
    }
  }

  plansOf(owner: KubeObject | undefined): StoredPlan[] {
    const owned = this.#stores.plans.ownedBy(owner?.metadata.uid ?? "").map(storedPlanOf);
    return owned.flatMap((each) => (each.kind === "ok" ? each.value : []));
  }

  groupsOf(owner: KubeObject): { groups: GroupView[]; unreadable: string[] } {
    const owned = this.#stores.groups.ownedBy(owner.metadata.uid ?? "").map(groupViewOf);
    return {
      groups: owned.flatMap((each) => (each.kind === "ok" ? each.value : [])),
      unreadable: owned.flatMap((each) => (each.kind === "refused" ? each.title : [])),
    };
  }

  /** Where the groups of an owner are, and why the others are nowhere. */
  placesOf(owner: KubeObject): { placed: Placed[]; waiting: Unplaced[] } {
    const all = this.places();
    const placed: Placed[] = [];
    const waiting: Unplaced[] = [];
    const groups = this.#stores.groups.ownedBy(owner.metadata.uid ?? "").map(groupOf);
    for (const group of groups.toSorted((one, other) => one.spec.ordinal - other.spec.ordinal)) {
      const key = `${group.metadata.namespace}/${group.metadata.name}`;
      const named = { group: group.metadata.name, plan: group.spec.plan };
      const seats = all.get(key);
      if (seats !== undefined) placed.push({ ...named, seats, isNew: !this.#bound.has(key) });
      else {
        const place = this.#gangs.placeOf(key, recordOf(group).incarnation, this.nowMs);
        waiting.push({ ...named, ...(place.kind === "reserved" ? { code: "binding", text: "it is bound" } : place) });
      }
    }
    return { placed, waiting };
  }

  /** Seats of every gang of which a pod is bound, by `namespace/name` of the group. */
  places(): Map<string, Seat[]> {
    const byGroup = new Map<string, Seat[]>();
    const pods = [...this.#stores.pods.all()].flatMap((object) => gangPod(object) ?? []);
    for (const { group, worker, node, devices, state } of pods.toSorted((one, other) => one.worker - other.worker)) {
      if (state !== "bound") continue;
      const seats = byGroup.get(group) ?? [];
      const firstRank = seats.reduce((sum, seat) => sum + seat.devices, 0);
      byGroup.set(group, [...seats, { worker, node, devices, firstRank }]);
    }
    return byGroup;
  }

  /** S2, in the order of the ledger. Answers whether a gang was bound. */
  settle(): boolean {
    let hasMoved = false;
    for (const group of this.#waiting()) {
      const key = `${group.metadata.namespace}/${group.metadata.name}`;
      const { incarnation, begun } = recordOf(group);
      const place = begun
        ? this.#gangs.placeOf(key, incarnation, this.nowMs)
        : this.#gangs.ask(key, incarnation, this.nowMs).place;
      if (place.kind === "reserved" && this.#bind(key, place.reservation)) hasMoved = true;
    }
    return hasMoved;
  }

  #waiting(): ReplicaGroup[] {
    const wishes = [...this.#stores.groups.all()].flatMap((object) => {
      const view = groupViewOf(object);
      if (view.kind === "refused" || view.value.isLeaving || view.value.spec.state === "Draining") return [];
      const group = groupOf(object);
      const wish = this.#wishOf(group);
      return wish === undefined ? [] : [{ group, priority: wish.priority, key: keyOfObject(object) }];
    });
    const born = ({ metadata }: ReplicaGroup): number => Date.parse(metadata.creationTimestamp ?? "") || 0;
    return wishes
      .toSorted(
        (one, other) =>
          other.priority - one.priority || born(one.group) - born(other.group) || (one.key < other.key ? -1 : 1),
      )
      .map(({ group }) => group);
  }

  #bind(key: string, reservation: Reservation): boolean {
    const object = this.#stores.groups.get(key);
    const wish = object && this.#wishOf(groupOf(object));
    if (object === undefined || wish === undefined) return false;
    const { incarnation, seats, sinceMs } = reservation;
    const annotations = { [SEATS]: seatsText(seats), [RESERVED_AT]: new Date(sinceMs).toISOString() };
    let hasMoved = false;
    for (const { worker, node } of seats) {
      const name = podName({ group: object, incarnation, worker });
      const there = this.#stores.pods.get(`${object.metadata.namespace}/${name}`);
      if (there !== undefined && podFacts(there).node !== "") continue;
      const pod = there ?? wish.podOf(object, incarnation, worker);
      const spec = { ...fieldsOf(pod.spec), nodeName: node, schedulingGates: [] };
      this.add("pods", { ...pod, metadata: { ...pod.metadata, annotations }, spec, status: { phase: "Running" } });
      hasMoved = true;
    }
    if (!hasMoved) return false;
    const record = { ...recordOf(groupOf(object)), incarnation, begun: true };
    const placement = this.places()
      .get(key)
      ?.map(({ worker, node, devices, firstRank }) => {
        return { worker, node, pod: podName({ group: object, incarnation, worker }), firstRank, ranks: devices };
      });
    const status = { ...fieldsOf(withRecord(object.status, record)), phase: "Serving", placement };
    this.#put("groups", { ...object, status });
    return true;
  }

  /** Newer than all that the server has: a store takes nothing older than it knows. */
  #put(kind: (typeof KINDS)[number], object: KubeObject): void {
    this.#version += 1n;
    this.#stores[kind].learn({ ...object, metadata: { ...object.metadata, resourceVersion: String(this.#version) } });
  }

  #wishOf(group: ReplicaGroup): GroupWish | undefined {
    const { namespace } = group.metadata;
    const { kind, name } = group.spec.owner;
    const plan = this.#stores.plans.get(`${namespace}/${group.spec.plan}`);
    const owner = this.ownerAt(kind, `${namespace}/${name}`);
    const stored = plan === undefined ? undefined : storedPlanOf(plan);
    const order = owner === undefined ? undefined : orderOf(owner);
    if (stored?.kind !== "ok" || order === undefined) return undefined;
    return wishOf(group, stored.value.spec, order, TEMPLATE);
  }
}

// A small cluster in memory for the reservation ledger: nodes, pods of others, gangs, a scheduler that binds what is open and a
// controller that applies decisions patch by patch and may die between any two. Real objects go through the real readers and
// builders; only the server is missing. Seeded, no time but its own.
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { fieldsOf, listOf } from "../../../../controller/kube/api/fields.ts";
import { type GangPod, gangKey, gangPod, type Reservation } from "../../../../controller/kube/gangs/gang-pods.ts";
import {
  type GangDecision,
  type GangLimits,
  type GangStep,
  type GangWish,
  type GangWorld,
  type Ledger,
  step,
} from "../../../../controller/kube/gangs/reservations.ts";
import { openingOf, workerPod } from "../../../../controller/kube/groups/pods.ts";
import { type GpuNode, inventoryOf } from "../../../../controller/kube/inventory/inventory.ts";
import { jsonPatch } from "../../../sim/patches.ts";
import { planOf, replicaGroup, TEMPLATE } from "../groups/groups.ts";
import { H200, node, pod } from "../objects.ts";

export type NodeState = { gpus: number; zone: string; clique: string; isThere: boolean; isCordoned: boolean };
export type Wish = Omit<GangWish, "incarnation"> & { incarnation: bigint };

/** Patches and deletes that are decided and not done yet. */
type Chore = { kind: "open"; name: string; reservation: Reservation } | { kind: "delete"; key: string };

export class GangCluster {
  nowMs = 0;
  readonly limits: GangLimits;
  readonly nodes = new Map<string, NodeState>();
  readonly wishes = new Map<string, Wish>();
  readonly pods = new Map<string, KubeObject>();
  readonly foreign = new Map<string, KubeObject>();
  readonly chores: Chore[] = [];
  /** A group that goes and comes again is another one: its incarnations go on. */
  readonly #begun = new Map<string, bigint>();
  memory: Ledger = new Map();
  last: GangStep | undefined;

  constructor(limits: GangLimits) {
    this.limits = limits;
  }

  world(): GangWorld {
    const nodes = [...this.nodes].flatMap(([name, state]) => (state.isThere ? [this.#node(name, state)] : []));
    const pods = [...this.pods.values()];
    const view = inventoryOf({ nodes, pods: [...pods, ...this.foreign.values()], slices: [] });
    return { nowMs: this.nowMs, nodes: view.nodes, wishes: [...this.wishes.values()], pods: this.gangPods() };
  }

  #node(name: string, { gpus, zone, clique, isCordoned }: NodeState): KubeObject {
    const labels = {
      ...H200,
      "topology.kubernetes.io/zone": zone,
      ...(clique ? { "nvidia.com/gpu.clique": clique } : {}),
    };
    return node(name, { gpus, labels, unschedulable: isCordoned });
  }

  gangPods(): GangPod[] {
    return [...this.pods.values()].flatMap((each) => gangPod(each) ?? []);
  }

  free(name: string): number {
    return this.world().nodes.find((each: GpuNode) => each.name === name)?.free ?? 0;
  }

  wish(group: string, devices: number[], more: Partial<Wish> = {}): void {
    const base = { priority: 0, sinceMs: this.nowMs, selection: {}, within: "any", failedOn: {} } as const;
    const key = `models/${group}`;
    const incarnation = (this.#begun.get(key) ?? 0n) + 1n;
    this.#begun.set(key, incarnation + 1000n);
    this.wishes.set(key, { group: key, incarnation, devices, ...base, ...more });
  }

  /** What the reconciler does: the pods of the wished incarnation, all that are missing while none has run. */
  createPods(key: string, count = Number.POSITIVE_INFINITY): void {
    const wish = this.wishes.get(key);
    if (wish === undefined) return;
    const mine = this.gangPods().filter((each) => each.group === key);
    if (mine.some((each) => each.incarnation !== wish.incarnation || each.state !== "waiting")) return;
    const perWorker = wish.devices[0] ?? 0;
    const plan = planOf(wish.devices.length, perWorker);
    const group = replicaGroup(key.slice("models/".length));
    const missing = wish.devices.flatMap((_, worker) => (mine.some((each) => each.worker === worker) ? [] : [worker]));
    for (const worker of missing.slice(0, count)) {
      const who = {
        group,
        owner: { kind: "ModelDeployment", name: "chat" },
        planName: "p",
        plan,
        incarnation: wish.incarnation,
        worker,
      } as const;
      const built = workerPod(who, TEMPLATE);
      const stored: KubeObject = {
        ...built,
        metadata: { ...built.metadata, resourceVersion: "1" },
        status: { phase: "Pending" },
      };
      this.pods.set(built.metadata.name, stored);
    }
  }

  decide(): GangStep {
    const made = step(this.memory, this.world(), this.limits);
    this.memory = made.ledger;
    this.last = made;
    for (const decision of made.decisions) this.#todo(decision);
    return made;
  }

  #todo(decision: GangDecision): void {
    const key = gangKey(decision);
    if (decision.kind === "release") {
      for (let index = this.chores.length - 1; index >= 0; index--) {
        const chore = this.chores[index];
        if (chore?.kind === "open" && gangKey(chore.reservation) === key) this.chores.splice(index, 1);
      }
      if (!this.chores.some((chore) => chore.kind === "delete" && chore.key === key))
        this.chores.push({ kind: "delete", key });
      for (const name of decision.blamed) this.#blame(decision.group, name);
      const wish = this.wishes.get(decision.group);
      if (wish?.incarnation === decision.incarnation)
        this.wishes.set(decision.group, { ...wish, incarnation: wish.incarnation + 1n });
      return;
    }
    if (decision.kind !== "reserve") return;
    const { kind: _, ...reservation } = decision;
    for (const each of this.gangPods())
      if (gangKey(each) === key) this.chores.push({ kind: "open", name: each.name, reservation });
  }

  #blame(group: string, name: string): void {
    const wish = this.wishes.get(group);
    if (wish)
      this.wishes.set(group, { ...wish, failedOn: { ...wish.failedOn, [name]: (wish.failedOn[name] ?? 0) + 1 } });
  }

  /** One patch or delete of those that wait. */
  doChore(index: number): void {
    const [chore] = this.chores.splice(index % Math.max(1, this.chores.length), 1);
    if (chore?.kind === "delete") {
      for (const each of this.gangPods()) if (gangKey(each) === chore.key) this.pods.delete(each.name);
    }
    if (chore?.kind !== "open") return;
    const seen = this.pods.get(chore.name);
    const worker = seen === undefined ? undefined : gangPod(seen);
    if (seen === undefined || worker?.state !== "waiting") return;
    const patched = jsonPatch(seen, openingOf(seen, worker.worker, chore.reservation));
    this.pods.set(chore.name, { ...seen, ...fieldsOf(patched) });
  }

  /** The controller dies: what was decided and not done is forgotten. */
  restart(): void {
    this.memory = new Map();
    this.chores.length = 0;
  }

  /** The scheduler: binds one open pod where it fits. It knows what is bound, and nothing of reservations. */
  bind(index: number): void {
    const open = this.gangPods().filter(({ state }) => state === "released");
    const chosen = open[index % Math.max(1, open.length)];
    const object = chosen === undefined ? undefined : this.pods.get(chosen.name);
    if (chosen === undefined || object === undefined) return;
    const spec = fieldsOf(object.spec);
    const terms = fieldsOf(
      fieldsOf(fieldsOf(spec.affinity).nodeAffinity).requiredDuringSchedulingIgnoredDuringExecution,
    ).nodeSelectorTerms;
    const [field] = listOf(fieldsOf(listOf(terms)[0]).matchFields).map(fieldsOf);
    const name = String(listOf(field?.values)[0]);
    const state = this.nodes.get(name);
    if (!state?.isThere || state.isCordoned || this.free(name) < chosen.devices) return;
    this.pods.set(chosen.name, { ...object, spec: { ...spec, nodeName: name }, status: { phase: "Running" } });
  }

  /** A pod of somebody else comes; the scheduler gives it GPUs that are only reserved as well. */
  addForeign(id: string, name: string, gpus: number): void {
    const state = this.nodes.get(name);
    if (!state?.isThere || state.isCordoned || this.free(name) < gpus) return;
    this.foreign.set(id, pod(id, { gpus, node: name }));
  }

  /** The node controller: pods of a node that has gone go with it. */
  removeNode(name: string): void {
    const state = this.nodes.get(name);
    if (state) state.isThere = false;
    for (const set of [this.pods, this.foreign])
      for (const [key, each] of set) if (fieldsOf(each.spec).nodeName === name) set.delete(key);
  }

  endPod(index: number): void {
    const names = [...this.pods.keys()];
    const name = names[index % Math.max(1, names.length)];
    const object = name === undefined ? undefined : this.pods.get(name);
    if (name && object && fieldsOf(object.spec).nodeName)
      this.pods.set(name, { ...object, status: { phase: "Failed" } });
  }
}

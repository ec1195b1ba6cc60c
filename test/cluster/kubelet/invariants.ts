// What must hold of a real cluster at every event of its watches, whatever dies or goes wrong. Owns the rules and what of the
// past they need; asks nobody: it is fed. Streams of two kinds come in no common order, so a rule over two kinds has a bound.
//
//   D1  pods that are bound and have not ended never hold more GPUs than their node has.
//   D2  pods whose gate is open are promised no GPU that is bound or promised to another, for longer than `overdrawnMs`; each
//       has its seat, and is bound where that says.
//   D3  nobody says anew that an incarnation serves of which a pod has ended or gone `servingMs` ago; nobody who has led so long
//       writes it again; nor does it stay so for `staleMs` while one controller leads.
//   D4  no gang of which pods are open is a half for longer than `halfMs` while one controller leads.
//   D5  incarnations and restarts never shrink; a group has restarted at most `restartsMax` times.
//   D6  pods that live in one group are of one plan, which is their group's; two incarnations are never open at once.
//   D7  plan, owner and ordinal of a group and the whole of a ShardPlan never change.
import { isDeepStrictEqual } from "node:util";
import { LABELS } from "../../../controller/api/meta.ts";
import type { KubeObject } from "../../../controller/kube/api/client.ts";
import { fieldsOf, textOf } from "../../../controller/kube/api/fields.ts";
import { type GangPod, gangKey, gangPod } from "../../../controller/kube/gangs/gang-pods.ts";
import { groupOf } from "../../../controller/kube/groups/group-record.ts";
import { nodeFacts } from "../../../controller/kube/inventory/node-facts.ts";
import { podFacts } from "../../../controller/kube/inventory/pod-facts.ts";

export const WATCHED = ["nodes", "shardplans", "replicagroups", "modeldeployments", "pods", "leases"] as const;
export type Watched = (typeof WATCHED)[number];
export type Seen = { kind: Watched; type: "ADDED" | "MODIFIED" | "DELETED"; object: KubeObject; atMs: number };
export type Bounds = { servingMs: number; staleMs: number; halfMs: number; overdrawnMs: number };

/** Kept of what has gone: more than any test makes. */
const PAST_MAX = 1_000;

export class Invariants {
  readonly broken: string[] = [];
  /** Restarts that any group may have had by now. */
  restartsMax = 0;
  restartsSeen = 0;
  /** How often each was looked at in a world in which it could have been broken. */
  readonly met = { D1: 0, D2: 0, D3: 0, D4: 0, D5: 0, D6: 0, D7: 0 };
  readonly #bounds: Bounds;
  readonly #all = new Map(WATCHED.map((kind) => [kind, new Map<string, KubeObject>()]));
  /** When a pod of an incarnation (uid of its group, incarnation) was first seen ended, leaving or gone. */
  readonly #ended = new Map<string, { atMs: number; what: string }>();
  readonly #since = new Map<string, number>();
  #ledSinceMs = 0;

  constructor(bounds: Bounds) {
    this.#bounds = bounds;
  }

  /** Nobody may have led, or been able to: the server or the leader was away. What has lasted begins anew. */
  pardon(atMs: number): void {
    this.#ledSinceMs = Math.max(this.#ledSinceMs, atMs);
  }

  objects(kind: Watched): KubeObject[] {
    return [...(this.#all.get(kind)?.values() ?? [])];
  }

  see({ kind, type, object, atMs }: Seen): void {
    const all = this.#all.get(kind);
    const key = `${object.metadata.namespace ?? ""}/${object.metadata.name}`;
    const before = all?.get(key);
    const isSame = before?.metadata.uid === object.metadata.uid;
    if (type === "DELETED") all?.delete(key);
    else all?.set(key, object);
    if (kind === "leases") this.#seeLease(before, object, atMs);
    if (kind === "pods") this.#seePod(object, type === "DELETED", atMs);
    if (kind === "replicagroups" && type !== "DELETED") this.#seeGroup(isSame ? before : undefined, object, atMs);
    if (kind === "shardplans" && type === "MODIFIED" && isSame) this.#seePlan(before, object, atMs);
    this.look(atMs);
  }

  /** What lasts, with no event either. */
  look(atMs: number): void {
    const pods = this.objects("pods");
    const gangPods = pods.flatMap((pod) => gangPod(pod) ?? []);
    this.#checkGpus(pods, atMs);
    this.#checkPromises(pods, gangPods, atMs);
    this.#checkHalves(gangPods, atMs);
    this.#checkGroups(pods, atMs);
  }

  #fail(text: string, atMs: number): void {
    const said = `${new Date(atMs).toISOString()} ${text}`;
    if (this.broken.length < PAST_MAX) this.broken.push(said);
  }

  #seeLease(before: KubeObject | undefined, lease: KubeObject, atMs: number): void {
    const holder = (object: KubeObject | undefined) => textOf(fieldsOf(object?.spec).holderIdentity);
    if (holder(before) !== holder(lease)) this.#ledSinceMs = atMs;
  }

  #seePod(object: KubeObject, isGone: boolean, atMs: number): void {
    const pod = gangPod(object);
    if (pod === undefined || !(isGone || pod.state === "over" || pod.isLeaving)) return;
    // By the group's uid: another one may have had its name.
    const key = `${object.metadata.ownerReferences?.[0]?.uid}#${pod.incarnation}`;
    const what = `${pod.name} ${isGone ? "was gone" : pod.state === "over" ? "had ended" : "was leaving"}`;
    if (!this.#ended.has(key)) this.#ended.set(key, { atMs, what });
    const [oldest] = this.#ended.keys();
    if (this.#ended.size > PAST_MAX && oldest !== undefined) this.#ended.delete(oldest);
  }

  /** D3 as to writes, D5, D7. */
  #seeGroup(before: KubeObject | undefined, object: KubeObject, atMs: number): void {
    const { name } = object.metadata;
    const { spec, status } = groupOf(object);
    const record = status?.record;
    if (status?.phase === "Serving") {
      const ended = this.#ended.get(incarnationKey(object));
      this.met.D3 += 1;
      const isWritten = !isDeepStrictEqual(before?.status, object.status);
      const isAnew = fieldsOf(before?.status).phase !== "Serving";
      const knownMs = isAnew ? ended?.atMs : Math.max(ended?.atMs ?? 0, this.#ledSinceMs);
      if (isWritten && ended !== undefined && knownMs !== undefined && atMs - knownMs > this.#bounds.servingMs)
        this.#fail(`D3: ${name} is said to serve ${atMs - ended.atMs} ms after ${ended.what}`, atMs);
    }
    const restarts = Math.max(status?.restarts ?? 0, record?.restarts ?? 0);
    this.restartsSeen = Math.max(this.restartsSeen, restarts);
    if (restarts > this.restartsMax)
      this.#fail(
        `D5: ${name} has restarted ${restarts} times, ${this.restartsMax} allowed: ${record?.failures.at(-1)?.detail}`,
        atMs,
      );
    if (before === undefined) return;
    this.met.D5 += 1;
    const was = groupOf(before);
    const numbers = [
      ["incarnation", was.status?.incarnation, status?.incarnation],
      ["restarts", was.status?.restarts, status?.restarts],
      ["record.incarnation", was.status?.record?.incarnation, record?.incarnation],
      ["record.restarts", was.status?.record?.restarts, record?.restarts],
    ] as const;
    for (const [what, last = 0, now = 0] of numbers)
      if (now < last) this.#fail(`D5: ${what} of ${name} went back from ${last} to ${now}`, atMs);
    this.met.D7 += 1;
    const fixed = (each: typeof spec) => ({ plan: each.plan, owner: each.owner, ordinal: each.ordinal });
    if (!isDeepStrictEqual(fixed(was.spec), fixed(spec)))
      this.#fail(`D7: ${name} was ${JSON.stringify(was.spec)}, now ${JSON.stringify(spec)}`, atMs);
  }

  /** D7. */
  #seePlan(before: KubeObject | undefined, { metadata, spec }: KubeObject, atMs: number): void {
    this.met.D7 += 1;
    if (!isDeepStrictEqual(before?.spec, spec)) this.#fail(`D7: ShardPlan ${metadata.name} has changed`, atMs);
  }

  /** D1: one stream, so without a bound. */
  #checkGpus(pods: readonly KubeObject[], atMs: number): void {
    const held = new Map<string, number>();
    for (const { node, gpus, isOver } of pods.map(podFacts))
      if (node !== "" && !isOver) held.set(node, (held.get(node) ?? 0) + gpus);
    for (const { name, gpus } of this.objects("nodes").map(nodeFacts)) {
      const here = held.get(name) ?? 0;
      if (here > 0) this.met.D1 += 1;
      if (here > gpus) this.#fail(`D1: pods hold ${here} of ${gpus} GPUs of ${name}`, atMs);
    }
  }

  /** D2. */
  #checkPromises(pods: readonly KubeObject[], gangPods: readonly GangPod[], atMs: number): void {
    const promised = new Map<string, number>();
    const add = (node: string, gpus: number) => promised.set(node, (promised.get(node) ?? 0) + gpus);
    for (const pod of pods) {
      const { node, gpus, isOver } = podFacts(pod);
      if (gangPod(pod) === undefined && node !== "" && !isOver) add(node, gpus);
    }
    for (const { name, state, node, worker, devices, written } of gangPods) {
      if (state !== "released" && state !== "bound") continue;
      const seat = written?.seats.find((each) => each.worker === worker);
      if (seat === undefined) this.#fail(`D2: ${name} is open without a seat`, atMs);
      else if (node !== "" && node !== seat.node) this.#fail(`D2: ${name} is on ${node}, its seat ${seat.node}`, atMs);
      add(node || (seat?.node ?? ""), devices);
    }
    for (const { name, gpus } of this.objects("nodes").map(nodeFacts)) {
      const here = promised.get(name) ?? 0;
      if (here > 0) this.met.D2 += 1;
      const isOver = here > gpus;
      const lastedMs = this.#lasts(`D2 ${name}`, isOver, atMs);
      if (isOver && lastedMs >= this.#bounds.overdrawnMs)
        this.#fail(`D2: ${here} of ${gpus} GPUs of ${name} are promised for ${lastedMs} ms`, atMs);
    }
  }

  /** D4, and of D6 that one incarnation is open. */
  #checkHalves(gangPods: readonly GangPod[], atMs: number): void {
    const open = new Map<string, string>();
    const keys = new Set<string>();
    for (const [key, members] of Map.groupBy(gangPods, gangKey)) {
      const size = Math.max(...members.map(({ written }) => written?.seats.length ?? 1));
      const living = members.filter(
        ({ state, isLeaving }) => (state === "released" || state === "bound") && !isLeaving,
      );
      if (living.length > 0) this.met.D4 += 1;
      const whole = living.filter(({ state }) => state === "bound").length;
      const isHalf = living.length > 0 && whole < size;
      keys.add(`D4 ${key}`);
      const lastedMs = this.#lasts(`D4 ${key}`, isHalf, atMs);
      if (isHalf && this.#stands(`D4 ${key}`, atMs) > this.#bounds.halfMs)
        this.#fail(`D4: ${whole} of ${size} pods of ${key} are there for ${lastedMs} ms`, atMs);
      const [{ group } = { group: "" }] = living;
      const other = open.get(group);
      if (other !== undefined) this.#fail(`D6: ${other} and ${key} are open at once`, atMs);
      if (living.length > 0) open.set(group, key);
    }
    for (const key of this.#since.keys()) if (key.startsWith("D4") && !keys.has(key)) this.#since.delete(key);
  }

  /** D3 as to what stands, and of D6 that plans are one. */
  #checkGroups(pods: readonly KubeObject[], atMs: number): void {
    for (const object of this.objects("replicagroups")) {
      const { name, uid } = object.metadata;
      const { spec, status } = groupOf(object);
      const ended = this.#ended.get(incarnationKey(object));
      const isStale = status?.phase === "Serving" && ended !== undefined;
      this.#lasts(`D3 ${name}`, isStale, atMs);
      const staysMs = this.#stands(`D3 ${name}`, atMs);
      if (isStale && staysMs > this.#bounds.staleMs)
        this.#fail(`D3: ${name} is still said to serve ${staysMs} ms after ${ended.what}`, atMs);
      const plans = pods
        .filter((pod) => pod.metadata.ownerReferences?.some((owner) => owner.uid === uid) && !podFacts(pod).isOver)
        .map(({ metadata }) => metadata.labels?.[LABELS.plan]);
      if (plans.length > 0) this.met.D6 += 1;
      const strange = plans.find((plan) => plan !== spec.plan);
      if (strange !== undefined) this.#fail(`D6: a pod of ${name} is of ${strange}, the group of ${spec.plan}`, atMs);
    }
  }

  /** How long it has been so; 0 where it is not, or has just begun. */
  #lasts(key: string, isSo: boolean, atMs: number): number {
    if (!isSo) {
      this.#since.delete(key);
      return 0;
    }
    const sinceMs = this.#since.get(key) ?? atMs;
    this.#since.set(key, sinceMs);
    return atMs - sinceMs;
  }

  /** How long it has been so while one controller led, who could have ended it. */
  #stands(key: string, atMs: number): number {
    const sinceMs = this.#since.get(key);
    return sinceMs === undefined ? 0 : atMs - Math.max(sinceMs, this.#ledSinceMs);
  }
}

/** The one that the status shows, as in `#ended`. */
function incarnationKey(object: KubeObject): string {
  return `${object.metadata.uid}#${groupOf(object).status?.incarnation ?? 0}`;
}

// What must hold of a cluster at every change of the truth, whatever controllers, people and networks do. Owns the rules and
// what of the past they need; changes nothing.
//
//   J1  pods that are bound never hold more GPUs than their node has.
//   J2  open reservations of ours never promise a GPU twice; a write of a leader that was replaced, which lands within
//       `lateMs` of the next one's beginning, may do so until that one has given one back, for `overdrawnMs` at most, and then
//       J1 still holds.
//   J3  no open gang is a half for longer than T and `slackMs`, while somebody leads without a break.
//   J4  incarnations only grow; none begins after the group has given up, or with pods of its own; the gate of a pod opens
//       with a seat only.
//   J5  all pods of a group are of its plan, and of one generation of workers: no worker starts beside one of another (SimPods).
//   J6  a Load reaches workers of the record's incarnation alone.
import { LABELS } from "../../../../controller/api/meta.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { nodes, pods, replicaGroups } from "../../../../controller/kube/api/resources.ts";
import { gangKey, gangPod } from "../../../../controller/kube/gangs/gang-pods.ts";
import { groupOf, recordOf } from "../../../../controller/kube/groups/group-record.ts";
import { nodeFacts } from "../../../../controller/kube/inventory/node-facts.ts";
import { podFacts } from "../../../../controller/kube/inventory/pod-facts.ts";
import { hasGivenUp } from "../../../../controller/reconcile/decide.ts";
import { defaultLimits } from "../../../../controller/reconcile/limits.ts";
import type { SimApiServer } from "../../../sim/api-server.ts";
import type { Change } from "../../../sim/object-log.ts";
import { seatOf } from "../../../sim/scheduling.ts";
import type { VirtualClock } from "../../../sim/virtual-clock.ts";

export type InvariantOptions = {
  server: SimApiServer;
  time: VirtualClock;
  wholeMs: number;
  slackMs: number;
  overdrawnMs: number;
  lateMs: number;
  /** Since when one process has led without a break; undefined: nobody leads. */
  ledSinceMs: () => number | undefined;
};

export class Invariants {
  readonly broken: string[] = [];
  /** How often each was looked at in a world where it could have been broken. */
  readonly met = { gpus: 0, reservations: 0, halves: 0, oldHalves: 0, records: 0 };
  readonly #options: InvariantOptions;
  /** What is so and may not last: since when. Made anew at every look, from the one before. */
  #since = new Map<string, number>();
  #before = new Map<string, number>();

  constructor(options: InvariantOptions) {
    this.#options = options;
    options.server.onChange((change) => this.#see(change));
  }

  fail(text: string): void {
    this.broken.push(`at ${this.#options.time.nowMs()}: ${text}`);
  }

  /** J6. */
  checkLoad(group: string, incarnation: bigint): void {
    const object = this.#options.server
      .objects(replicaGroups)
      .find((each) => `${each.metadata.namespace}/${each.metadata.name}` === group);
    if (object === undefined) return;
    const record = recordOf(groupOf(object));
    if (record.incarnation !== incarnation)
      this.fail(
        `J6: a worker of incarnation ${incarnation} of ${group} gets a Load, the record is at ${record.incarnation}`,
      );
  }

  #see({ resource, before, after }: Change): void {
    if (resource.plural === "replicagroups" && after !== undefined) this.#checkRecord(before, after);
    if (resource.plural !== "pods") return;
    this.look();
    if (after !== undefined && before === undefined) this.#checkPlan(after);
  }

  /** At every change of pods, and whenever time has gone on: what lasts too long may last in silence. */
  look(): void {
    const all = this.#options.server.objects(pods);
    this.#before = this.#since;
    this.#since = new Map();
    this.#checkGpus(all);
    this.#checkHalves(all);
  }

  #checkGpus(all: readonly KubeObject[]): void {
    const bound = new Map<string, number>();
    const ours = new Map<string, number>();
    const add = (to: Map<string, number>, node: string, gpus: number) => to.set(node, (to.get(node) ?? 0) + gpus);
    for (const object of all) {
      const { node, gpus, isOver, name } = podFacts(object);
      if (node !== "" && !isOver) add(bound, node, gpus);
      const pod = gangPod(object);
      if (pod === undefined || pod.state === "over" || pod.state === "waiting") continue;
      const at = node || (seatOf(object) ?? "");
      if (at === "" || pod.written === undefined) this.fail(`J4: ${name} is open without a seat`);
      add(ours, at, gpus);
    }
    for (const object of this.#options.server.objects(nodes)) {
      const { name, gpus } = nodeFacts(object);
      const [held, promised] = [bound.get(name) ?? 0, ours.get(name) ?? 0];
      if (held > 0) this.met.gpus += 1;
      if (promised > 0) this.met.reservations += 1;
      if (held > gpus) this.fail(`J1: pods hold ${held} of ${gpus} GPUs of ${name}`);
      const text = `J2: ${promised} of ${gpus} GPUs of ${name} are promised`;
      if (promised > gpus) this.#lasts(name, text, this.#overdrawnMs(name));
    }
  }

  /** What begins when nothing of a leader before can land any more is the work of this one. */
  #overdrawnMs(node: string): number {
    const { time, ledSinceMs, lateMs, overdrawnMs } = this.#options;
    const isOwn = time.nowMs() - (ledSinceMs() ?? Number.POSITIVE_INFINITY) > lateMs;
    return isOwn && !this.#before.has(node) ? 0 : overdrawnMs;
  }

  #checkHalves(all: readonly KubeObject[]): void {
    const gangs = Map.groupBy(
      all.flatMap((pod) => gangPod(pod) ?? []),
      gangKey,
    );
    for (const [key, members] of gangs) {
      const size = Math.max(...members.map(({ written }) => written?.seats.length ?? 1));
      const isOpen = members.some(({ state, isLeaving }) => (state === "released" || state === "bound") && !isLeaving);
      const count = members.filter(({ state }) => state === "bound").length;
      if (!isOpen) continue;
      this.met.halves += 1;
      const { wholeMs, slackMs } = this.#options;
      const text = `J3: ${count} of ${size} pods of ${key} are bound`;
      if (count < size && this.#lasts(key, text, wholeMs + slackMs) > wholeMs) this.met.oldHalves += 1;
    }
  }

  /** J5. */
  #checkPlan({ metadata }: KubeObject): void {
    const group = this.#options.server
      .objects(replicaGroups)
      .find(({ metadata: { uid } }) => uid === metadata.ownerReferences?.[0]?.uid);
    if (group === undefined || metadata.labels?.[LABELS.group] === undefined) return;
    const { plan } = groupOf(group).spec;
    if (metadata.labels[LABELS.plan] !== plan)
      this.fail(`J5: ${metadata.name} is of plan ${metadata.labels[LABELS.plan]}, its group of ${plan}`);
  }

  /** J4. */
  #checkRecord(before: KubeObject | undefined, after: KubeObject): void {
    const is = recordOf(groupOf(after));
    const was = before === undefined ? undefined : recordOf(groupOf(before));
    if (was === undefined) return;
    this.met.records += 1;
    const { name } = after.metadata;
    if (is.incarnation < was.incarnation)
      this.fail(`J4: the record of ${name} went back from ${was.incarnation} to ${is.incarnation}`);
    if (is.incarnation === was.incarnation && was.begun && !is.begun)
      this.fail(`J4: incarnation ${is.incarnation} of ${name} had begun, and has not`);
    if (is.restarts < was.restarts) this.fail(`J4: the restarts of ${name} went back`);
    const said = groupOf(after).status?.restarts ?? 0;
    if (said > is.restarts) this.fail(`J4: ${name} says ${said} restarts, its record knows of ${is.restarts}`);
    const isNew = is.begun && !was.begun;
    if (isNew && is.revision === was.revision && hasGivenUp(was.failures, defaultLimits))
      this.fail(`J4: ${name} begins anew after it has given up`);
    if (
      isNew &&
      this.#options.server
        .objects(pods)
        .some((pod) => isOwned(pod, after) && gangPod(pod)?.incarnation === is.incarnation)
    )
      this.fail(`J4: incarnation ${is.incarnation} of ${name} begins with pods that are there already`);
  }

  /** For longer than the bound, since somebody leads who could end it. Answers for how long it is so. */
  #lasts(id: string, what: string, boundMs: number): number {
    const nowMs = this.#options.time.nowMs();
    const sinceMs = Math.max(this.#before.get(id) ?? nowMs, this.#options.ledSinceMs() ?? nowMs);
    this.#since.set(id, sinceMs);
    if (nowMs - sinceMs > boundMs || boundMs === 0) this.fail(`${what} for ${nowMs - sinceMs} ms`);
    return nowMs - sinceMs;
  }
}

const isOwned = ({ metadata }: KubeObject, owner: KubeObject): boolean =>
  metadata.ownerReferences?.some(({ uid }) => uid === owner.metadata.uid) ?? false;

// Cluster over pods, for one ReplicaGroup: the same reconciler as over local processes. Owns what the reconciler's actions
// mean in objects of the API server, and what those objects mean as workers; decides nothing about incarnations.
//
//   P1  a pod's incarnation is in its labels and never changes; one that is not the record's is never counted, only ended.
//   P2  an incarnation is recorded as begun only while the ledger has a place for all of it, what stands beside its pods is
//       there and the server would take one of them (dry run); its pods are created after that, closed.
//   P3  gates open only when all pods of the incarnation exist and the ledger holds the reservation of the whole: one patch
//       for each, refused where the pod is not the one that was looked at.
//   P4  starting goes on by observing: a controller that dies at any line is followed by one that sees pods and record, and
//       carries on or gives back. What fails for a moment is tried again at the next look and is said meanwhile.
//   P5  what has never run when its bound is over (a place: T of the ledger; a start: PULL_MS) counts as ended.
//   P6  an answer of any other pod is silence (worker-identity.ts).
//   P7  a worker whose node is not Ready and that does not answer counts as ended at once; either alone is no death.
import { isDeepStrictEqual } from "node:util";
import type { LoadRequest } from "../../../proto/gen/muster/v1/worker.ts";
import type { Inventory } from "../../plan/hardware.ts";
import {
  type Action,
  type Cluster,
  type GroupRecord,
  type GroupSeen,
  type StepsSeen,
  type WorkerName,
  type WorkerSeen,
  workerTitle,
} from "../../reconcile/cluster.ts";
import type { KubeApi, KubeObject } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import type { GangStores, Gangs, GroupWish, Place } from "../gangs/gang.ts";
import { gangPod } from "../gangs/gang-pods.ts";
import { blamedOf, NodeWatch } from "../inventory/node-watch.ts";
import { writeRecord } from "../status/record-write.ts";
import { Alarm } from "../watch/alarm.ts";
import { isSuspicious } from "../workers/reports-board.ts";
import type { WorkerLinks } from "../workers/worker-link.ts";
import { targetOf, WorkerSight } from "../workers/worker-sight.ts";
import type { GroupBells } from "./group-bells.ts";
import { type BesideStores, GroupBeside } from "./group-beside.ts";
import { causeOfBeside, causeOfPlace, causeOfPods, causeOfTrouble } from "./group-cause.ts";
import { groupOf, recordOf, withRecord } from "./group-record.ts";
import { type OwnPod, PodStarter, unbornWorker } from "./pod-starter.ts";
import { type PodCause, podState } from "./pod-state.ts";
import type { StartLines } from "./start-lines.ts";

export type KubeClusterOptions = {
  /** `namespace/name` of the ReplicaGroup: what the reconciler calls its group. */
  group: string;
  api: KubeApi;
  stores: GangStores & BesideStores;
  gangs: Gangs;
  bells: GroupBells;
  /** Shared by all groups; default: nobody waits for others. */
  lines?: StartLines;
  links: WorkerLinks;
  clock: Clock;
  /** What the pods say has changed: between two changes of what the reconciler says. */
  onCause?: (cause: PodCause) => void;
  /** What the group's leader reports; undefined: nothing of this incarnation has been heard. */
  stepsOf?: (incarnation: bigint) => StepsSeen | undefined;
};

/** A reason of one's own: without one each ring would make an error with its stack. */
const RUNG = "rung";
/** After something failed that is no action's: the next look, if nothing changes before. */
const AGAIN_MS = 1_000;

type Look = { object: KubeObject; record: GroupRecord; wish: GroupWish; own: OwnPod[]; others: OwnPod[] };

export class KubeCluster implements Cluster {
  readonly #options: KubeClusterOptions;
  readonly #starter: PodStarter;
  readonly #beside: GroupBeside;
  readonly #nodes: NodeWatch;
  readonly #sight: WorkerSight;
  readonly #bells = new Set<() => void>();
  readonly #unsubscribe: () => void;
  readonly #closed = new AbortController();
  /** Workers that the reconciler has started and whose pod is still to be created, of `#wantedOf`. */
  readonly #wanted = new Set<number>();
  #wantedOf = -1n;
  /** The incarnation that this process has recorded as begun and seen no pod of: nothing of it can have run. */
  #begunHere = -1n;
  #uid: string | undefined;
  /** It has not begun, and looks at what there is to run on. */
  #isOpen = true;
  readonly #alarm: Alarm;
  /** `asked`: why it has not begun, while it asks; `seen`: why what has begun is not further. */
  #causes: { asked: PodCause | undefined; seen: PodCause | undefined } = { asked: undefined, seen: undefined };

  constructor(options: KubeClusterOptions) {
    const { api, stores, clock, links } = options;
    this.#options = options;
    const nowMs = () => clock.nowMs();
    this.#starter = new PodStarter({
      api,
      pods: stores.pods,
      nodes: stores.nodes,
      nowMs,
      onOpening: (pod, reservation) => options.gangs.opening(pod, reservation),
    });
    this.#nodes = new NodeWatch(stores.nodes);
    this.#beside = new GroupBeside({ api, stores, nowMs });
    this.#alarm = new Alarm(clock, this.#closed.signal, () => this.ring());
    this.#sight = new WorkerSight(links, nowMs);
    const ring = () => this.ring();
    const onNode = (node: KubeObject) => {
      if (this.#isOpen || this.#nodes.hasTurned(node)) this.ring();
    };
    this.#unsubscribe = options.bells.on(options.group, { ring, onNode });
    options.gangs.watch(options.group, { ring, isOpen: () => this.#isOpen, nowMs });
  }

  /** What the pods say of why the group is not further, as of the last look; for refineStatus. */
  get cause(): PodCause | undefined {
    return this.#causes.asked ?? this.#causes.seen;
  }

  /** Read when it is asked for: of thousands of nodes, and only one that has not begun asks. */
  async inventory(): Promise<Inventory> {
    const { wish } = this.#look();
    const { gangs } = this.#options;
    return {
      get nodes() {
        return gangs.inventory(wish).nodes;
      },
    };
  }

  async observe(group: string, signal: AbortSignal): Promise<GroupSeen> {
    if (group !== this.#options.group)
      throw new Error(`this is the cluster of ${this.#options.group}, not of ${group}`);
    const before = this.#look();
    const place = await this.#carryOn(before, signal);
    // Again: what was created and opened meanwhile has been learnt.
    const { record, wish, own, others } = this.#look();
    const nowMs = this.#options.clock.nowMs();
    const steps = record.begun ? this.#options.stepsOf?.(record.incarnation) : undefined;
    this.#nodes.look(own);
    const isSuspect = this.#nodes.isAnyLost || (steps !== undefined && isSuspicious(steps, nowMs));
    if (this.#nodes.isAnyLost) this.#alarm.at(nowMs + AGAIN_MS);
    this.#sight.keep(new Set([...own, ...others].map(({ object: { metadata } }) => metadata.uid ?? "")));
    const looks = [...own, ...others].map(({ object: pod, pod: { incarnation, worker } }) => {
      const isCurrent = incarnation === record.incarnation;
      return {
        name: { group, incarnation, worker },
        pod,
        port: wish.port,
        isCurrent,
        place: isCurrent ? place : undefined,
        nowMs,
        nodeLost: this.#nodes.lostOf(pod),
        isSuspect,
      };
    });
    // Those that have ended and are only to be swept away are not shown: nothing of them runs.
    const shown = looks.filter(({ isCurrent, pod }) => isCurrent || podState(pod).kind !== "ended");
    const workers = await Promise.all(shown.map((look) => this.#sight.see(look, signal)));
    workers.push(...this.#unborn(record, place, nowMs));
    this.#isOpen = !record.begun;
    this.#setCauses({ ...this.#causes, seen: this.#causeOf(own, record, place) });
    signal.throwIfAborted();
    return { group, record, workers, steps, blamed: blamedOf(place, workers) };
  }

  async apply(action: Action, signal: AbortSignal): Promise<void> {
    switch (action.kind) {
      case "record":
        return this.#record(action.replaces, action.record, signal);
      case "start-worker":
        return this.#start(action.name, signal);
      case "load-worker":
        return this.#load(action.name, action.request, signal);
      case "stop-worker":
        return this.#stop(action.name, action.graceMs, signal);
      default:
        throw new Error(`unreachable: action ${JSON.stringify(action satisfies never)}`);
    }
  }

  async changed(signal: AbortSignal, untilMs: number): Promise<void> {
    const bell = new AbortController();
    const ring = () => bell.abort(RUNG);
    this.#bells.add(ring);
    await this.#options.clock.sleep(AbortSignal.any([signal, bell.signal, this.#closed.signal]), untilMs);
    this.#bells.delete(ring);
  }

  /** Something about the group has changed that no store tells: a worker gets on with its Load. */
  ring(): void {
    for (const ring of [...this.#bells]) ring();
  }

  /** The group has gone, or this process ends. */
  close(): void {
    this.#closed.abort();
    this.#options.gangs.forget(this.#options.group);
    this.#unsubscribe();
    this.#sight.keep(new Set());
  }

  /** Throws where the stores cannot tell (C3). */
  #look(): Look {
    const { group: key, stores, gangs } = this.#options;
    const { groups, pods, nodes } = stores;
    if (!groups.isSynced || !pods.isSynced || !nodes.isSynced)
      throw new Error("groups, pods and nodes are not listed yet");
    const object = groups.get(key);
    if (object === undefined) throw new Error(`ReplicaGroup ${key} is not there`);
    const group = groupOf(object);
    const wish = gangs.wishOf(group);
    if (wish === undefined) throw new Error(`the plan of ReplicaGroup ${key} is not there yet`);
    const record = recordOf(group);
    this.#uid = object.metadata.uid;
    const all = pods.ownedBy(object.metadata.uid ?? "").flatMap((pod): OwnPod[] => {
      const read = gangPod(pod);
      return read === undefined ? [] : [{ object: pod, pod: read }];
    });
    all.sort((one, other) => one.pod.worker - other.pod.worker);
    const { incarnation } = record;
    if (this.#wantedOf !== incarnation || !record.begun) {
      this.#wanted.clear();
      this.#starter.reset();
      this.#wantedOf = incarnation;
    }
    const own = all.filter(({ pod }) => pod.incarnation === incarnation);
    return { object, record, wish, own, others: all.filter(({ pod }) => pod.incarnation !== incarnation) };
  }

  // ---- starting ----

  /** Does what is missing of what was begun (P4). Answers the incarnation's place, undefined where none has begun. */
  async #carryOn(look: Look, signal: AbortSignal): Promise<Place | undefined> {
    const { record, others } = look;
    const { group, gangs, clock } = this.#options;
    const { incarnation } = record;
    const older = others.filter(({ pod }) => pod.incarnation < incarnation);
    const isSwept = await this.#starter.sweep(older, signal);
    const isTidy = await this.#beside.sweep(this.#uid ?? "", incarnation, signal);
    if (!isSwept || !isTidy) this.#alarm.at(clock.nowMs() + AGAIN_MS);
    if (!record.begun) return undefined;
    const place = gangs.placeOf(group, incarnation, clock.nowMs());
    if (place.kind === "released") return place;
    const isStarting = this.#wanted.size > 0 || look.own.some(({ pod }) => pod.state === "waiting");
    const leave = isStarting ? await this.#options.lines?.create.enter(signal) : undefined;
    try {
      return await this.#bringUp(incarnation, signal);
    } finally {
      leave?.();
    }
  }

  async #bringUp(incarnation: bigint, signal: AbortSignal): Promise<Place | undefined> {
    const { group, gangs, clock } = this.#options;
    const before = this.#look();
    if (before.record.incarnation !== incarnation || !before.record.begun) return undefined;
    const { wish } = before;
    if (await this.#beside.keep(wish.besideOf(before.object, incarnation), signal))
      await this.#createWanted(before, signal);
    // Everything anew and in one moment: creating took time, and the place may be another's by now.
    const now = this.#look();
    if (now.record.incarnation !== incarnation || !now.record.begun) return undefined;
    const place = gangs.placeOf(group, incarnation, clock.nowMs());
    const isWhole = wish.devices.every((_, worker) => now.own.some(({ pod }) => pod.worker === worker));
    const isOpened =
      place.kind === "reserved" && isWhole && (await this.#starter.open(now.own, place.reservation, signal));
    if (!isOpened) this.#alarm.at(Math.min(gangs.wakeMs, clock.nowMs() + AGAIN_MS));
    else this.#alarm.at(gangs.wakeMs);
    return place;
  }

  /**
   * In the order of workers, and gates open in that order: so a pod that is missing has never run where one before it is still
   * closed. Any other that is missing may have run, and may still on a node that nobody reaches: its name is not used again.
   */
  async #createWanted({ object, record, wish, own }: Look, signal: AbortSignal): Promise<void> {
    const { incarnation } = record;
    if (own.length > 0) this.#begunHere = -1n;
    const isFresh = this.#begunHere === incarnation;
    for (const worker of [...this.#wanted].toSorted((one, other) => one - other)) {
      const isThere = own.some(({ pod }) => pod.worker === worker);
      const isNew = isFresh || own.some(({ pod }) => pod.worker < worker && pod.state === "waiting");
      if (!isThere && !isNew) this.#starter.refuse(worker, "it was there and has gone; its name is not used again");
      else if (!isThere && !(await this.#starter.create(object, wish, { incarnation, worker }, signal))) return;
      else this.#wanted.delete(worker);
    }
  }

  /** Workers that were started and have no pod yet (C2): waiting, or refused for good. */
  #unborn({ incarnation }: GroupRecord, place: Place | undefined, nowMs: number): WorkerSeen[] {
    const { group } = this.#options;
    return [...this.#wanted].map((worker) => {
      const released = place?.kind === "released" ? place.text : undefined;
      return unbornWorker({ group, incarnation, worker }, released, {
        trouble: this.#starter.troubleOf(worker),
        nowMs,
      });
    });
  }

  #causeOf(
    own: readonly OwnPod[],
    { begun, incarnation }: GroupRecord,
    place: Place | undefined,
  ): PodCause | undefined {
    if (!begun) return undefined;
    const troubles = [...this.#wanted].flatMap((worker) => {
      const trouble = this.#starter.troubleOf(worker);
      return trouble === undefined ? [] : { worker, trouble };
    });
    return causeOfPods({
      own,
      place,
      troubles,
      beside: this.#beside.trouble,
      unscheduled: this.#beside.unscheduled(this.#uid ?? "", incarnation),
      hasSpoken: (uid) => this.#sight.hasSpoken(uid),
    });
  }

  #setCauses(causes: { asked: PodCause | undefined; seen: PodCause | undefined }): void {
    const before = this.cause;
    this.#causes = causes;
    const { cause } = this;
    // Where there is none any more, what the reconciler says next takes its place.
    if (cause !== undefined && !isDeepStrictEqual(before, cause)) this.#options.onCause?.(cause);
  }

  // ---- actions ----

  async #record(replaces: bigint, record: GroupRecord, signal: AbortSignal): Promise<void> {
    const leave = record.begun ? await this.#options.lines?.begin.enter(signal) : undefined;
    try {
      await this.#recordNow(replaces, record, signal);
    } finally {
      leave?.();
    }
  }

  async #recordNow(replaces: bigint, record: GroupRecord, signal: AbortSignal): Promise<void> {
    const { group, gangs, clock } = this.#options;
    const { object, record: stored } = this.#look();
    if (isDeepStrictEqual(withRecord(object.status, record), object.status)) return;
    if (stored.incarnation !== replaces)
      throw new Error(`record of ${group}: incarnation is ${stored.incarnation}, not ${replaces}`);
    if (record.begun && !stored.begun) {
      const { place, sinceMs } = gangs.ask(group, record.incarnation, clock.nowMs());
      const isPlaced = place.kind === "reserved";
      const cause = isPlaced ? await this.#prepare(record.incarnation, signal) : causeOfPlace(place, sinceMs);
      if (cause !== undefined) {
        // What is not a matter of places must not keep others from theirs.
        if (isPlaced) gangs.withdraw(group);
        this.#setCauses({ ...this.#causes, asked: cause });
        throw new Error(cause.text);
      }
    } else gangs.withdraw(group);
    this.#setCauses({ ...this.#causes, asked: undefined });
    const { api, stores } = this.#options;
    await writeRecord({ api, groups: stores.groups, signal }, object, record);
    if (record.begun && !stored.begun) this.#begunHere = record.incarnation;
  }

  /** All that can be done and tried before it begins, so that what the server refuses costs no incarnation. */
  async #prepare(incarnation: bigint, signal: AbortSignal): Promise<PodCause | undefined> {
    const { object, wish } = this.#look();
    if (!(await this.#beside.keep(wish.besideOf(object, incarnation), signal)))
      return causeOfBeside(this.#beside.trouble);
    const trouble = await this.#starter.probe(object, wish, incarnation, signal);
    return trouble === undefined ? undefined : causeOfTrouble({ worker: 0, trouble });
  }

  async #start(name: WorkerName, signal: AbortSignal): Promise<void> {
    const look = this.#look();
    const { incarnation, begun } = look.record;
    if (!begun || incarnation !== name.incarnation)
      throw new Error(
        `${workerTitle(name)} is not started: the record is at ${incarnation}${begun ? "" : ", not begun"}`,
      );
    this.#wanted.add(name.worker);
    await this.#carryOn(look, signal);
  }

  async #load(name: WorkerName, request: LoadRequest, signal: AbortSignal): Promise<void> {
    const { own, wish, record } = this.#look();
    const found = own.find(({ pod }) => pod.worker === name.worker && record.incarnation === name.incarnation);
    const target = found && targetOf({ name, pod: found.object, port: wish.port });
    if (target === undefined) throw new Error(`${workerTitle(name)} has no address yet`);
    await this.#options.links.load(target, request, signal);
  }

  async #stop(name: WorkerName, graceMs: number, signal: AbortSignal): Promise<void> {
    const { own, others, record } = this.#look();
    if (name.incarnation === record.incarnation) this.#wanted.delete(name.worker);
    const found = [...own, ...others].find(
      ({ pod }) => pod.worker === name.worker && pod.incarnation === name.incarnation,
    );
    if (found !== undefined) await this.#starter.end(found.object, graceMs, signal);
  }
}

// The groups of one term: for each ReplicaGroup of the store a reconciler over its pods, from its appearance to its end. Owns
// who is looked after, with which goal, and that what is found out comes into status; what a group does is decided in
// controller/reconcile, how it is done in kube-cluster.ts.
//
//   G1  one reconciler for each group (by UID) at a time; the next of the same name begins when the one before has ended.
//   G2  a goal changes only where it is known: a plan, owner or spec that cannot be read leaves the last one as it is (R8).
//   G3  a group that is deleted is let go at once: its objects go by their owner references, and nobody makes new ones.
//   G4  a reconciler that breaks ends the term (T2 of run-controller.ts).
import type { Trust } from "../../../proto/trust.ts";
import type { Broker } from "../../api/mapping.ts";
import type { ReplicaGroup } from "../../api/parse.ts";
import { defaultLimits, type ReconcileLimits } from "../../reconcile/limits.ts";
import { Reconciler } from "../../reconcile/run.ts";
import type { GroupStatus } from "../../reconcile/status.ts";
import type { Because, Goal } from "../../reconcile/world.ts";
import { type KubeError, type KubeObject, keyOf } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { replicaGroups } from "../api/resources.ts";
import { type ExpertsOptions, GroupExperts } from "../experts/group-experts.ts";
import { Gangs, type GroupWish } from "../gangs/gang.ts";
import type { GangLimits } from "../gangs/reservations.ts";
import { Kubelets } from "../inventory/kubelets.ts";
import { fencedLinks } from "../lease/fenced-links.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";
import { storedPlanOf } from "../owners/deployment-objects.ts";
import type { Lead, Part } from "../run-controller.ts";
import { StatusWriter } from "../status/status-writer.ts";
import type { ReportsBoard } from "../workers/reports-board.ts";
import { watchReports } from "../workers/reports-watch.ts";
import { GrpcWorkerLinks, type WorkerLinks } from "../workers/worker-link.ts";
import { PULL_MS } from "../workers/worker-sight.ts";
import { GroupBells } from "./group-bells.ts";
import { GroupPlans, type ModelReader } from "./group-plans.ts";
import { groupOf } from "./group-record.ts";
import {
  groupHeadline,
  groupStatusOf,
  isStillTrue,
  type Placement,
  placementOf,
  READING,
  type Unread,
  unread,
  waitingStatus,
} from "./group-status.ts";
import { type OwnerOrder, orderOf, serveGoal, stopGoal, wishOf } from "./group-wishes.ts";
import { KubeCluster } from "./kube-cluster.ts";
import { refineStatus } from "./pod-state.ts";
import type { WorkerTemplate } from "./pods.ts";
import { startLines } from "./start-lines.ts";

export type GroupsOptions = {
  clock: Clock;
  random: () => number;
  template: WorkerTemplate;
  /** Where drafts and leaders meet; undefined: nobody drafts. */
  broker?: Broker | undefined;
  /** Default: headers, as the planner reads them. */
  read?: ModelReader;
  /** Of the default links. */
  trust?: Trust | undefined;
  /** Default: gRPC. `onNews`: the group has got on with its Load. */
  linksOf?: (onNews: (group: string) => void) => WorkerLinks;
  limits?: Partial<ReconcileLimits>;
  gangLimits?: GangLimits;
  /** What leaders report, and where to; undefined: nothing. */
  reports?: { board: ReportsBoard; address: string } | undefined;
  experts?: ExpertsOptions | undefined;
  metrics?: KubeMetrics | undefined;
  onBecause?: (group: string, because: readonly Because[]) => void;
  /** What the server refuses, and what cannot be read. */
  onFailure?: (group: string, detail: string) => void;
};

/** Coming of an image bounds itself (PULL_MS); the reconciler, which sees no difference to a start, waits a little longer. */
const START_MS = PULL_MS + 300_000;
/** The watch brings what the conflict was about, mostly before. */
const CONFLICT_WAIT_MS = 200;

/** For `parts` of run-controller.ts. */
export function groupsPart(options: GroupsOptions): Part {
  return (lead) => new Groups(options, lead).run();
}

type Entry = {
  uid: string;
  cluster: KubeCluster;
  reconciler: Reconciler;
  stop: AbortController;
  done: Promise<void>;
  goal: Goal;
  /** What the goal was made from; another text is another goal. */
  goalText: string;
  restarts: number | undefined;
};

type Found = { goal: Goal; text: string } | Unread;

class Groups {
  readonly #options: GroupsOptions;
  readonly #lead: Lead;
  readonly #plans: GroupPlans;
  readonly #gangs: Gangs;
  readonly #kubelets: Kubelets;
  readonly #bells: GroupBells;
  readonly #lines = startLines();
  readonly #links: WorkerLinks & { close?: () => void };
  readonly #writer: StatusWriter;
  readonly #experts: GroupExperts;
  readonly #entries = new Map<string, Entry>();
  /** Those that are ending, by key (G1). */
  readonly #ending = new Map<string, Promise<void>>();
  /** Of owners, as they last could be read (G2). */
  readonly #orders = new Map<string, { object: KubeObject; order: OwnerOrder }>();
  readonly #broken = Promise.withResolvers<never>();

  constructor(options: GroupsOptions, lead: Lead) {
    const { clock, random, gangLimits, linksOf, trust } = options;
    const { api, stores, looks } = lead;
    const read: ModelReader = options.read ?? ((source, signal, owner) => looks.read(source, owner, signal));
    this.#options = options;
    this.#lead = lead;
    this.#broken.promise.catch(() => {}); // awaited in run
    this.#plans = new GroupPlans({ read, clock, random, onChange: (uid) => this.#onPlan(uid) });
    this.#kubelets = new Kubelets(stores.nodes);
    this.#gangs = new Gangs({
      stores,
      wishOf: (group) => this.#wishOf(group),
      ...(gangLimits === undefined ? {} : { limits: gangLimits }),
    });
    this.#bells = new GroupBells(stores);
    const onNews = (group: string) => this.#entries.get(group)?.cluster.ring();
    this.#links = linksOf?.(onNews) ?? new GrpcWorkerLinks({ trust, onNews: ({ group }) => onNews(group) });
    this.#experts = new GroupExperts({ ...options, lead, onMoved: onNews });
    this.#writer = new StatusWriter({
      api,
      resource: replicaGroups,
      clock,
      random,
      headlineOf: groupHeadline,
      holds: ({ metadata }, status) => isStillTrue(status, stores.pods.ownedBy(metadata.uid ?? "")),
      onWritten: (object) => stores.groups.learn(object),
      onConflict: (key) => void this.#againSoon(key),
      onRefused: (key, error: KubeError) => options.onFailure?.(key, `its status is refused: ${error.message}`),
    });
  }

  /** Resolves when the term has ended and nothing is under way any more. */
  async run(): Promise<void> {
    const { stores, term } = this.#lead;
    const { groups, plans, deployments, pools, nodes, pods, slices } = stores;
    const unsubscribe: (() => void)[] = [];
    try {
      const all = [groups, plans, deployments, pools, nodes, pods, ...(slices === undefined ? [] : [slices])];
      await Promise.all(all.map((store) => store.synced(term.signal)));
      unsubscribe.push(
        groups.subscribe(({ object }) => this.#look(keyOf(object))),
        plans.subscribe(({ object }) => this.#onPlan(object.metadata.uid ?? "")),
        deployments.subscribe(({ object }) => this.#onOwner(object)),
        pools.subscribe(({ object }) => this.#onOwner(object)),
        this.#options.reports?.board.subscribe((group) => this.#entries.get(group)?.cluster.ring()) ?? (() => {}),
      );
      this.#lookAtAll();
      const running = [this.#writer, this.#experts].map((each) => each.run(term.signal));
      await Promise.race([...running, this.#watch(term.signal), this.#broken.promise]);
    } catch (error) {
      if (!term.signal.aborted) throw error;
    } finally {
      for (const stop of unsubscribe) stop();
      for (const key of [...this.#entries.keys()]) this.#end(key);
      await Promise.all(this.#ending.values());
      await Promise.all([this.#plans.close(), this.#experts.close()]);
      this.#links.close?.();
    }
  }

  #watch(signal: AbortSignal): Promise<void> {
    const { clock, reports } = this.#options;
    const onSuspect = (group: string) => this.#entries.get(group)?.cluster.ring();
    const onNumbers = (group: string) => {
      const entry = this.#entries.get(group);
      if (entry !== undefined) this.#tell(group, entry);
    };
    return watchReports(reports?.board, { clock, onSuspect, onNumbers }, signal);
  }

  // ---- who is looked at ----

  #lookAtAll(): void {
    for (const object of this.#lead.stores.groups.all()) this.#look(keyOf(object));
  }

  #onPlan(uid: string): void {
    const { groups, plans } = this.#lead.stores;
    const used = new Set<string>();
    for (const object of groups.all()) {
      const plan = plans.get(`${object.metadata.namespace}/${this.#read(object)?.spec.plan ?? ""}`);
      if (plan?.metadata.uid === undefined) continue;
      used.add(plan.metadata.uid);
      if (plan.metadata.uid === uid) this.#look(keyOf(object));
    }
    this.#plans.keep(used);
  }

  #onOwner({ metadata }: KubeObject): void {
    for (const object of this.#lead.stores.groups.ownedBy(metadata.uid ?? "")) this.#look(keyOf(object));
  }

  #look(key: string): void {
    if (this.#lead.term.signal.aborted) return;
    this.#gangs.touch(key);
    const object = this.#lead.stores.groups.get(key);
    const entry = this.#entries.get(key);
    if (object === undefined || object.metadata.deletionTimestamp !== undefined) {
      this.#end(key);
      return;
    }
    if (entry !== undefined && entry.uid !== object.metadata.uid) this.#end(key);
    const group = this.#read(object);
    if (group === undefined) return;
    const found = this.#goalOf(group);
    const known = this.#entries.get(key);
    if (!("goal" in found)) {
      const said = { ...found, nowMs: this.#options.clock.nowMs() };
      // Reading is no news where something has been said: a controller that takes over changes nothing of what serves.
      const isNews = found.code !== READING || group.status?.phase === undefined;
      if (known !== undefined) this.#tell(key, known);
      else if (isNews) this.#writer.offer(object, waitingStatus(object.status, group, said));
      return;
    }
    if (known === undefined) this.#start(key, object, found);
    else if (known.goalText !== found.text) {
      known.goalText = found.text;
      known.goal = found.goal;
      known.reconciler.setGoal(found.goal);
    } else this.#tell(key, known);
  }

  #read(object: KubeObject): ReplicaGroup | undefined {
    try {
      return groupOf(object);
    } catch (error) {
      this.#options.onFailure?.(keyOf(object), error instanceof Error ? error.message : String(error));
      return undefined;
    }
  }

  // ---- what is wanted ----

  #planSpecOf(group: ReplicaGroup) {
    const object = this.#lead.stores.plans.get(`${group.metadata.namespace}/${group.spec.plan}`);
    const stored = object === undefined ? undefined : storedPlanOf(object);
    if (object === undefined || stored?.kind !== "ok") return undefined;
    return { uid: object.metadata.uid ?? "", spec: stored.value.spec };
  }

  #orderOf(group: ReplicaGroup): OwnerOrder | undefined {
    const { deployments, pools } = this.#lead.stores;
    const { kind, name } = group.spec.owner;
    const key = `${kind}/${group.metadata.namespace}/${name}`;
    const object = (kind === "DraftPool" ? pools : deployments).get(`${group.metadata.namespace}/${name}`);
    const known = this.#orders.get(key);
    if (object === undefined || known?.object === object) return known?.order;
    const order = orderOf(object) ?? known?.order;
    if (order !== undefined) this.#orders.set(key, { object, order });
    return order;
  }

  #wishOf(group: ReplicaGroup): GroupWish | undefined {
    const { stores, looks } = this.#lead;
    const plan = this.#planSpecOf(group);
    const order = this.#orderOf(group);
    if (plan === undefined || order === undefined) return undefined;
    const can = { hasPodGroup: stores.podGroups !== undefined, hasPodCertificate: this.#kubelets.areCurrent };
    const volume = looks.volumeOf(group.metadata.namespace, plan.spec.model.source);
    return wishOf(group, plan.spec, { ...order, volume, pods: { ...order.pods, ...can } }, this.#options.template);
  }

  #goalOf(group: ReplicaGroup): Found {
    const waits = (code: string, message: string): Found => ({ phase: "Scheduling", code, message });
    if (group.spec.state === "Draining")
      return { goal: stopGoal(group, this.#options.clock.nowMs()), text: `stop ${group.metadata.generation}` };
    const stored = this.#planSpecOf(group);
    if (stored === undefined) return waits("plan-missing", `ShardPlan ${group.spec.plan} is not there, or is no plan`);
    const order = this.#orderOf(group);
    const { kind, name } = group.spec.owner;
    if (order === undefined) return waits("owner-missing", `${kind} ${name} is not there, or cannot be read`);
    const read = this.#plans.planOf(
      stored.uid,
      stored.spec,
      this.#orders.get(`${kind}/${group.metadata.namespace}/${name}`)?.object,
    );
    if (read.kind !== "whole") return unread(read, stored.spec.model.source);
    const { broker, reports } = this.#options;
    const goal = serveGoal(group, read.plan, order, { broker, reportsAddress: reports?.address });
    const { plan: _, ...rest } = goal.kind === "serve" ? goal : { ...goal, plan: undefined };
    return { goal, text: `${stored.uid} ${JSON.stringify(rest)}` };
  }

  // ---- looking after ----

  #start(key: string, { metadata }: KubeObject, { goal, text }: { goal: Goal; text: string }): void {
    const { clock, limits, onBecause } = this.#options;
    const { api, stores } = this.#lead;
    const stop = new AbortController();
    const tell = () => {
      const entry = this.#entries.get(key);
      if (entry?.stop === stop) this.#tell(key, entry);
    };
    const common = {
      api,
      stores,
      gangs: this.#gangs,
      bells: this.#bells,
      lines: this.#lines,
      links: fencedLinks(this.#links, this.#lead.term),
      clock,
    };
    const stepsOf = (incarnation: bigint) => this.#options.reports?.board.stepsOf(key, incarnation);
    const cluster = new KubeCluster({ group: key, ...common, onCause: tell, stepsOf });
    const reconciler = new Reconciler(goal, {
      group: key,
      cluster,
      clock,
      limits: { ...defaultLimits, stall: { ...defaultLimits.stall, startMs: START_MS }, ...limits },
      onStatus: tell,
      onBecause: (because) => onBecause?.(key, because),
    });
    const before = this.#ending.get(key) ?? Promise.resolve();
    const done = before.then(() => reconciler.run(stop.signal));
    done.catch((error: unknown) => {
      if (!stop.signal.aborted) this.#broken.reject(error);
    });
    const uid = metadata.uid ?? "";
    this.#entries.set(key, { uid, cluster, reconciler, stop, done, goal, goalText: text, restarts: undefined });
  }

  #end(key: string): void {
    this.#writer.forget(key);
    this.#experts.forget(key);
    this.#options.reports?.board.forget(key);
    const entry = this.#entries.get(key);
    if (entry === undefined) return;
    this.#entries.delete(key);
    entry.stop.abort();
    const ended = entry.done.then(
      () => {},
      () => {}, // told when it happened (G4)
    );
    entry.cluster.close();
    const settled = ended.then(() => {
      if (this.#ending.get(key) === settled) this.#ending.delete(key);
    });
    this.#ending.set(key, settled);
  }

  // ---- what is said ----

  #tell(key: string, entry: Entry): void {
    const { status: told } = entry.reconciler;
    const object = this.#lead.stores.groups.get(key);
    if (told === undefined || object?.metadata.uid !== entry.uid || this.#lead.term.signal.aborted) return;
    const group = this.#read(object);
    if (group === undefined) return;
    const status = refineStatus(told, entry.cluster.cause);
    this.#count(object, entry, status);
    const movesExperts = this.#orderOf(group)?.movesExperts ?? false;
    this.#experts.look(object, { goal: entry.goal, status, movesExperts });
    const ranks = this.#planSpecOf(group)?.spec.cut.world ?? 0;
    const nowMs = this.#options.clock.nowMs();
    const placement = this.#placementOf(object, group);
    const numbers = this.#options.reports?.board.numbersOf(key, status.incarnation);
    this.#writer.offer(object, groupStatusOf(object.status, { group, status, placement, ranks, numbers, nowMs }));
  }

  /** Where the incarnation of the record has its places; nowhere while none has begun. */
  #placementOf(object: KubeObject, group: ReplicaGroup): Placement {
    const record = group.status?.record;
    if (record?.begun !== true) return [];
    const incarnation = BigInt(record.incarnation);
    const place = this.#gangs.placeOf(keyOf(object), incarnation, this.#options.clock.nowMs());
    if (place.kind !== "reserved") return [];
    return placementOf(object, place.reservation);
  }

  /** Tells people of each incarnation that has ended by failure while this process looked on. */
  #count(object: KubeObject, entry: Entry, { restarts, cause }: GroupStatus): void {
    if (entry.restarts !== undefined && restarts > entry.restarts) {
      const what = { type: "Warning", reason: "IncarnationEnded", action: "Restart", note: cause } as const;
      this.#lead.events.record(object, what);
    }
    entry.restarts = restarts;
  }

  async #againSoon(key: string): Promise<void> {
    const { clock } = this.#options;
    await clock.sleep(this.#lead.term.signal, clock.nowMs() + CONFLICT_WAIT_MS);
    this.#look(key);
  }
}

// ModelDeployments and DraftPools on a cluster: looks, has it decided (reconcile/deployment), applies, offers one status. Owns
// reads, writes and when a key has its turn; never touches a pod.
//
//   K1  one turn at a time for each owner; a turn begins with what the stores know and learns its own writes.
//   K2  nothing is decided before every list has been whole once: absence would be taken for deletion.
//   K3  a ShardPlan is created and never written again; one that is there already is taken as it is.
//   K4  a group is drained and deleted only as the object that was looked at (uid, version).
//   K5  planning happens beside the queue (plan-desk.ts); a turn never waits for it.
//   K6  when the signal aborts nothing more is begun; what was under way is refused by the fence of the API it is given.
import type { LoadSample, ScaleState } from "../../reconcile/autoscale.ts";
import { calibrationFor } from "../../reconcile/deployment/calibration.ts";
import { decideDeployment } from "../../reconcile/deployment/decide.ts";
import { headline, statusFor } from "../../reconcile/deployment/status.ts";
import type { OwnerKind, OwnerWish } from "../../reconcile/deployment/wish.ts";
import type {
  DeploymentAction,
  DeploymentDecision,
  DeploymentWorld,
  GroupView,
  OwnerStatus,
  StoredPlan,
} from "../../reconcile/deployment/world.ts";
import type { Because } from "../../reconcile/world.ts";
import { applyOwned, FIELD_MANAGER, patchSeen } from "../api/apply.ts";
import { isAlreadyThere, isRefused, type KubeApi, KubeError, type KubeObject, keyOf } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { replicaGroups, shardPlans } from "../api/resources.ts";
import type { ClusterView, Held } from "../inventory/cluster-view.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";
import { SourceDesk } from "../sources/source-desk.ts";
import type { SourceLooks } from "../sources/source-looks.ts";
import type { EventRecorder } from "../status/events.ts";
import { type StatusLimits, StatusWriter } from "../status/status-writer.ts";
import type { Delta, Store } from "../watch/store.ts";
import { type QueueLimits, WorkQueue } from "../watch/work-queue.ts";
import * as read from "./deployment-objects.ts";
import { type DeskLimits, PlanDesk, type Planner } from "./plan-desk.ts";

type DeploymentStores = { deployments: Store; pools: Store; plans: Store; groups: Store };

export type DeploymentsOptions = {
  /** Fenced by the term. */
  api: KubeApi;
  stores: DeploymentStores;
  view: ClusterView;
  planner: Planner;
  looks?: SourceLooks | undefined;
  events: Pick<EventRecorder, "record">;
  clock: Clock;
  random: () => number;
  /** For new plans; plans that are stored keep theirs. */
  workerImage: string;
  /** What gateways and leaders have measured of an owner, oldest first. */
  loadOf?: (kind: OwnerKind, key: string) => readonly LoadSample[];
  /** Tells which deployment (`namespace/name`) is asked for while nothing of it serves. Answers how to stop. */
  onWaiting?: (wake: (key: string) => void) => () => void;
  onBecause?: (key: string, because: readonly Because[]) => void;
  onFailure?: (key: string, error: unknown, againMs: number) => void;
  limits?: { queue?: Partial<QueueLimits>; desk?: Partial<DeskLimits>; status?: Partial<StatusLimits> };
  metrics?: KubeMetrics;
};

const TURNS_AT_ONCE = 8;
/** The watch brings what the conflict was about, mostly before. */
const CONFLICT_WAIT_MS = 200;
/** After a change of nodes or pods: they come in storms. */
const SETTLE_MS = 1_000;

const NOT_OURS = "NotOurs";

/** What is remembered of an owner; lost with the term, and then begun anew without harm. */
type Memory = { uid: string; told: OwnerStatus; scale: ScaleState | undefined; trouble: string | undefined };

export class Deployments {
  readonly #options: DeploymentsOptions;
  readonly #queue: WorkQueue;
  readonly #desk: SourceDesk;
  readonly #writers: Readonly<Record<OwnerKind, StatusWriter>>;
  readonly #memories = new Map<string, Memory>();
  /** Owners that wait for devices. */
  readonly #short = new Set<string>();

  constructor(options: DeploymentsOptions) {
    const { clock, random, limits, metrics, planner } = options;
    this.#options = options;
    this.#queue = new WorkQueue({
      name: "deployments",
      clock,
      random,
      onRelief: () => this.#addAll(),
      ...(limits?.queue === undefined ? {} : { limits: limits.queue }),
      ...(metrics === undefined ? {} : { metrics }),
    });
    const onAnswer = (key: string) => void this.#queue.add(key);
    const deskLimits = limits?.desk === undefined ? {} : { limits: limits.desk };
    const desk = new PlanDesk({ planner, clock, random, onAnswer, ...deskLimits });
    this.#desk = new SourceDesk({ desk, looks: options.looks, stores: options.stores, onAnswer });
    this.#writers = { ModelDeployment: this.#writer("ModelDeployment"), DraftPool: this.#writer("DraftPool") };
  }

  /** Resolves when aborted and nothing is under way any more. */
  async run(signal: AbortSignal): Promise<void> {
    const { stores, view } = this.#options;
    const { deployments, pools, plans, groups } = stores;
    const unsubscribe = [
      deployments.subscribe((delta) => this.#onOwner("ModelDeployment", delta)),
      pools.subscribe((delta) => this.#onOwner("DraftPool", delta)),
      plans.subscribe(({ object }) => this.#onOwned(object)),
      groups.subscribe(({ object }) => this.#onOwned(object)),
      view.subscribe(() => this.#onDevices()),
      view.subscribeLeaving((node) => this.#onLeaving(node)),
      this.#options.onWaiting?.((key) => void this.#queue.add(`ModelDeployment/${key}`)) ?? (() => {}),
    ];
    try {
      await Promise.all([deployments, pools, plans, groups].map((store) => store.synced(signal)));
      await view.synced(signal);
      this.#addAll();
      const onFailure = (key: string, error: unknown, againMs: number) => this.#failed(key, { error, againMs });
      await Promise.all([
        this.#queue.work((key, turn) => this.#turn(key, turn), { concurrency: TURNS_AT_ONCE, onFailure }, signal),
        ...Object.values(this.#writers).map((writer) => writer.run(signal)),
      ]);
    } catch (error) {
      if (!signal.aborted) throw error;
    } finally {
      for (const stop of unsubscribe) stop();
      this.#queue.close();
      await this.#desk.idle();
    }
  }

  #writer(kind: OwnerKind): StatusWriter {
    const { api, clock, random, limits, metrics } = this.#options;
    const keyIn = (key: string): string => `${kind}/${key}`;
    return new StatusWriter({
      api,
      resource: read.OWNERS[kind],
      clock,
      random,
      headlineOf: (status) => headline(read.statusOf(kind, status)),
      onWritten: (object) => this.#store(kind).learn(object),
      onConflict: (key) => void this.#queue.addAt(keyIn(key), clock.nowMs() + CONFLICT_WAIT_MS),
      onRefused: (key, error) => this.#trouble(keyIn(key), error),
      ...(limits?.status === undefined ? {} : { limits: limits.status }),
      ...(metrics === undefined ? {} : { metrics }),
    });
  }

  #store(kind: OwnerKind): Store {
    return kind === "DraftPool" ? this.#options.stores.pools : this.#options.stores.deployments;
  }

  // ---- who has a turn ----

  #addAll(): void {
    const { deployments, pools } = this.#options.stores;
    for (const object of deployments.all()) this.#queue.add(`ModelDeployment/${keyOf(object)}`);
    for (const object of pools.all()) this.#queue.add(`DraftPool/${keyOf(object)}`);
  }

  /** A pool and those that name it look at each other. */
  #onOwner(kind: OwnerKind, { object }: Delta): void {
    this.#queue.add(`${kind}/${keyOf(object)}`);
    const { namespace = "", name } = object.metadata;
    if (kind === "ModelDeployment") {
      const pool = read.poolNameOf(object);
      if (pool !== undefined) this.#queue.add(`DraftPool/${namespace}/${pool}`);
      return;
    }
    for (const target of this.#options.stores.deployments.inNamespace(namespace)) {
      if (read.poolNameOf(target) === name) this.#queue.add(`ModelDeployment/${keyOf(target)}`);
    }
  }

  #onOwned({ metadata }: KubeObject): void {
    for (const { kind, name } of metadata.ownerReferences ?? []) {
      if (kind === "ModelDeployment" || kind === "DraftPool") this.#queue.add(`${kind}/${metadata.namespace}/${name}`);
    }
  }

  #onDevices(): void {
    const atMs = this.#options.clock.nowMs() + SETTLE_MS;
    for (const key of this.#short) this.#queue.addAt(key, atMs);
  }

  #onLeaving(node: string): void {
    for (const object of this.#options.stores.groups.all()) {
      const group = read.groupViewOf(object);
      if (group.kind === "ok" && group.value.status.placement?.some((seat) => seat.node === node))
        this.#onOwned(object);
    }
  }

  // ---- one turn ----

  async #turn(key: string, signal: AbortSignal): Promise<{ againMs: number } | undefined> {
    const [kind, objectKey] = partsOf(key);
    const object = this.#store(kind).get(objectKey);
    if (object === undefined) {
      this.#forget(key);
      return undefined;
    }
    const memory = this.#memoryOf(key, object);
    const world = this.#world(key, object, memory);
    const decision = decideDeployment(world);
    for (const event of decision.events) this.#options.events.record(object, event);
    memory.told = world.owner.status;
    memory.scale = decision.scale;
    if (decision.because.length > 0) this.#options.onBecause?.(key, decision.because);
    this.#writers[kind].offer(object, statusFor(kind, decision.status));
    for (const action of decision.actions) await this.#apply(object, action, signal);
    memory.trouble = undefined;
    const askMs = this.#ask(key, world, decision, signal);
    const againMs = Math.min(decision.wakeMs, askMs ?? Number.POSITIVE_INFINITY);
    return Number.isFinite(againMs) ? { againMs } : undefined;
  }

  #memoryOf(key: string, object: KubeObject): Memory {
    const known = this.#memories.get(key);
    const { uid = "" } = object.metadata;
    if (known?.uid === uid) return known;
    if (known !== undefined) this.#forget(key);
    const { status } = read.ownerOf(object);
    const memory = { uid, told: status, scale: undefined, trouble: undefined };
    this.#memories.set(key, memory);
    return memory;
  }

  #world(key: string, object: KubeObject, memory: Memory): DeploymentWorld {
    const { clock, view, workerImage, loadOf } = this.#options;
    const owner = read.ownerOf(object);
    const wish = owner.wish.kind === "ok" ? owner.wish.value : undefined;
    const owned = this.#owned(object);
    const said = memory.trouble === undefined ? [] : [notice(memory.trouble)];
    return {
      nowMs: clock.nowMs(),
      owner,
      ...owned,
      answer: wish && this.#desk.answerTo(key, wish.question),
      better: wish && this.#desk.better(key, wish.question),
      leaving: view.leavingOf(nodesOf(owned.groups)),
      free: wish && view.freeFor(wish.question),
      load: loadOf?.(owner.kind, keyOf(object)) ?? [],
      scale: memory.scale,
      pool: wish && this.#pool(object, wish),
      targets: owner.kind === "DraftPool" ? this.#targets(object) : [],
      needs: [...(wish === undefined ? [] : view.needsOf(wish.question)), ...said],
      image: workerImage,
      told: memory.told,
    };
  }

  #owned({ metadata }: KubeObject): { plans: StoredPlan[]; groups: GroupView[]; unreadable: string[] } {
    const { stores } = this.#options;
    const plans = stores.plans.ownedBy(metadata.uid ?? "").map(read.storedPlanOf);
    const groups = stores.groups.ownedBy(metadata.uid ?? "").map(read.groupViewOf);
    return {
      plans: plans.flatMap((each) => (each.kind === "ok" ? each.value : [])),
      groups: groups.flatMap((each) => (each.kind === "ok" ? each.value : [])),
      unreadable: [...plans, ...groups].flatMap((each) => (each.kind === "refused" ? each.title : [])).toSorted(),
    };
  }

  #pool({ metadata }: KubeObject, { draftPool }: OwnerWish) {
    const object = this.#options.stores.pools.get(`${metadata.namespace}/${draftPool ?? ""}`);
    return draftPool === undefined || object === undefined ? undefined : read.poolViewOf(object);
  }

  #targets({ metadata }: KubeObject): { name: string; vocabulary: string | undefined }[] {
    const { deployments, plans } = this.#options.stores;
    const naming = deployments
      .inNamespace(metadata.namespace ?? "")
      .filter((one) => read.poolNameOf(one) === metadata.name);
    return naming.map((target) => {
      const plan = plans.get(`${metadata.namespace}/${read.ownerOf(target).status.planName ?? ""}`);
      const stored = plan === undefined ? undefined : read.storedPlanOf(plan);
      const vocabulary = stored?.kind === "ok" ? stored.value.spec.model.vocabulary : undefined;
      return { name: target.metadata.name, vocabulary };
    });
  }

  /** Answers when to look again because of it. */
  #ask(key: string, world: DeploymentWorld, decision: DeploymentDecision, signal: AbortSignal): number | undefined {
    const isShort = decision.ask === "first" || decision.status.notices?.some(({ field }) => field === "spec.rollout");
    if (isShort === true) this.#short.add(key);
    else this.#short.delete(key);
    if (decision.ask === undefined || world.owner.wish.kind === "refused") return undefined;
    const { question, planName } = world.owner.wish.value;
    const held = decision.ask === "better" ? heldBy(world.groups) : undefined;
    const grounds = this.#options.view.groundsFor(question, held);
    if (grounds === undefined) return undefined;
    const calibration = calibrationFor(planName, world);
    return this.#desk.ask(key, { question, grounds, calibration }, decision.ask, signal);
  }

  // ---- writes ----

  async #apply(owner: KubeObject, action: DeploymentAction, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    const { api, stores } = this.#options;
    const { namespace } = owner.metadata;
    switch (action.kind) {
      case "store-plan":
        return this.#storePlan(owner, action, signal);
      case "apply-group":
        stores.groups.learn(await applyOwned(api, replicaGroups, read.groupObject(owner, action), { signal }));
        return;
      case "drain-group": {
        const group = stores.groups.get(`${namespace}/${action.name}`);
        if (group === undefined) return;
        const operations = read.drainOperations(group, action.untilMs);
        stores.groups.learn(await patchSeen(api, replicaGroups, group, { operations, signal }));
        return;
      }
      case "delete-group":
        return this.#delete(stores.groups, replicaGroups, `${namespace}/${action.name}`, signal);
      case "delete-plan":
        return this.#delete(stores.plans, shardPlans, `${namespace}/${action.name}`, signal);
      default:
        throw new Error(`unreachable: action ${JSON.stringify(action satisfies never)}`);
    }
  }

  /** K3. */
  async #storePlan(
    owner: KubeObject,
    action: Extract<DeploymentAction, { kind: "store-plan" }>,
    signal: AbortSignal,
  ): Promise<void> {
    const { api, stores } = this.#options;
    const object = read.planObject(owner, action);
    try {
      stores.plans.learn(await api.create(shardPlans, object, signal, { fieldManager: FIELD_MANAGER }));
    } catch (error) {
      if (!isAlreadyThere(error)) throw error;
      const there = await api.get(shardPlans, action.name, owner.metadata.namespace, signal);
      if (there === undefined) return;
      const isOurs = there.metadata.ownerReferences?.some(({ uid }) => uid === owner.metadata.uid) ?? false;
      const title = `ShardPlan ${action.name}`;
      if (!isOurs)
        throw new KubeError(0, NOT_OURS, `${title} belongs to another owner: wait until it is gone, or delete it`);
      stores.plans.learn(there);
    }
  }

  /** K4. The watch tells when it is gone. */
  async #delete(store: Store, resource: typeof shardPlans, key: string, signal: AbortSignal): Promise<void> {
    const object = store.get(key);
    const { uid, resourceVersion, name, namespace } = object?.metadata ?? {};
    if (uid === undefined || resourceVersion === undefined || name === undefined) return;
    const preconditions = { uid, resourceVersion };
    await this.#options.api.delete(
      resource,
      name,
      namespace,
      { preconditions, propagationPolicy: "Background" },
      signal,
    );
  }

  // ---- what goes wrong ----

  #failed(key: string, { error, againMs }: { error: unknown; againMs: number }): void {
    const isForPerson = error instanceof KubeError && (isRefused(error) || error.reason === NOT_OURS);
    if (isForPerson) this.#trouble(key, error);
    this.#options.onFailure?.(key, error, againMs);
  }

  /** Said in status at the next look: the server will not have something, now or later. */
  #trouble(key: string, error: KubeError): void {
    const memory = this.#memories.get(key);
    if (memory !== undefined) memory.trouble = error.message;
  }

  #forget(key: string): void {
    const [kind, objectKey] = partsOf(key);
    this.#memories.delete(key);
    this.#short.delete(key);
    this.#desk.forget(key);
    this.#writers[kind].forget(objectKey);
  }
}

function partsOf(key: string): [OwnerKind, string] {
  const at = key.indexOf("/");
  return [key.slice(0, at) === "DraftPool" ? "DraftPool" : "ModelDeployment", key.slice(at + 1)];
}

const notice = (message: string) => ({ field: "metadata", kind: "Refused" as const, message });

const nodesOf = (groups: readonly GroupView[]): string[] =>
  groups.flatMap(({ status }) => (status.placement ?? []).map(({ node }) => node));

function heldBy(groups: readonly GroupView[]): Held {
  const held = new Map<string, number>();
  for (const { status } of groups) {
    for (const { node, ranks } of status.placement ?? []) held.set(node, (held.get(node) ?? 0) + ranks);
  }
  return held;
}

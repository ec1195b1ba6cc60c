// A whole cluster for tests of groups: simulated API server, nodes, scheduler, kubelets and workers, and controllers one after
// the other. Checks at every change what must never be; owns no expectation of one test.
import { createHash } from "node:crypto";
import { LABELS } from "../../../../controller/api/meta.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { fieldsOf } from "../../../../controller/kube/api/fields.ts";
import {
  nodes,
  podDisruptionBudgets,
  podGroups,
  pods,
  replicaGroups,
  services,
} from "../../../../controller/kube/api/resources.ts";
import { Gangs } from "../../../../controller/kube/gangs/gang.ts";
import { gangKey, gangPod } from "../../../../controller/kube/gangs/gang-pods.ts";
import { gangLimits } from "../../../../controller/kube/gangs/reservations.ts";
import { GroupBells } from "../../../../controller/kube/groups/group-bells.ts";
import { besideOf } from "../../../../controller/kube/groups/group-objects.ts";
import { groupOf, recordOf } from "../../../../controller/kube/groups/group-record.ts";
import { KubeCluster } from "../../../../controller/kube/groups/kube-cluster.ts";
import { refineStatus } from "../../../../controller/kube/groups/pod-state.ts";
import { devicesOf, type WorkerTemplate, workerPod } from "../../../../controller/kube/groups/pods.ts";
import { nodeFacts } from "../../../../controller/kube/inventory/node-facts.ts";
import { FencedApi } from "../../../../controller/kube/lease/fenced-api.ts";
import { Reflector } from "../../../../controller/kube/watch/reflector.ts";
import { Slots } from "../../../../controller/kube/watch/slots.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import type { GroupRecord } from "../../../../controller/reconcile/cluster.ts";
import { defaultLimits } from "../../../../controller/reconcile/limits.ts";
import { Reconciler } from "../../../../controller/reconcile/run.ts";
import { type GroupStatus, Phase } from "../../../../controller/reconcile/status.ts";
import type { Goal } from "../../../../controller/reconcile/world.ts";
import { type SimApiOptions, SimApiServer } from "../../../sim/api-server.ts";
import { calm, type FaultPlan, FaultyApi } from "../../../sim/faults.ts";
import { type PodFaults, SimPods, wellBehaved } from "../../../sim/pods.ts";
import { randomOf } from "../../../sim/random.ts";
import { seatOf } from "../../../sim/scheduling.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { serveGoal } from "../../reconcile/groups.ts";
import { type CrashPoint, MortalApi } from "../mortal-api.ts";
import { node, pod } from "../objects.ts";

export const NS = "serving";
/** T of these tests. */
export const WHOLE_MS = 20_000;
/** Of these tests: nodes that failed a group are avoided for so long. */
const KEEP_MS = 100_000;
const never = new AbortController().signal;

const TEMPLATE: WorkerTemplate = {
  image: "muster/worker@sha256:0",
  imagePullPolicy: "IfNotPresent",
  command: ["muster"],
  serviceAccountName: "muster-worker",
  port: 7070,
  shmSize: "1Gi",
  resources: { requests: { cpu: "2" }, limits: {} },
  drainSeconds: 2,
  tokenSeconds: 3600,
  caConfigMap: undefined,
  userId: 10_001,
};

export type BedOptions = {
  seed: number;
  /** GPUs of each node. */
  nodes: Record<string, number>;
  /** Workers of each group, one GPU each. */
  groups: Record<string, number>;
  faults?: Partial<FaultPlan> | undefined;
  podFaults?: Partial<PodFaults>;
  /** How long a dead rank may stand behind a leader, and a half beyond T. */
  slackMs?: number;
  /** Why the server refuses an object; see SimApiServer. */
  admit?: SimApiOptions["admit"];
  /** Whether the server has PodGroups. */
  hasPodGroups?: boolean;
};

const goals = new Map<number, Goal>();

function goalOf(workers: number): Goal & { kind: "serve" } {
  const goal = goals.get(workers) ?? serveGoal(workers);
  goals.set(workers, goal);
  if (goal.kind !== "serve") throw new Error("a serve goal is one");
  return goal;
}

export class Bed {
  readonly time = new VirtualClock();
  readonly server: SimApiServer;
  readonly api: FaultyApi;
  readonly sim: SimPods;
  readonly random: () => number;
  /** What was told last of each group, and when. */
  readonly told = new Map<string, GroupStatus>();
  readonly history: { group: string; status: GroupStatus }[] = [];
  readonly violations: string[] = [];
  readonly writes: string[] = [];
  controllers = 0;
  life: Life | undefined;
  readonly #options: BedOptions;
  readonly #goals = new Map<string, Goal>();
  readonly #since = new Map<string, number>();

  private constructor(options: BedOptions) {
    this.#options = options;
    this.random = randomOf(options.seed);
    this.server = new SimApiServer(this.time, options.admit === undefined ? {} : { admit: options.admit });
    const { time, server, random } = this;
    this.sim = new SimPods({ server, time, random, faults: { ...wellBehaved, ...options.podFaults } });
    this.api = new FaultyApi(server, { time, random, plan: { ...calm, ...options.faults } });
    server.onChange(({ resource, before, after }) => {
      if (resource.plural === "replicagroups") this.#checkRecord(before, after);
      if (resource.plural === "pods") this.check();
    });
  }

  static async create(options: BedOptions): Promise<Bed> {
    const bed = new Bed(options);
    for (const [name, gpus] of Object.entries(options.nodes)) await bed.addNode(name, gpus);
    for (const [name, workers] of Object.entries(options.groups)) await bed.addGroup(name, workers);
    return bed;
  }

  async addNode(name: string, gpus: number): Promise<void> {
    const wanted = node(name, { gpus });
    const created = await this.server.create(nodes, wanted, never);
    await this.server.replaceStatus(nodes, { ...created, status: wanted.status }, never);
  }

  async addGroup(name: string, workers: number): Promise<void> {
    const spec = {
      owner: { kind: "ModelDeployment", name: "m" },
      plan: `plan-${workers}`,
      ordinal: 0,
      state: "Serving",
    };
    const group = { apiVersion: "muster.dev/v1alpha1", kind: "ReplicaGroup", metadata: { name, namespace: NS }, spec };
    await this.server.create(replicaGroups, group, never);
    this.#goals.set(name, goalOf(workers));
  }

  get hasPodGroups(): boolean {
    return this.#options.hasPodGroups ?? false;
  }

  get groups(): readonly string[] {
    return [...this.#goals.keys()];
  }

  /** Begins a controller; the one before, if any, must have ended. */
  start(crash?: CrashPoint): Life {
    this.controllers += 1;
    this.#since.clear();
    const life = new Life(this, this.#goals, crash);
    this.life = life;
    return life;
  }

  /** Ends the controller that runs, as a signal to its process does. */
  async end(): Promise<void> {
    if (this.life === undefined) return;
    this.life.stop.abort();
    await this.time.finish(this.life.ended);
  }

  /** A pod of somebody else that holds a GPU of that node at once. */
  async takeGpu(name: string, nodeName: string): Promise<void> {
    const taken = pod(name, { gpus: 1 });
    const { uid: _uid, resourceVersion: _version, ...metadata } = taken.metadata;
    const spec = { ...fieldsOf(taken.spec), nodeName };
    await this.server.create(pods, { ...taken, metadata, spec }, never);
  }

  setGoal(group: string, goal: Goal): void {
    this.#goals.set(group, goal);
    this.life?.setGoal(group, goal);
  }

  recordOf(group: string): GroupRecord {
    const object = this.server.objects(replicaGroups).find(({ metadata }) => metadata.name === group);
    if (object === undefined) throw new Error(`no group ${group}`);
    return recordOf(groupOf(object));
  }

  podsOf(group: string): readonly KubeObject[] {
    return this.server.objects(pods).filter(({ metadata }) => metadata.labels?.[LABELS.group] === group);
  }

  isServing(group: string): boolean {
    const status = this.told.get(group);
    return status?.phase === Phase.SERVING && status.incarnation === this.recordOf(group).incarnation;
  }

  /** What is told of the group from now on, for checks over time. */
  tell(group: string, status: GroupStatus): void {
    this.told.set(group, status);
    this.history.push({ group, status });
    this.check();
  }

  /** A digest of everything that happened, for replays. */
  get digest(): string {
    const text = JSON.stringify([
      this.server.version,
      this.history.map(({ group, status }) => [group, status.cause, status.sinceMs]),
    ]);
    return createHash("sha256").update(text).digest("hex");
  }

  /** All that must hold at every moment. */
  check(): void {
    this.#checkGpus();
    this.#checkHalves();
    this.#checkLeaders();
  }

  expectNothingWrong(): string[] {
    return [...this.violations, ...this.sim.violations];
  }

  #checkRecord(before: KubeObject | undefined, after: KubeObject | undefined): void {
    if (before === undefined || after === undefined) return;
    const was = recordOf(groupOf(before)).incarnation;
    const is = recordOf(groupOf(after)).incarnation;
    if (is < was || is > was + 1n) this.violations.push(`record of ${after.metadata.name} went from ${was} to ${is}`);
  }

  /** What ours hold and what is promised to ours: no GPU has two owners. */
  #checkGpus(): void {
    const owned = new Map<string, number>();
    for (const object of this.server.objects(pods)) {
      const pod = gangPod(object);
      if (pod === undefined || pod.state === "over" || pod.state === "waiting") continue;
      const at = pod.node || (seatOf(object) ?? "");
      if (at === "") this.violations.push(`${pod.name} is open without a seat`);
      owned.set(at, (owned.get(at) ?? 0) + pod.devices);
    }
    for (const object of this.server.objects(nodes)) {
      const { name, gpus } = nodeFacts(object);
      const count = owned.get(name) ?? 0;
      if (count > gpus)
        this.violations.push(`G1: ${count} of ${gpus} GPUs of ${name} have owners at ${this.time.nowMs()}`);
    }
  }

  #checkHalves(): void {
    const gangs = Map.groupBy(
      this.server.objects(pods).flatMap((pod) => gangPod(pod) ?? []),
      gangKey,
    );
    for (const [key, members] of gangs) {
      const workers = this.#options.groups[members[0]?.group.split("/")[1] ?? ""] ?? 0;
      const isOpen = members.some(({ state }) => state === "released" || state === "bound");
      const bound = members.filter(({ state }) => state === "bound").length;
      this.#lasts(`half ${key}`, isOpen && bound < workers, WHOLE_MS + this.#slackMs);
    }
  }

  #checkLeaders(): void {
    for (const [group, { leaderAddress, incarnation }] of this.told) {
      const workers = this.#options.groups[group] ?? 0;
      const alive = this.sim.workers.filter(
        (worker) => worker.group === `${NS}/${group}` && worker.description.incarnation === incarnation,
      );
      this.#lasts(`leader of ${group} with a dead rank`, leaderAddress !== "" && alive.length < workers, this.#slackMs);
    }
  }

  get #slackMs(): number {
    return this.#options.slackMs ?? 8_000;
  }

  /** Only while somebody is there to act. */
  #lasts(what: string, isSo: boolean, boundMs: number): void {
    const nowMs = this.time.nowMs();
    if (!isSo || this.life === undefined || this.life.hasEnded) this.#since.delete(what);
    else {
      const sinceMs = this.#since.get(what) ?? nowMs;
      this.#since.set(what, sinceMs);
      if (nowMs - sinceMs > boundMs) this.violations.push(`${what} for ${nowMs - sinceMs} ms`);
    }
  }
}

/** One controller process, from its first list to its end. */
export class Life {
  readonly stop = new AbortController();
  readonly clusters = new Map<string, KubeCluster>();
  /** Resolves when every part has ended. */
  readonly ended: Promise<void>;
  hasEnded = false;
  readonly #reconcilers = new Map<string, Reconciler>();

  constructor(bed: Bed, goals: ReadonlyMap<string, Goal>, crash: CrashPoint | undefined) {
    const { time, sim, random } = bed;
    const fenced = new FencedApi(bed.api, { isHeld: () => !this.stop.signal.aborted });
    const api = new MortalApi(fenced, { crash, writes: bed.writes, die: () => this.stop.abort() });
    const stores = {
      groups: new Store(),
      pods: new Store(),
      nodes: new Store(),
      slices: undefined,
      services: new Store(),
      budgets: new Store(),
      podGroups: bed.hasPodGroups ? new Store() : undefined,
    };
    const hasPodGroup = bed.hasPodGroups;
    const gangs = new Gangs({
      stores,
      limits: { ...gangLimits, wholeMs: WHOLE_MS, keepMs: KEEP_MS },
      wishOf: ({ spec }) => {
        const { plan } = goalOf(Number(spec.plan.split("-")[1]));
        const who = { owner: spec.owner, planName: spec.plan, plan };
        return {
          devices: devicesOf(plan),
          priority: 0,
          selection: {},
          within: "any",
          port: TEMPLATE.port,
          podOf: (group, incarnation, worker) =>
            workerPod({ ...who, group, incarnation, worker }, TEMPLATE, { hasPodGroup }),
          besideOf: (group, incarnation) => {
            const { workers } = plan;
            return besideOf({ ...who, group }, { incarnation, workers, port: TEMPLATE.port, pods: { hasPodGroup } });
          },
        };
      },
    });
    const parts = [
      { resource: replicaGroups, store: stores.groups },
      { resource: pods, store: stores.pods },
      { resource: nodes, store: stores.nodes },
      { resource: services, store: stores.services },
      { resource: podDisruptionBudgets, store: stores.budgets },
      ...(stores.podGroups === undefined ? [] : [{ resource: podGroups, store: stores.podGroups }]),
    ].map((kind) => new Reflector({ api, clock: time, random, ...kind }).run(this.stop.signal));
    const bells = new GroupBells(stores);
    const lines = { begin: new Slots(1), create: new Slots(1) };
    sim.onNews = (group) => this.clusters.get(group.slice(NS.length + 1))?.ring();
    for (const [name, goal] of goals) {
      const group = `${NS}/${name}`;
      const tell = (status: GroupStatus | undefined): void => {
        if (status !== undefined && !this.stop.signal.aborted) bed.tell(name, refineStatus(status, cluster.cause));
      };
      const onCause = () => tell(this.#reconcilers.get(name)?.status);
      const cluster = new KubeCluster({ group, api, stores, gangs, bells, lines, links: sim, clock: time, onCause });
      this.clusters.set(name, cluster);
      const reconciler = new Reconciler(goal, {
        group,
        cluster,
        clock: time,
        limits: defaultLimits,
        onStatus: tell,
      });
      this.#reconcilers.set(name, reconciler);
      parts.push(reconciler.run(this.stop.signal));
    }
    this.ended = Promise.all(parts).then(() => {
      this.hasEnded = true;
      for (const cluster of this.clusters.values()) cluster.close();
    });
  }

  setGoal(group: string, goal: Goal): void {
    this.#reconcilers.get(group)?.setGoal(goal);
  }
}

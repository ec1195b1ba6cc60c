// Everything of a cluster in virtual time: API server, nodes, scheduler, kubelets, workers, a foreign tenant, and any number of
// controller processes, each with its own clock, network and pauses. Owns who lives and that invariants are looked at; what
// happens is whole-schedule.ts.
import { parseModelDeployment } from "../../../../controller/api/parse.ts";
import type { KubeApi, KubeObject, Resource } from "../../../../controller/kube/api/client.ts";
import { fieldsOf, textOf } from "../../../../controller/kube/api/fields.ts";
import {
  leases,
  modelDeployments,
  nodes,
  pods,
  replicaGroups,
  shardPlans,
} from "../../../../controller/kube/api/resources.ts";
import { gangLimits } from "../../../../controller/kube/gangs/reservations.ts";
import { parsedGroupOf } from "../../../../controller/kube/groups/group-record.ts";
import { groupsPart } from "../../../../controller/kube/groups/groups-part.ts";
import { parseTemplate } from "../../../../controller/kube/groups/worker-template.ts";
import { podFacts } from "../../../../controller/kube/inventory/pod-facts.ts";
import type { LeaseTimes } from "../../../../controller/kube/lease/lease.ts";
import { runController } from "../../../../controller/kube/run-controller.ts";
import type { WorkerLinks } from "../../../../controller/kube/workers/worker-link.ts";
import { FaultError, transient } from "../../../../proto/fault.ts";
import { WorkerPhase } from "../../../../proto/gen/muster/v1/worker.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { type FaultPlan, FaultyApi } from "../../../sim/faults.ts";
import { type PodFaults, SimPods } from "../../../sim/pods.ts";
import { type Pause, SimProcess } from "../../../sim/process.ts";
import { randomOf } from "../../../sim/random.ts";
import { seatOf } from "../../../sim/scheduling.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { node, pod } from "../objects.ts";
import { admit, modelAt, planner } from "../owners/deployment-bed.ts";
import { Invariants } from "./whole-invariants.ts";
import { Shown } from "./whole-shown.ts";

export const NS = "serving";
/** T of these schedules. */
const WHOLE_MS = 5_000;
/** What is closer together is one moment: many things happen at once here, as where a controller is busy. */
const STEP_MS = 10;
const LEASE: LeaseTimes = { leaseMs: 6_000, renewMs: 4_000, retryMs: 1_000 };
const TEMPLATE = parseTemplate("drainSeconds: 1", "worker@sha256:0");
export const GPUS = 4;

export type WholeOptions = {
  seed: number;
  nodes: number;
  podFaults: PodFaults;
  /** J2. */
  overdrawnMs: number;
  lateMs: number;
  /** Beyond T; how long the network may keep a leader from acting. */
  slackMs: number;
  /** What lies between a controller and its network: for tests of the checks. */
  between?: (api: KubeApi) => KubeApi;
};

export type Process = {
  name: string;
  api: FaultyApi;
  pauses: Pause[];
  ledSinceMs: number | undefined;
  stop: AbortController;
  /** What happens to it right after the server has taken so many more writes of it, before it knows. */
  atWrite: { left: number; run: () => void } | undefined;
};

/** Renewals and events say nothing of what it is at. */
const ASIDE: readonly string[] = ["Lease", "Event"];

export class WholeBed {
  readonly time = new VirtualClock(undefined, STEP_MS);
  readonly server = new SimApiServer(this.time, { admit });
  readonly random: () => number;
  readonly sim: SimPods;
  readonly invariants: Invariants;
  /** Those that have not died. */
  readonly processes: Process[] = [];
  readonly #options: WholeOptions;
  readonly #news = new Set<(group: string) => void>();
  readonly #stops: AbortController[] = [];
  #identities = 0;
  #asked = "";
  #wasAsWished = false;

  private constructor(options: WholeOptions) {
    this.#options = options;
    this.random = randomOf(options.seed);
    const { server, time, random } = this;
    this.sim = new SimPods({ server, time, random, faults: options.podFaults });
    this.sim.onNews = (group) => {
      for (const tell of this.#news) tell(group);
    };
    const { overdrawnMs, lateMs, slackMs } = options;
    const ledSinceMs = () => this.leader?.ledSinceMs;
    this.invariants = new Invariants({ server, time, wholeMs: WHOLE_MS, overdrawnMs, lateMs, slackMs, ledSinceMs });
    server.onChange(({ resource, after }) => {
      if (this.seatTaker !== undefined && resource.plural === "pods" && after !== undefined) this.#takeSeat(after);
    });
  }

  static async begin(options: WholeOptions): Promise<WholeBed> {
    const bed = new WholeBed(options);
    for (let index = 0; index < options.nodes; index++) {
      const wanted = node(`gpu-${index}`, { gpus: GPUS });
      const made = await bed.server.create(nodes, wanted, bed.never);
      await bed.server.replaceStatus(nodes, { ...made, status: wanted.status }, bed.never);
    }
    return bed;
  }

  /** Of this bed: what listens to it goes with it. */
  readonly never = new AbortController().signal;

  get broken(): string[] {
    return [...this.invariants.broken, ...this.sim.violations];
  }

  // ---- controllers ----

  /** `rate`: of its clock. */
  start(plan: FaultPlan, clockOf: { offsetMs: number; rate: number }): Process {
    const { time, invariants } = this;
    this.#identities += 1;
    const name = `controller-${this.#identities}`;
    const random = randomOf(this.#options.seed * 31 + this.#identities);
    const pauses: Pause[] = [];
    const api = new FaultyApi(this.server, { time, random, plan });
    const stop = new AbortController();
    const process: Process = { name, api, pauses, ledSinceMs: undefined, stop, atWrite: undefined };
    api.onWritten = ({ kind }) => {
      const { atWrite } = process;
      if (atWrite === undefined || ASIDE.includes(kind)) return;
      atWrite.left -= 1;
      if (atWrite.left > 0) return;
      process.atWrite = undefined;
      atWrite.run();
    };
    const clock = new SimProcess(time, { ...clockOf, pauses });
    const isReplaced = () => ![name, ""].includes(this.#holder);
    const shown = new Shown({ onBroken: (text) => invariants.fail(`${name}: ${text}`), isReplaced });
    const between = this.#options.between ?? ((below: KubeApi) => below);
    const part = groupsPart({
      clock,
      random,
      template: TEMPLATE,
      read: async (source) => {
        const model = modelAt(source);
        if (model === undefined) throw new FaultError(transient("down", "the source does not answer"));
        return model;
      },
      linksOf: (onNews) => {
        this.#news.add(onNews);
        return this.#linksOf(clock, isReplaced);
      },
      gangLimits: { ...gangLimits, wholeMs: WHOLE_MS },
    });
    const options = {
      api: shown.over(between(clock.see(api))),
      clock,
      random,
      planner,
      workerImage: "worker@sha256:0",
      identity: name,
      lease: { namespace: NS, name: "muster-controller", times: LEASE },
      onLead: (isLeading: boolean) => {
        process.ledSinceMs = isLeading ? time.nowMs() : undefined;
      },
      parts: [part],
    };
    runController(options, process.stop.signal).catch((error: unknown) => {
      const text = error instanceof Error ? `${error.stack}` : String(error);
      if (!process.stop.signal.aborted) invariants.fail(`${name} broke: ${text}`);
    });
    this.processes.push(process);
    this.#stops.push(process.stop);
    return process;
  }

  /** As SIGKILL: nothing of it runs on; what it has sent may still land. */
  kill(process: Process): void {
    process.pauses.push({ fromMs: this.time.nowMs(), untilMs: Number.POSITIVE_INFINITY });
    process.ledSinceMs = undefined;
    process.atWrite = undefined;
    this.processes.splice(this.processes.indexOf(process), 1);
  }

  /** Nothing of this cluster runs on, and nothing holds it any more. */
  end(): void {
    for (const process of [...this.processes]) this.kill(process);
    for (const stop of this.#stops) stop.abort();
  }

  /** A paused leader leads no more than a dead one, as far as bounds are concerned. */
  pause(process: Process, forMs: number): void {
    const fromMs = this.time.nowMs();
    process.pauses.push({ fromMs, untilMs: fromMs + forMs });
    if (process.ledSinceMs !== undefined) process.ledSinceMs = fromMs + forMs;
  }

  get leader(): Process | undefined {
    return this.processes.find(({ ledSinceMs }) => ledSinceMs !== undefined);
  }

  /** As the API server knows it; empty: nobody's. */
  get #holder(): string {
    return String(Object(this.of(leases, "muster-controller")?.spec).holderIdentity ?? "");
  }

  #linksOf(clock: SimProcess, isReplaced: () => boolean): WorkerLinks {
    const { sim, invariants } = this;
    return {
      describe: async (target, signal) => {
        await clock.awake();
        const answer = await sim.describe(target, signal);
        await clock.awake();
        return answer;
      },
      load: async (target, request, signal) => {
        // As it is sent: who is stopped between that and the wire sends what it may not; the worker refuses another's.
        if (isReplaced()) invariants.fail("J7: a Load is sent though another leads");
        invariants.checkLoad(target.name.group, request.incarnation);
        await clock.awake();
        await sim.load(target, request, signal);
        await clock.awake();
      },
      forget: () => sim.forget(),
    };
  }

  // ---- people, tenants, nodes ----

  async apply(name: string, spec: Record<string, unknown>): Promise<void> {
    const { server, never } = this;
    const object = {
      apiVersion: "muster.dev/v1alpha1",
      kind: "ModelDeployment",
      metadata: { name, namespace: NS },
      spec,
    };
    const there = this.of(modelDeployments, name);
    if (there === undefined) await server.create(modelDeployments, object, never);
    else if (there.metadata.deletionTimestamp === undefined)
      await server.replace(modelDeployments, { ...there, spec }, never);
  }

  async remove(name: string, propagationPolicy: "Background" | "Foreground"): Promise<void> {
    await this.server.delete(modelDeployments, name, NS, { propagationPolicy }, this.never);
  }

  /** A pod of somebody else asks for GPUs, as the scheduler gives them. */
  async tenant(name: string, gpus: number): Promise<void> {
    const { uid: _, resourceVersion: __, ...metadata } = pod(name, { gpus }).metadata;
    await this.server.create(pods, { ...pod(name, { gpus }), metadata }, this.never);
  }

  /** Of a tenant who takes all that is free where the next gate opens, before the scheduler comes to it; undefined: nobody. */
  seatTaker: string | undefined;

  #takeSeat(opened: KubeObject): void {
    const facts = podFacts(opened);
    const node = seatOf(opened);
    if (node === undefined || facts.node !== "" || facts.isLeaving || facts.gates.length > 0) return;
    const name = this.seatTaker ?? "";
    this.seatTaker = undefined;
    this.time.at(this.time.nowMs() + 1, () => {
      const there = this.server.objects(pods).map(podFacts);
      const held = there.filter((each) => each.node === node && !each.isOver).reduce((sum, { gpus }) => sum + gpus, 0);
      const wanted = pod(name, { gpus: GPUS - held, node });
      const { uid: _, resourceVersion: __, ...metadata } = wanted.metadata;
      if (held < GPUS) void this.server.create(pods, { ...wanted, metadata }, this.never);
    });
  }

  async tenantsLeave(): Promise<void> {
    for (const { metadata } of this.server.objects(pods).filter(({ metadata }) => metadata.namespace !== NS))
      await this.server.delete(pods, metadata.name, metadata.namespace, { gracePeriodSeconds: 0 }, this.never);
  }

  async cordon(name: string, isCordoned: boolean): Promise<void> {
    await this.server.patch(
      nodes,
      name,
      undefined,
      { spec: { unschedulable: isCordoned } },
      { type: "merge" },
      this.never,
    );
  }

  of(resource: Resource, name: string): KubeObject | undefined {
    return this.server.objects(resource).find(({ metadata }) => metadata.name === name);
  }

  // ---- what is looked at ----

  /** Everything that is wished for serves: of one plan, every rank of every replica, and that is said. */
  get isAsWished(): boolean {
    // Asked at every moment: nobody's mind is changed by time alone, but for the last worker that gets to serving.
    const seen = `${this.server.version} ${this.sim.workers.map(({ description: { phase } }) => phase).join()}`;
    if (this.#asked !== seen)
      this.#wasAsWished = this.server.objects(modelDeployments).every((object) => this.#isServed(object));
    this.#asked = seen;
    return this.#wasAsWished;
  }

  #isServed(object: KubeObject): boolean {
    // Read only where it may be so: this is asked at every change.
    if (!["Serving", "Stopped"].includes(textOf(fieldsOf(object.status).phase) ?? "")) return false;
    const owner = parseModelDeployment(object);
    if (owner.kind === "refused") return false;
    const { spec, status, metadata } = owner.value;
    if (status?.observedGeneration !== metadata.generation || status?.readyReplicas !== spec.replicas) return false;
    const groups = this.server
      .objects(replicaGroups)
      .filter(({ metadata: { ownerReferences } }) => ownerReferences?.some(({ uid }) => uid === metadata.uid));
    if (groups.length !== spec.replicas || status.phase !== (spec.replicas === 0 ? "Stopped" : "Serving")) return false;
    return groups.every((group) => {
      const parsed = parsedGroupOf(group);
      if (parsed.kind === "refused" || parsed.value.spec.plan !== status.planName) return false;
      const { phase, incarnation, placement } = parsed.value.status ?? {};
      const workers = this.sim.workers.filter(
        ({ group: of, description }) =>
          of === `${NS}/${group.metadata.name}` && description.incarnation === BigInt(incarnation ?? 0),
      );
      const isAll =
        workers.length === placement?.length &&
        workers.every(({ description }) => description.phase === WorkerPhase.SERVING);
      return phase === "Serving" && isAll;
    });
  }

  /** What is there of ours. */
  get left(): string[] {
    const ours = this.server.objects(pods).filter((object) => podFacts(object).namespace === NS);
    return [...ours, ...[modelDeployments, replicaGroups, shardPlans].flatMap((kind) => this.server.objects(kind))].map(
      ({ kind, metadata }) => `${kind} ${metadata.name}`,
    );
  }

  get saying(): string {
    const say = (object: KubeObject) => {
      const status: { phase?: unknown; cause?: unknown } = Object(object.status);
      return `${object.kind} ${object.metadata.name} ${JSON.stringify([object.spec, status.phase, status.cause]).slice(0, 600)}`;
    };
    return [modelDeployments, replicaGroups].flatMap((kind) => this.server.objects(kind).map(say)).join("\n");
  }
}

// A cluster for the deployments' shell: the simulated API server with the rules of our kinds, GPU nodes, and a player of what
// looks after single groups. Owns the invariants that hold at every change.
import { createHash } from "node:crypto";
import type { ReplicaGroup } from "../../../../controller/api/parse.ts";
import {
  editFault,
  parseModelDeployment,
  parseReplicaGroup,
  parseShardPlan,
} from "../../../../controller/api/parse.ts";
import {
  type KubeApi,
  KubeError,
  type KubeObject,
  keyOf,
  type Resource,
} from "../../../../controller/kube/api/client.ts";
import {
  draftPools,
  modelDeployments,
  nodes,
  replicaGroups,
  shardPlans,
} from "../../../../controller/kube/api/resources.ts";
import type { Planner } from "../../../../controller/kube/owners/plan-desk.ts";
import { type ControllerOptions, runController } from "../../../../controller/kube/run-controller.ts";
import { answerFor } from "../../../../controller/reconcile/deployment/planning.ts";
import { surgeMax } from "../../../../controller/reconcile/deployment/rollout.ts";
import { type ModelSpec, TokenizerSpec } from "../../../../proto/gen/muster/v1/plan.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { type ModelShape, modelSpec } from "../../plan/models.ts";
import { GroupPlayer } from "../groups/group-player.ts";

export const NS = "serving";
export const { signal: never } = new AbortController();

const SHAPE: ModelShape = {
  layers: 2,
  hidden: 256,
  heads: 8,
  kvHeads: 4,
  headDim: 32,
  vocab: 1024,
  ffn: 512,
  experts: 8,
  topK: 2,
  expertFfn: 256,
  sharedFfn: 256,
  contextTokens: 4096,
  valueBytes: 2,
  tied: false,
};

const withVocabulary = (name: string, vocabHash: bigint) => ({
  ...modelSpec(SHAPE, name),
  digest: createHash("sha256").update(name).digest("hex"),
  source: `builtin://${name}`,
  tokenizer: TokenizerSpec.create({ vocabHash }),
});
const MODELS = new Map(
  [withVocabulary("one", 7n), withVocabulary("two", 7n), withVocabulary("other", 9n)].map((spec) => [
    spec.source,
    spec,
  ]),
);

/** What `planner` plans, by source. */
export const modelAt = (source: string): ModelSpec | undefined => MODELS.get(source);

const answers = new Map<string, ReturnType<typeof answerFor>>();

/** The planner itself over models in memory; the same question on the same ground is answered once. */
export const planner: Planner = async (ask) => {
  const { url } = ask.question.source;
  const model = MODELS.get(url);
  if (model === undefined) return { kind: "failed", detail: `${url} does not answer` };
  const key = JSON.stringify(ask);
  const answer = answers.get(key) ?? answerFor(model, ask);
  answers.set(key, answer);
  return answer;
};

export function deployment(name: string, spec: Record<string, unknown> = {}): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ModelDeployment",
    metadata: { name, namespace: NS },
    spec: { model: { source: "builtin://one" }, gpu: { count: 4 }, ...spec },
  };
}

export function pool(name: string, source = "builtin://one"): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "DraftPool",
    metadata: { name, namespace: NS },
    spec: { model: { source } },
  };
}

function gpuNode(name: string, gpus: number): KubeObject {
  return {
    apiVersion: "v1",
    kind: "Node",
    metadata: { name, labels: { "nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "143771" } },
    status: {
      allocatable: { "nvidia.com/gpu": String(gpus) },
      capacity: { "nvidia.com/gpu": String(gpus) },
      conditions: [{ type: "Ready", status: "True" }],
    },
  };
}

/** What the rules of our kinds refuse. */
export function admit(object: KubeObject, before: KubeObject | undefined, resource: Resource): void {
  const refuse = (field: string, detail: string) =>
    new KubeError(422, "Invalid", `${resource.kind}: ${field}: ${detail}`);
  const parsed =
    resource === shardPlans || resource.kind === "ShardPlan"
      ? parseShardPlan(object)
      : resource.kind === "ReplicaGroup"
        ? parseReplicaGroup(object)
        : resource.kind === "ModelDeployment"
          ? parseModelDeployment(object)
          : undefined;
  if (parsed?.kind === "refused") throw refuse(parsed.fault.field, parsed.fault.detail);
  if (before === undefined) return;
  const { kind } = object;
  if (kind !== "ShardPlan" && kind !== "ReplicaGroup") return;
  const fault = editFault(kind, before.spec, object.spec);
  if (fault !== undefined) throw refuse(fault.field, fault.detail);
}

export type BedOptions = { seed: number; nodes?: number; gpus?: number; limits?: ControllerOptions["limits"] };

export type Running = { stop: AbortController; done: Promise<unknown>; failures: string[] };

export class Bed {
  readonly time = new VirtualClock();
  readonly server: SimApiServer;
  readonly random: () => number;
  /** Every change, for replays. */
  readonly log: string[] = [];
  readonly broken: string[] = [];
  readonly #player: GroupPlayer;
  readonly #ordinals = new Map<string, string>();
  readonly #wanted = new Map<string, number[]>();
  /** When statuses of owners were written. */
  readonly statusWrittenMs: number[] = [];
  #identities = 0;

  constructor({ seed }: BedOptions) {
    this.random = randomOf(seed);
    this.server = new SimApiServer(this.time, { admit });
    const onBroken = (text: string) => void this.broken.push(text);
    this.#player = new GroupPlayer({ server: this.server, time: this.time, random: this.random, onBroken });
    this.server.onChange(({ resource, before, after, object }) => {
      if (resource.kind !== "Lease")
        this.log.push(`${this.time.nowMs()} ${resource.plural}/${keyOf(object)} ${JSON.stringify(after ?? null)}`);
      this.#check(resource, before, after);
      this.#player.onChange(resource, after);
    });
  }

  async begin({ nodes: count = 4, gpus = 8 }: Partial<BedOptions> = {}): Promise<void> {
    for (let index = 0; index < count; index++) await this.addNode(`gpu-${index}`, gpus);
  }

  async addNode(name: string, gpus = 8): Promise<void> {
    const node = gpuNode(name, gpus);
    const made = await this.server.create(nodes, node, never);
    await this.server.replaceStatus(nodes, { ...made, status: node.status }, never);
  }

  /** Another process of the controller. */
  run(api: KubeApi, options: Partial<ControllerOptions> = {}): Running {
    const stop = new AbortController();
    const failures: string[] = [];
    this.#identities += 1;
    const done = runController(
      {
        api,
        clock: this.time,
        random: randomOf(Math.floor(this.random() * 2 ** 31)),
        planner,
        workerImage: "worker@sha256:0",
        identity: `controller-${this.#identities}`,
        lease: { namespace: NS, name: "muster-controller" },
        onFailure: (key, error) => failures.push(`${key}: ${error instanceof Error ? error.message : String(error)}`),
        ...options,
      },
      stop.signal,
    ).catch((error: unknown) => {
      if (!stop.signal.aborted) this.broken.push(error instanceof Error ? String(error.stack) : String(error));
    });
    return { stop, done, failures };
  }

  get groups(): ReplicaGroup[] {
    return this.server.objects(replicaGroups).map((object) => {
      const parsed = parseReplicaGroup(object);
      if (parsed.kind === "refused") throw new Error(parsed.fault.detail);
      return parsed.value;
    });
  }

  of(resource: Resource, name: string): KubeObject | undefined {
    return this.server.objects(resource).find(({ metadata }) => metadata.name === name);
  }

  /** What `kubectl cordon` and `uncordon` do. */
  async cordon(name: string, isCordoned = true): Promise<void> {
    const change = { spec: { unschedulable: isCordoned } };
    await this.server.patch(nodes, name, undefined, change, { type: "merge" }, never);
  }

  async edit(name: string, spec: Record<string, unknown>): Promise<void> {
    await this.server.patch(modelDeployments, name, NS, { spec }, { type: "merge", fieldManager: "person" }, never);
  }

  /** Serves exactly what is wished for, of one plan, and says so. */
  isConverged(name: string): boolean {
    const object = this.of(modelDeployments, name);
    const parsed = parseModelDeployment(object);
    if (parsed.kind === "refused") return false;
    const { status, spec, metadata } = parsed.value;
    const groups = this.groups.filter(({ spec: { owner } }) => owner.name === name);
    const isAll =
      groups.length === spec.replicas &&
      groups.every((group) => group.status?.phase === "Serving" && group.spec.plan === status?.planName);
    const phase = spec.replicas === 0 ? "Stopped" : "Serving";
    const isSaid =
      status?.phase === phase && status.readyReplicas === spec.replicas && status.replicas === spec.replicas;
    return (
      isAll &&
      isSaid &&
      status.observedGeneration === metadata.generation &&
      this.#isWantedSource(spec, status.planName)
    );
  }

  #isWantedSource(spec: { model: { source: string } }, planName: string | undefined): boolean {
    const plan = this.of(shardPlans, planName ?? "");
    const parsed = plan === undefined ? undefined : parseShardPlan(plan);
    return parsed?.kind === "ok" && parsed.value.spec.model.source === spec.model.source;
  }

  #check(resource: Resource, before: KubeObject | undefined, after: KubeObject | undefined): void {
    const fail = (text: string) => this.broken.push(`at ${this.time.nowMs()}: ${text}`);
    if (
      resource.kind === "ShardPlan" &&
      before &&
      after &&
      JSON.stringify(before.spec) !== JSON.stringify(after.spec)
    ) {
      fail(`the stored plan ${after.metadata.name} was rewritten`);
    }
    if (resource.kind === "ModelDeployment" && after) {
      if (JSON.stringify(before?.status) !== JSON.stringify(after.status)) this.statusWrittenMs.push(this.time.nowMs());
      const parsed = parseModelDeployment(after);
      if (parsed.kind === "ok" && (before === undefined || before.metadata.generation !== after.metadata.generation)) {
        const { name } = after.metadata;
        this.#wanted.set(name, [...(this.#wanted.get(name) ?? []), parsed.value.spec.replicas]);
      }
    }
    if (resource.kind !== "ReplicaGroup" || after === undefined) return;
    const parsed = parseReplicaGroup(after);
    if (parsed.kind === "refused") {
      fail(parsed.fault.detail);
      return;
    }
    const { spec, metadata } = parsed.value;
    if (before === undefined) this.#checkNew(spec, metadata.uid ?? "", fail);
    else if (spec.state === "Draining" && JSON.stringify(before.spec) !== JSON.stringify(after.spec))
      this.#checkDrain(before, fail);
  }

  /** Within the newest two wishes: the controller may not have seen the newest. */
  #bounds(owner: string): number[] {
    return (this.#wanted.get(owner) ?? []).slice(-2);
  }

  #checkNew(spec: ReplicaGroup["spec"], uid: string, fail: (text: string) => void): void {
    const used = `${spec.owner.kind}/${spec.owner.name}/${spec.ordinal}`;
    if (this.#ordinals.has(used)) fail(`ordinal ${used} is used again`);
    this.#ordinals.set(used, uid);
    if (spec.owner.kind !== "ModelDeployment") return;
    const count = this.groups.filter(({ spec: { owner } }) => owner.name === spec.owner.name).length;
    const most = Math.max(...this.#bounds(spec.owner.name).map((wanted) => wanted + surgeMax(wanted)));
    if (count > most) fail(`${count} groups, at most ${most} are allowed`);
  }

  /** A group that serves is drained only where enough others serve, or fewer are wanted; only where a rollout is a surge. */
  #checkDrain(before: KubeObject, fail: (text: string) => void): void {
    const group = parseReplicaGroup(before);
    if (group.kind === "refused" || group.value.spec.owner.kind !== "ModelDeployment") return;
    if (group.value.status?.phase !== "Serving") return;
    const owner = parseModelDeployment(this.of(modelDeployments, group.value.spec.owner.name));
    if (owner.kind === "refused" || owner.value.spec.rollout.kind !== "surge") return;
    const serving = this.groups.filter(
      ({ spec, status, metadata }) =>
        spec.owner.name === group.value.spec.owner.name &&
        spec.state === "Serving" &&
        status?.phase === "Serving" &&
        metadata.uid !== before.metadata.uid,
    );
    const least = Math.min(...this.#bounds(group.value.spec.owner.name));
    if (serving.length < least)
      fail(`${before.metadata.name} was drained while ${serving.length} of ${least} others serve`);
  }
}

export const HOUR_MS = 3_600_000;

export function statusOf(bed: Bed, name = "chat") {
  const parsed = parseModelDeployment(bed.of(modelDeployments, name));
  if (parsed.kind === "refused") throw new Error(parsed.fault.detail);
  return parsed.value.status ?? {};
}

export async function converged(bed: Bed, name = "chat"): Promise<void> {
  await bed.time.runTill(() => bed.isConverged(name), `${name} serves as wished`, HOUR_MS);
}

export { draftPools, modelDeployments, replicaGroups, shardPlans };

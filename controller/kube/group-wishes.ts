// What is wanted of one group, from its owner, its plan and the installation: pods and places (GroupWish), and what its
// workers are told (Goal). Pure. Owns what comes from whom: the cut and the image are the plan's for ever; engine options,
// limits, priority and pod wishes are the owner's as it is now, for incarnations that begin from now on.
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import type { EngineOptions, ServeLimits } from "../../proto/gen/muster/v1/worker.ts";
import {
  type Broker,
  deploymentWish,
  draftOptions,
  type NodeWish,
  poolToken,
  poolWish,
  speculationOptions,
} from "../api/mapping.ts";
import { parseDraftPool, parseModelDeployment, type ReplicaGroup } from "../api/parse.ts";
import type { ShardPlanSpec } from "../api/shard-plan.ts";
import { DRAFT_POOL, DRAIN_UNTIL } from "../reconcile/deployment/wish.ts";
import type { Goal } from "../reconcile/world.ts";
import type { KubeObject } from "./client.ts";
import { millisOf } from "./fields.ts";
import type { GroupWish } from "./gang.ts";
import { devicesOf, type PodWishes, selectionOf, type WorkerIdentity, type WorkerTemplate, workerPod } from "./pods.ts";

export type OwnerOrder = {
  pods: PodWishes;
  priority: number;
  within: NodeWish["within"];
  engine: EngineOptions;
  /** Undefined: it drafts for others. */
  limits: ServeLimits | undefined;
};

/** Undefined where the spec cannot be read: what was known stays (R8). */
export function orderOf(owner: KubeObject): OwnerOrder | undefined {
  const object = { ...owner, status: undefined };
  if (owner.kind === "DraftPool") {
    const parsed = parseDraftPool(object);
    if (parsed.kind === "refused") return undefined;
    const { nodes, engine, podPatch } = poolWish(parsed.value.spec);
    const pods = { gpu: parsed.value.spec.gpu, patch: podPatch };
    return { pods, priority: 0, within: nodes.within, engine, limits: undefined };
  }
  const parsed = parseModelDeployment(object);
  if (parsed.kind === "refused") return undefined;
  const { nodes, engine, limits, priority, podPatch } = deploymentWish(parsed.value.spec);
  return { pods: { gpu: parsed.value.spec.gpu, patch: podPatch }, priority, within: nodes.within, engine, limits };
}

/** Needs no model: what is reserved stays reserved while its source cannot be read. */
export function wishOf(
  { spec }: ReplicaGroup,
  plan: ShardPlanSpec,
  order: OwnerOrder,
  installed: WorkerTemplate,
): GroupWish {
  const template = { ...installed, image: plan.image === "" ? installed.image : plan.image };
  const outline = outlineOf(plan);
  const who = { owner: spec.owner, planName: spec.plan, plan: outline };
  return {
    devices: devicesOf(outline),
    priority: order.priority,
    selection: selectionOf(order.pods),
    within: order.within,
    port: template.port,
    podOf: (group, incarnation, worker) => workerPod({ ...who, group, incarnation, worker }, template, order.pods),
  };
}

/** Ranks by worker as shardsOf deals them, without what each holds. */
function outlineOf({ cut, workers }: ShardPlanSpec): WorkerIdentity["plan"] {
  const nothing = undefined;
  const ranges = {
    heads: nothing,
    kvHeads: nothing,
    vocab: nothing,
    denseFfn: nothing,
    sharedFfn: nothing,
    expertFfn: nothing,
  };
  const ranks = Array.from({ length: cut.world }, (_, rank) => {
    return { rank, worker: Math.floor((rank * workers) / cut.world), experts: [], ...ranges };
  });
  return { workers, ranks };
}

/** `broker`: undefined where the installation has none; then nobody guesses for anybody. */
export function serveGoal(
  group: ReplicaGroup,
  plan: ShardPlan,
  { engine, limits }: OwnerOrder,
  broker: Broker | undefined,
): Goal {
  const { owner } = group.spec;
  const namespace = group.metadata.namespace ?? "";
  if (owner.kind === "DraftPool") {
    if (broker === undefined)
      return { kind: "infeasible", detail: "a DraftPool needs NATS: start the controller with --nats-url" };
    const draft = draftOptions(poolToken(namespace, owner.name), broker);
    return { kind: "serve", plan, engine, speculation: undefined, limits: undefined, draft };
  }
  const pool = group.metadata.annotations?.[DRAFT_POOL];
  const speculation =
    pool === undefined || broker === undefined ? undefined : speculationOptions(poolToken(namespace, pool), broker);
  return { kind: "serve", plan, engine, speculation, limits };
}

export function stopGoal(group: ReplicaGroup, nowMs: number): Goal {
  const untilMs = millisOf(group.metadata.annotations?.[DRAIN_UNTIL]) ?? nowMs;
  return { kind: "stop", graceMs: Math.max(0, untilMs - nowMs) };
}

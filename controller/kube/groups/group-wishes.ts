// What is wanted of one group, from its owner, its plan and the installation: pods and places (GroupWish), and what its
// workers are told (Goal). Pure. Owns what comes from whom: the cut and the image are the plan's for ever; engine options,
// limits, priority and pod wishes are the owner's as it is now, for incarnations that begin from now on.
import type { ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import type { EngineOptions, ServeLimits } from "../../../proto/gen/muster/v1/worker.ts";
import {
  type Broker,
  deploymentWish,
  draftOptions,
  type NodeWish,
  poolToken,
  poolWish,
  speculationOptions,
} from "../../api/mapping.ts";
import { parseDraftPool, parseModelDeployment, type ReplicaGroup } from "../../api/parse.ts";
import type { ShardPlanSpec } from "../../api/shard-plan.ts";
import { DRAFT_POOL, DRAIN_UNTIL, POOL_DRAIN_MS } from "../../reconcile/deployment/wish.ts";
import type { Goal } from "../../reconcile/world.ts";
import type { KubeObject } from "../api/client.ts";
import { millisOf } from "../api/fields.ts";
import type { GroupWish } from "../gangs/gang.ts";
import type { NodeTerm } from "../sources/volumes.ts";
import { besideOf } from "./group-objects.ts";
import { devicesOf, type PodWishes, selectionOf, type WorkerIdentity, type WorkerTemplate, workerPod } from "./pods.ts";

export type OwnerOrder = {
  pods: PodWishes;
  priority: number;
  within: NodeWish["within"];
  engine: EngineOptions;
  /** Undefined: it drafts for others. */
  limits: ServeLimits | undefined;
  /** How long its streams may run on after a pod is told to end: then the worker ends them and says so. */
  drainMs: number;
  /** Experts are moved by their measured load. */
  movesExperts: boolean;
  /** Nodes that the volume of the plan's model reaches. */
  volume?: readonly NodeTerm[] | undefined;
};

/** Undefined where the spec cannot be read: what was known stays (R8). */
export function orderOf(owner: KubeObject): OwnerOrder | undefined {
  const object = { ...owner, status: undefined };
  if (owner.kind === "DraftPool") {
    const parsed = parseDraftPool(object);
    if (parsed.kind === "refused") return undefined;
    const { nodes, engine, podPatch, source } = poolWish(parsed.value.spec);
    const pods = { gpu: parsed.value.spec.gpu, patch: podPatch, source };
    const own = { limits: undefined, drainMs: POOL_DRAIN_MS, movesExperts: false };
    return { pods, priority: 0, within: nodes.within, engine, ...own };
  }
  const parsed = parseModelDeployment(object);
  if (parsed.kind === "refused") return undefined;
  const { nodes, engine, limits, priority, podPatch, source, ...rest } = deploymentWish(parsed.value.spec);
  const pods = { gpu: parsed.value.spec.gpu, patch: podPatch, source };
  const { rollout, movesExperts } = rest;
  return { pods, priority, within: nodes.within, engine, limits, drainMs: rollout.drainMs, movesExperts };
}

/** Needs no model: what is reserved stays reserved while its source cannot be read. */
export function wishOf(
  { spec }: ReplicaGroup,
  plan: ShardPlanSpec,
  order: OwnerOrder,
  installed: WorkerTemplate,
): GroupWish {
  const image = plan.image === "" ? installed.image : plan.image;
  const template = { ...installed, image, drainSeconds: Math.ceil(order.drainMs / 1000) };
  const outline = outlineOf(plan);
  const who = { owner: spec.owner, planName: spec.plan, plan: outline };
  // The plan says where its weights lie, the owner what opens it.
  const pods = { ...order.pods, source: { url: plan.model.source, secret: order.pods.source?.secret } };
  return {
    devices: devicesOf(outline),
    priority: order.priority,
    selection: { ...selectionOf(order.pods), volume: order.volume },
    within: order.within,
    port: template.port,
    podOf: (group, incarnation, worker) => workerPod({ ...who, group, incarnation, worker }, template, pods),
    besideOf: (group, incarnation) =>
      besideOf({ ...who, group }, { incarnation, workers: outline.workers, port: template.port, pods: order.pods }),
  };
}

type Outline = WorkerIdentity["plan"];

const outlines = new WeakMap<ShardPlanSpec, Outline>();

/** Once for each plan: thousands of groups share one, and every look at a group asks for it several times. */
function outlineOf(plan: ShardPlanSpec): Outline {
  const known = outlines.get(plan) ?? outlined(plan);
  outlines.set(plan, known);
  return known;
}

/** Ranks by worker as shardsOf deals them, without what each holds. */
function outlined({ cut, workers }: ShardPlanSpec): Outline {
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

/** A controller that hears a group names the rank that stands still first; the engines' own bounds stand behind it. */
const PATIENT = { stallReportMs: 10_000, stallGiveUpMs: 20_000 };

/**
 * `broker`: undefined where the installation has none; then nobody guesses for anybody. `reportsAddress`: where leaders
 * report; undefined: nowhere.
 */
export function serveGoal(
  group: ReplicaGroup,
  plan: ShardPlan,
  order: OwnerOrder,
  { broker, reportsAddress }: { broker?: Broker | undefined; reportsAddress?: string | undefined },
): Goal {
  const { owner } = group.spec;
  const { limits } = order;
  const namespace = group.metadata.namespace ?? "";
  const isHeard = reportsAddress !== undefined;
  const engine = isHeard ? { ...order.engine, ...PATIENT } : order.engine;
  const reports = isHeard ? { address: reportsAddress, namespace, group: group.metadata.name } : undefined;
  if (owner.kind === "DraftPool") {
    if (broker === undefined)
      return { kind: "infeasible", detail: "a DraftPool needs NATS: start the controller with --nats-url" };
    const draft = draftOptions(poolToken(namespace, owner.name), broker);
    return { kind: "serve", plan, engine, speculation: undefined, limits: undefined, draft, reports };
  }
  const pool = group.metadata.annotations?.[DRAFT_POOL];
  const speculation =
    pool === undefined || broker === undefined ? undefined : speculationOptions(poolToken(namespace, pool), broker);
  return { kind: "serve", plan, engine, speculation, limits, reports };
}

export function stopGoal(group: ReplicaGroup, nowMs: number): Goal {
  const untilMs = millisOf(group.metadata.annotations?.[DRAIN_UNTIL]) ?? nowMs;
  return { kind: "stop", graceMs: Math.max(0, untilMs - nowMs) };
}

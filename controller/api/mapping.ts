// From what a user wrote to what the planner, the workers and the reconciler are asked. Pure. Owns the answer to "what does
// this field do?": every field either changes the answer here or is named in NOT_YET with the reason, which the controller
// states in status; nothing is ignored silently. test/controller/api/mapping.test.ts walks all fields.
import { invalid } from "../../proto/fault.ts";
import type { ModelSpec, Prediction } from "../../proto/gen/muster/v1/plan.ts";
import {
  DraftOptions,
  EngineOptions,
  type Fault,
  type ServeLimits,
  SpeculationOptions,
} from "../../proto/gen/muster/v1/worker.ts";
import type { DraftPoolSpec } from "./draft-pool.ts";
import { durationSeconds } from "./fields.ts";
import type { Autoscale, GpuWish, ModelDeploymentSpec, ModelWish, Notice, Parallelism } from "./model-deployment.ts";
import type { PodPatch } from "./pod-patch.ts";

/** Requests that wait for admission at one replica: at a few seconds each a longer queue is a time-out, not a service. */
const QUEUE_MAX = 256;
/** Rows of one step at least, so that a low concurrency still fills a step with prompt chunks. */
const ROWS_MIN = 64;
/** Draft tokens that a step may verify for each sequence; the engine's buffers are sized from it. */
const VERIFY_MAX = 8;
const DRAFT_TOKENS = 4;
const DRAFT_WAIT_MS = 20;
/** Sequences that one draft follows at once. */
const DRAFT_SESSIONS = 64;

/** Goes into `wishesOf` of controller/plan. */
export type PlanWish = {
  contextTokens: number | undefined;
  concurrency: number;
  expertCopies: number;
  pins: Parallelism & { ranks?: number | undefined; workers?: number | undefined };
};

/** Which nodes may be planned for. */
export type NodeWish = {
  product: string | undefined;
  nodeSelector: Readonly<Record<string, string>>;
  tolerations: NonNullable<GpuWish["tolerations"]>;
  within: "any" | "zone" | "nvlink";
};

export type SourceWish = {
  /** The revision is part of it. */
  url: string;
  secret: { name: string; key: string } | undefined;
};

export type Scale = { kind: "fixed"; replicas: number } | ({ kind: "auto" } & Autoscale);

export type DeploymentWish = {
  source: SourceWish;
  format: ModelDeploymentSpec["format"];
  plan: PlanWish;
  /** Of a GPU's memory; kvBytesOf makes bytes of it when the GPU is known. */
  kvFraction: number | undefined;
  /** Experts move by their measured load while the group serves. */
  movesExperts: boolean;
  slo: { ttftMs: number | undefined; itlMs: number | undefined };
  nodes: NodeWish;
  engine: EngineOptions;
  limits: ServeLimits;
  /** Name of the DraftPool. */
  draftPool: string | undefined;
  scale: Scale;
  rollout: { kind: "surge" | "inPlace"; drainMs: number };
  priority: number;
  podPatch: PodPatch | undefined;
  notYet: readonly Notice[];
};

export function deploymentWish(spec: ModelDeploymentSpec): DeploymentWish {
  const { slo, speculation, rollout } = spec;
  return {
    source: sourceWish(spec.model),
    format: spec.format,
    plan: {
      contextTokens: slo.contextTokens,
      concurrency: slo.concurrency,
      expertCopies: spec.experts.redundant,
      pins: { ...spec.parallelism, ranks: spec.gpu?.count, workers: spec.gpu?.topology?.nodes },
    },
    kvFraction: spec.kvCache.fraction,
    movesExperts: spec.experts.balancing === "measured",
    slo: { ttftMs: slo.ttftMs, itlMs: slo.itlMs },
    nodes: nodeWish(spec.gpu),
    engine: engineOptions(slo.concurrency),
    limits: { queueMax: QUEUE_MAX, runningMax: slo.concurrency },
    draftPool: speculation.draftPool,
    scale:
      spec.autoscale === undefined ? { kind: "fixed", replicas: spec.replicas } : { kind: "auto", ...spec.autoscale },
    rollout: { kind: rollout.kind, drainMs: (durationSeconds(rollout.drainTimeout) ?? 0) * 1000 },
    priority: spec.priority,
    podPatch: spec.podPatch,
    notYet: NOT_YET.flatMap(({ field, isAsked, message }) =>
      isAsked(spec) ? [{ field, kind: "NotYet" as const, message }] : [],
    ),
  };
}

export type PoolWish = {
  source: SourceWish;
  plan: PlanWish;
  nodes: NodeWish;
  engine: EngineOptions;
  replicas: number;
  /** Undefined: its model's own. */
  vocabularies: readonly string[] | undefined;
  podPatch: PodPatch | undefined;
  notYet: readonly Notice[];
};

export function poolWish(spec: DraftPoolSpec): PoolWish {
  return {
    source: sourceWish(spec.model),
    plan: { contextTokens: undefined, concurrency: DRAFT_SESSIONS, expertCopies: 0, pins: { ranks: 1, workers: 1 } },
    nodes: nodeWish(spec.gpu),
    engine: engineOptions(DRAFT_SESSIONS),
    replicas: spec.replicas,
    vocabularies: spec.vocabularies,
    podPatch: spec.podPatch,
    notYet: [],
  };
}

/** The revision goes after the repository, where an hf:// source takes it. */
function sourceWish({ source, revision, auth }: ModelWish): SourceWish {
  const [, repository = source, file = ""] = /^(hf:\/\/[^/]+\/[^/]+)(\/.*)?$/.exec(source) ?? [];
  const url = revision === undefined ? source : `${repository}@${revision}${file}`;
  return { url, secret: auth && { name: auth.secretName, key: auth.key } };
}

function nodeWish(gpu: GpuWish | undefined): NodeWish {
  return {
    product: gpu?.product,
    nodeSelector: gpu?.nodeSelector ?? {},
    tolerations: gpu?.tolerations ?? [],
    within: gpu?.topology?.within ?? "any",
  };
}

/** Threads, backend and instruction set are the worker's to choose from what its pod has. */
function engineOptions(concurrency: number): EngineOptions {
  return EngineOptions.create({
    rowsMax: Math.max(concurrency, ROWS_MIN),
    verifyMax: VERIFY_MAX,
    slotsMax: concurrency * 2 + 2, // each sequence, its successor while it ends, padding, scoring
  });
}

/** Without a user the token alone says who clients are. */
export type Broker = { url: string; user?: string | undefined; token: string };

/** One word, because it stands in NATS subjects; names of owners have neither "_" nor ".". */
export function poolToken(namespace: string, pool: string): string {
  return `${namespace}_${pool}`;
}

export function speculationOptions(pool: string, { url, user = "", token }: Broker): SpeculationOptions {
  return SpeculationOptions.create({
    enabled: true,
    natsUrl: url,
    natsUser: user,
    natsToken: token,
    pool,
    draftTokens: DRAFT_TOKENS,
    draftWaitMs: DRAFT_WAIT_MS,
  });
}

export function draftOptions(pool: string, { url, user = "", token }: Broker): DraftOptions {
  return DraftOptions.create({
    natsUrl: url,
    natsUser: user,
    natsToken: token,
    pool,
    sessionsMax: DRAFT_SESSIONS,
    draftTokensMax: VERIFY_MAX,
  });
}

/** KV bytes of each rank for `kvFraction`; undefined leaves it to what context and concurrency need. */
export function kvBytesOf(kvFraction: number | undefined, gpuMemoryBytes: number): number | undefined {
  return kvFraction === undefined ? undefined : Math.floor(kvFraction * gpuMemoryBytes);
}

// ---- what is asked of the model once its headers are known ----

/** Weights are served as they are stored: a wish for others is a person's to resolve. */
export function formatFault(wish: ModelDeploymentSpec["format"], model: ModelSpec): Fault | undefined {
  const [container = "", stored = ""] = model.format.toLowerCase().split(/,? (?=\S+$)/);
  const has = `${model.source} has ${model.format}`;
  const advice = "nothing is converted: name a source that has it, or write auto";
  if (wish.container !== "auto" && wish.container !== container)
    return invalid("spec.format.container", `${has}, not ${wish.container}; ${advice}`);
  if (wish.quantisation !== "auto" && wish.quantisation.toLowerCase() !== stored)
    return invalid("spec.format.quantisation", `${has}, not ${wish.quantisation}; ${advice}`);
  return undefined;
}

/** Where the prediction misses what is wished for: said in status, because the planner has no faster cut. */
export function sloNotices(slo: DeploymentWish["slo"], prediction: Prediction): Notice[] {
  const over = (field: string, wished: number | undefined, predicted: number): Notice[] => {
    if (wished === undefined || predicted <= wished) return [];
    const message = `${predicted.toFixed(1)} ms are predicted, ${wished} ms are wished for: lower concurrency, or give it more or faster GPUs`;
    return [{ field, kind: "Needed", message }];
  };
  return [
    ...over("spec.slo.ttftMs", slo.ttftMs, prediction.ttftMs),
    ...over("spec.slo.itlMs", slo.itlMs, prediction.itlMs),
  ];
}

// ---- what has no effect yet ----

export type NotYet = { field: string; isAsked: (spec: ModelDeploymentSpec) => boolean; message: string };

/** A field leaves this table in the change that gives it an effect. */
export const NOT_YET: readonly NotYet[] = [
  {
    field: "spec.kvCache.dtype",
    isAsked: ({ kvCache }) => kvCache.dtype !== "auto",
    message: "the engine has one KV type for each backend; this one is not used",
  },
  {
    field: "spec.kvCache.offload",
    isAsked: ({ kvCache }) => kvCache.offload !== undefined,
    message: "cold KV blocks are dropped and computed again, not moved to host memory",
  },
  {
    field: "spec.speculation.method",
    isAsked: ({ speculation }) => speculation.method !== undefined && speculation.method !== "none",
    message: "guesses come from a DraftPool only; this method is not used",
  },
  {
    field: "spec.speculation.lossless",
    isAsked: ({ speculation }) => speculation.lossless === "L2",
    message: "nothing is switched: the CPU engine always gives the same bits, and no other engine does yet",
  },
];

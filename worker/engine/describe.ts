// From a ShardPlan and a worker's slices to the plain objects that the addon reads (native/addon/parse.cpp). Pure. Enum numbers
// are those of plan.proto on both sides; what is plan-only is refused here by name.
import {
  type AttentionSpec,
  type BlockSpec,
  type ExpertMap,
  MaskSpec_Kind,
  type ModelSpec,
  type Range,
  type RankShard,
  RopeSpec_Layout,
  type ShardPlan,
} from "../../proto/gen/muster/v1/plan.ts";
import type { EngineOptions, TensorSlice } from "../../proto/gen/muster/v1/worker.ts";
import { EngineError, type EngineRequest } from "./engine.ts";
import { sharesOf } from "./expert-map.ts";

/** Steps that may be launched before the first of them is done. */
const IN_FLIGHT_MAX = 2;
const EMPTY: Range = { begin: 0, end: 0 };

const refusal = (code: "invalid" | "unsupported", field: string, detail: string): EngineError =>
  new EngineError({ code, field, detail, rank: -1 });

/** The first argument of the addon's open. Throws EngineError where the plan cannot be served. */
export function describe({ plan, worker, slices, options, comm }: EngineRequest) {
  const { model } = plan;
  if (model === undefined) throw refusal("invalid", "plan.model", "is not set");
  if (model.planOnly !== "") throw refusal("unsupported", "plan.model", model.planOnly);
  return {
    model: describeModel(model, plan),
    group: describeGroup(plan, worker),
    options: describeOptions(options, plan),
    files: describeFiles(model),
    slices: slices.map((slice, i) => describeSlice(slice, model, `slices[${i}]`)),
    kvBlocks: plan.kvBlocks,
    incarnation: comm?.incarnation ?? 0n,
    addresses: comm?.addresses ?? [],
  };
}

function describeModel(model: ModelSpec, plan: ShardPlan) {
  return {
    name: model.name,
    vocab: model.vocabSize,
    hidden: model.hiddenSize,
    contextTokens: plan.contextTokens || model.contextTokens,
    normEps: model.normEps,
    tiedHead: model.tiedHead,
    blocks: model.blocks.map((block, i) => describeBlock(block, `plan.model.blocks[${i}]`)),
    kvGroups: model.kvGroups.map(({ blocks, kvHeads, headDim }) => ({ blocks, kvHeads, headDim })),
  };
}

function describeBlock(block: BlockSpec, at: string) {
  if (block.attention === undefined) throw refusal("invalid", `${at}.attention`, "is not set");
  const attention = describeAttention(block.attention);
  if (block.mlp?.$case === "dense") return { attention, denseFfn: block.mlp.value.ffn };
  if (block.mlp?.$case !== "moe") throw refusal("invalid", `${at}.mlp`, "is not set");
  const { experts, topK, expertFfn, sharedFfn, score, bias, groups, scale } = block.mlp.value;
  if (bias || groups > 1) throw refusal("unsupported", `${at}.moe`, "a router with a bias or with expert groups");
  if (scale !== 0 && scale !== 1) throw refusal("unsupported", `${at}.moe.scale`, `routed outputs scaled by ${scale}`);
  return { attention, denseFfn: 0, moe: { experts, topK, expertFfn, sharedFfn, score } };
}

function describeAttention(spec: AttentionSpec) {
  return {
    heads: spec.heads,
    kvHeads: spec.kvHeads,
    headDim: spec.headDim,
    scale: spec.scale,
    rope: spec.rope?.layout || RopeSpec_Layout.NONE,
    ropeDims: spec.rope?.dims ?? 0,
    ropeFrequencies: spec.rope?.frequencies ?? [],
    mask: spec.mask?.kind || MaskSpec_Kind.FULL,
    maskSpan: spec.mask?.span ?? 0,
    qkUnitNorm: spec.qkUnitNorm,
    temperatureScale: spec.temperatureScale,
    temperatureFloor: spec.temperatureFloor,
    kvGroup: spec.kvGroup,
  };
}

function describeGroup(plan: ShardPlan, worker: number) {
  const ranks = plan.ranks.toSorted((a, b) => a.rank - b.rank);
  return {
    world: ranks.length,
    worker,
    workers: Math.max(1, plan.workers),
    workerOfRank: ranks.map((rank) => rank.worker),
    local: ranks.filter((rank) => rank.worker === worker).map(describeShard),
  };
}

function describeShard(shard: RankShard) {
  return {
    rank: shard.rank,
    heads: shard.heads ?? EMPTY,
    kvHeads: shard.kvHeads ?? EMPTY,
    vocab: shard.vocab ?? EMPTY,
    denseFfn: shard.denseFfn ?? EMPTY,
    sharedFfn: shard.sharedFfn ?? EMPTY,
    experts: shard.experts,
    expertFfn: shard.expertFfn ?? EMPTY,
  };
}

// Zero asks for the default, which is the native one (native/include/muster/engine.h) or the one stated here.
function describeOptions(options: EngineOptions, plan: ShardPlan) {
  return {
    threads: options.threads,
    backend: options.backend || "cpu",
    isa: options.isa,
    kvBlockTokens: plan.kvBlockTokens || 16,
    rowsMax: options.rowsMax || 64,
    tokensMax: options.tokensMax || 512,
    verifyMax: options.verifyMax || 8,
    slotsMax: options.slotsMax || 128,
    logprobsMax: options.logprobsMax || 21,
    inFlightMax: IN_FLIGHT_MAX,
    stallReportMs: options.stallReportMs || 5_000,
    stallGiveUpMs: options.stallGiveUpMs || 10_000,
  };
}

/** The second argument of the addon's stage. */
export function describeStage({ plan, worker }: EngineRequest, map: ExpertMap, slices: readonly TensorSlice[]) {
  const { model } = plan;
  if (model === undefined) throw refusal("invalid", "plan.model", "is not set");
  return {
    version: map.version,
    shares: sharesOf(map, plan, worker),
    files: describeFiles(model),
    slices: slices.map((slice, i) => describeSlice(slice, model, `slices[${i}]`)),
  };
}

const describeFiles = (model: ModelSpec) => model.files.map(({ path, bytes }) => ({ path, bytes }));

function describeSlice(slice: TensorSlice, model: ModelSpec, at: string) {
  const tensor = model.tensors[slice.tensor];
  if (tensor === undefined)
    throw refusal("invalid", `${at}.tensor`, `${slice.tensor} of ${model.tensors.length} tensors`);
  return {
    rank: slice.rank,
    role: tensor.role,
    type: tensor.type,
    block: tensor.block,
    expert: tensor.expert,
    file: tensor.file,
    offset: tensor.offset,
    rows: tensor.rows,
    cols: tensor.cols,
    rowsStored: tensor.rowsStored,
    rowFirst: tensor.rowFirst,
    transposed: tensor.transposed,
    keepRows: slice.rows ?? EMPTY,
    keepCols: slice.cols ?? EMPTY,
    name: tensor.name,
  };
}

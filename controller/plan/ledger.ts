// The byte ledger: what one rank holds, class by class. Owns every byte formula of the planner. Weights are exact: sums over
// the parts of planes that the rank keeps. The rest is sized from bounds that hold for every step.
//
//   B1  the lines of a rank add up to `used`; there is nothing beside them.
//   B2  a plan fits iff used <= capacity on every rank; capacity is all of the device, the reserve is a line.
//
// Weights kept of a plane: rows kept x the covering groups of GROUP columns x stored bytes of an element. A cut inside a
// group keeps the whole group on both sides, because its scale serves both; superblock scales count by share.
import {
  LedgerClass,
  type ModelSpec,
  type RankLedger,
  type RankShard,
  ShardRule,
  TensorRole,
  type TensorSpec,
} from "../../proto/gen/muster/v1/plan.ts";
import { keptBy } from "../model/shards.ts";
import type { StepBounds } from "./wishes.ts";

export type Backend = "gpu" | "cpu";

/** Bytes by class; classes that are not there hold nothing. */
export type Lines = ReadonlyMap<LedgerClass, number>;

const GROUP = 32;
/** One value in a KV block: CPUs serve in f32, GPUs in bf16. */
const KV_VALUE_BYTES = { gpu: 2, cpu: 4 };
const ACTIVATION_VALUE_BYTES = { gpu: 2, cpu: 4 };
/** Decode attention is split over this many parts of the context, whose partial results are merged. */
const ATTENTION_SPLITS = 8;
/** Graphs and library workspace. */
const GPU_WORKSPACE_BYTES = 64e6;
/** Driver and runtime context of one GPU. */
const GPU_CONTEXT_BYTES = 1e9;
/** A worker process before it holds any weight: runtime, tokenizer, buffers of its links. */
const CPU_PROCESS_BYTES = 192e6;
const RESERVE_SHARE = 0.1;

const CLASS_OF_ROLE: ReadonlyMap<TensorRole, LedgerClass> = new Map<TensorRole, LedgerClass>([
  [TensorRole.EMBEDDING, LedgerClass.EMBEDDING],
  [TensorRole.FINAL_NORM, LedgerClass.NORMS],
  [TensorRole.HEAD, LedgerClass.HEAD],
  [TensorRole.ATTENTION_NORM, LedgerClass.NORMS],
  [TensorRole.QUERY, LedgerClass.ATTENTION],
  [TensorRole.KEY, LedgerClass.ATTENTION],
  [TensorRole.VALUE, LedgerClass.ATTENTION],
  [TensorRole.OUTPUT, LedgerClass.ATTENTION],
  [TensorRole.MLP_NORM, LedgerClass.NORMS],
  [TensorRole.GATE, LedgerClass.DENSE],
  [TensorRole.UP, LedgerClass.DENSE],
  [TensorRole.DOWN, LedgerClass.DENSE],
  [TensorRole.ROUTER, LedgerClass.NORMS],
  [TensorRole.EXPERT_GATE, LedgerClass.EXPERTS],
  [TensorRole.EXPERT_UP, LedgerClass.EXPERTS],
  [TensorRole.EXPERT_DOWN, LedgerClass.EXPERTS],
  [TensorRole.SHARED_GATE, LedgerClass.SHARED],
  [TensorRole.SHARED_UP, LedgerClass.SHARED],
  [TensorRole.SHARED_DOWN, LedgerClass.SHARED],
  [TensorRole.ROPE_FACTORS, LedgerClass.NORMS],
]);

/** What belongs to no role (latent projections, scales, biases) goes where its rule sends it. */
function classOf(tensor: TensorSpec): LedgerClass {
  const known = CLASS_OF_ROLE.get(tensor.role);
  if (known !== undefined) return known;
  switch (tensor.rule) {
    case ShardRule.EXPERT:
      return LedgerClass.EXPERTS;
    case ShardRule.COLUMNS:
    case ShardRule.ROWS:
      return LedgerClass.DENSE;
    case ShardRule.VOCAB:
      return LedgerClass.EMBEDDING;
    case ShardRule.HEADS:
    case ShardRule.KV_HEADS:
    case ShardRule.HEAD_ROWS:
    case ShardRule.LATENT:
      return LedgerClass.ATTENTION;
    default:
      return LedgerClass.NORMS;
  }
}

/** A model with one tensor for all that are cut alike: a ledger of 45,000 planes is summed over some hundreds. */
export type Condensed = { spec: ModelSpec; counts: readonly number[] };

export function condense(spec: ModelSpec): Condensed {
  const kinds = new Map<string, { tensor: TensorSpec; count: number }>();
  for (const tensor of spec.tensors) {
    const { role, rule, expert, type, rows, cols, bytes } = tensor;
    const key = `${role}|${rule}|${expert}|${type}|${rows}|${cols}|${bytes}`;
    const kind = kinds.get(key);
    if (kind === undefined) kinds.set(key, { tensor, count: 1 });
    else kind.count += 1;
  }
  const all = [...kinds.values()];
  return { spec: { ...spec, tensors: all.map((kind) => kind.tensor) }, counts: all.map((kind) => kind.count) };
}

/** Stored bytes of rows x columns of a plane, whole groups of columns. */
export function keptBytes(tensor: TensorSpec, rows: number, cols: { begin: number; end: number }): number {
  const first = Math.floor(cols.begin / GROUP) * GROUP;
  const last = Math.min(tensor.cols, Math.ceil(cols.end / GROUP) * GROUP);
  if (last <= first || rows <= 0) return 0;
  return Math.ceil((Number(tensor.bytes) / (tensor.rows * tensor.cols)) * rows * (last - first));
}

/** Weight bytes by class of one rank. */
export function weightLines(model: Condensed, shard: RankShard): Map<LedgerClass, number> {
  const lines = new Map<LedgerClass, number>();
  for (const [index, tensor] of model.spec.tensors.entries()) {
    const part = keptBy(tensor, shard, model.spec);
    if (part === undefined) continue;
    const bytes = keptBytes(tensor, part.rows.end - part.rows.begin, part.cols) * (model.counts[index] ?? 0);
    const type = classOf(tensor);
    lines.set(type, (lines.get(type) ?? 0) + bytes);
  }
  return lines;
}

const width = (range: { begin: number; end: number } | undefined): number =>
  range === undefined ? 0 : range.end - range.begin;

/** True where attention keeps one latent vector for each token instead of keys and values (MLA). */
export function isLatent(spec: ModelSpec): boolean {
  return spec.tensors.some((tensor) => tensor.rule === ShardRule.LATENT);
}

/** KV values that a token leaves on a rank, over all layers. A latent group counts half of its vector as key, half as value. */
export function kvValuesPerToken(spec: ModelSpec, shard: RankShard): number {
  let values = 0;
  for (const group of spec.kvGroups) values += 2 * group.blocks.length * width(shard.kvHeads) * group.headDim;
  return values;
}

export function kvBytesPerToken(spec: ModelSpec, shard: RankShard, backend: Backend): number {
  return kvValuesPerToken(spec, shard) * KV_VALUE_BYTES[backend];
}

/** Peak of one step: what lives through it, and the widest of its phases. */
export function activationBytes(spec: ModelSpec, shard: RankShard, bounds: StepBounds, backend: Backend): number {
  const value = ACTIVATION_VALUE_BYTES[backend];
  const { tokensMax: tokens, rowsMax: rows } = bounds;
  const hidden = spec.hiddenSize;
  let widest = rows * (width(shard.vocab) + spec.vocabSize) * 4;
  for (const block of spec.blocks) {
    const dim = block.attention?.headDim ?? 0;
    const heads = width(shard.heads);
    const qkv = tokens * (heads + 2 * width(shard.kvHeads)) * dim * value;
    const partials = rows * heads * ATTENTION_SPLITS * (dim + 2) * 4;
    widest = Math.max(widest, qkv + partials);
    if (block.mlp?.$case === "dense") widest = Math.max(widest, tokens * 3 * width(shard.denseFfn) * value);
    if (block.mlp?.$case === "moe") {
      const { topK } = block.mlp.value;
      const routed = tokens * topK * ((hidden + 3 * width(shard.expertFfn)) * value + 12);
      widest = Math.max(widest, routed + tokens * 3 * width(shard.sharedFfn) * value);
    }
  }
  const workspace = backend === "gpu" ? GPU_WORKSPACE_BYTES : 0;
  return 4 * tokens * hidden * value + widest + workspace;
}

/** Two hidden states of a full step: one that is being sent, one that arrives. */
export function communicationBytes(spec: ModelSpec, world: number, bounds: StepBounds, backend: Backend): number {
  return world > 1 ? 2 * bounds.tokensMax * spec.hiddenSize * ACTIVATION_VALUE_BYTES[backend] : 0;
}

/** What is left alone; `ranks` share a CPU node and its process. */
export function reserveBytes(capacity: number, backend: Backend, ranks: number): number {
  const own = backend === "gpu" ? GPU_CONTEXT_BYTES : CPU_PROCESS_BYTES / ranks;
  return Math.ceil(capacity * RESERVE_SHARE + own);
}

export function sumOf(lines: Lines): number {
  let sum = 0;
  for (const bytes of lines.values()) sum += bytes;
  return sum;
}

export function rankLedger(rank: number, lines: Lines, capacity: number): RankLedger {
  const sorted = [...lines].filter(([, bytes]) => bytes > 0).sort(([one], [other]) => one - other);
  return {
    rank,
    lines: sorted.map(([type, bytes]) => ({ class: type, bytes: BigInt(bytes) })),
    used: BigInt(sumOf(lines)),
    capacity: BigInt(Math.floor(capacity)),
  };
}

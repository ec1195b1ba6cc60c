// How a cut divides a model: pure functions from ModelSpec and Cut to what each rank holds.
//
//   H1  within a rule that splits, every row (column) of a plane is held by exactly one rank; rules that replicate are REPLICATE,
//       and KV_HEADS where there are fewer kv heads than ranks.
//   H2  rank = epSlot * etp + etpIndex; expert e lives on slot floor(e * ep / experts).
//   H3  a query head and its kv head are on the same rank.

import { FaultError, invalid } from "../../proto/fault.ts";
import {
  type Cut,
  type ModelSpec,
  type MoeSpec,
  type Range,
  type RankShard,
  type Reason,
  Reason_Kind,
  type ShardPlan,
  ShardRule,
  TensorRole,
  type TensorSpec,
} from "../../proto/gen/muster/v1/plan.ts";
import type { TensorSlice } from "../../proto/gen/muster/v1/worker.ts";

/** Widths are cut in multiples of this where they divide: one quantised block, one cache line of f16. */
const FFN_UNIT = 32;
const EMPTY: Range = { begin: 0, end: 0 };

type Sizes = { heads: number; kvHeads: number; vocab: number; denseFfn: number; moe: MoeSpec | undefined };

/** Asked for each of 100,000 planes; a spec does not change. */
const known = new WeakMap<ModelSpec, Sizes>();

function sizesOf(spec: ModelSpec): Sizes {
  const found = known.get(spec) ?? measure(spec);
  known.set(spec, found);
  return found;
}

function measure(spec: ModelSpec): Sizes {
  const sizes: Sizes = { heads: 0, kvHeads: 0, vocab: spec.vocabSize, denseFfn: 0, moe: undefined };
  for (const { attention, mlp } of spec.blocks) {
    sizes.heads = Math.max(sizes.heads, attention?.heads ?? 0);
    sizes.kvHeads = Math.max(sizes.kvHeads, attention?.kvHeads ?? 0);
    if (mlp?.$case === "dense") sizes.denseFfn = Math.max(sizes.denseFfn, mlp.value.ffn);
    if (mlp?.$case === "moe") sizes.moe ??= mlp.value;
  }
  return sizes;
}

/** Part `index` of `parts` of `extent`, as even as `unit` allows. */
function partOf(extent: number, index: number, parts: number, unit = 1): Range {
  const units = extent / unit;
  return { begin: Math.floor((index * units) / parts) * unit, end: Math.floor(((index + 1) * units) / parts) * unit };
}

/** As partOf, in blocks of 32 where the width divides into enough of them. */
function ffnPart(extent: number, index: number, parts: number): Range {
  const isWhole = extent % FFN_UNIT === 0 && extent / FFN_UNIT >= parts;
  return partOf(extent, index, parts, isWhole ? FFN_UNIT : 1);
}

/** Why the cut cannot hold the model, one reason for each rule that it breaks; empty where it can. */
export function cutFaults(spec: ModelSpec, cut: Cut): Reason[] {
  const { heads, kvHeads, vocab, denseFfn, moe } = sizesOf(spec);
  const { world, tp, dp, ep, etp, pp } = cut;
  const faults: Reason[] = [];
  const refuse = (code: string, text: string) => faults.push({ kind: Reason_Kind.REFUSED, code, text });
  for (const [name, value] of Object.entries({ world, tp, dp, ep, etp, pp }))
    if (!Number.isInteger(value) || value < 1)
      refuse("size-not-positive", `${name} is ${value}; it must be at least 1.`);
  if (faults.length) return faults;
  if (pp !== 1) refuse("pp-not-supported", `pp ${pp}: pipeline stages are not supported yet; use pp 1.`);
  if (dp !== 1) refuse("dp-not-supported", `dp ${dp}: attention data parallelism is not supported yet; use dp 1.`);
  if (tp * dp !== world) refuse("tp-dp-not-world", `tp ${tp} x dp ${dp} is not the ${world} ranks of the stage.`);
  if (ep * etp !== world) refuse("ep-etp-not-world", `ep ${ep} x etp ${etp} is not the ${world} ranks of the stage.`);
  if (heads % tp !== 0) refuse("heads-not-divisible", `${heads} query heads do not divide over tp ${tp}.`);
  if (kvHeads % tp !== 0 && tp % kvHeads !== 0)
    refuse("kv-heads-not-divisible", `${kvHeads} kv heads neither divide over tp ${tp} nor replicate evenly.`);
  if (vocab < tp) refuse("vocab-too-small", `a vocabulary of ${vocab} does not divide over tp ${tp}.`);
  if (denseFfn && denseFfn < tp)
    refuse("ffn-too-small", `a feed-forward width of ${denseFfn} does not divide over tp ${tp}.`);
  if (!moe) {
    if (ep !== 1) refuse("no-experts", `ep ${ep}, but the model has no experts; use ep 1, etp ${world}.`);
    return faults;
  }
  if (ep > moe.experts) refuse("experts-too-few", `ep ${ep} slots, but there are ${moe.experts} experts.`);
  if (moe.expertFfn < etp)
    refuse("expert-ffn-too-small", `an expert width of ${moe.expertFfn} does not divide over etp ${etp}.`);
  if (moe.sharedFfn && moe.sharedFfn < tp)
    refuse("shared-ffn-too-small", `a shared expert of width ${moe.sharedFfn} does not divide over tp ${tp}.`);
  return faults;
}

/** What each rank holds, ranks ascending. Throws FaultError where cutFaults has something to say. */
export function shardsOf(spec: ModelSpec, cut: Cut, workers: number): RankShard[] {
  const faults = cutFaults(spec, cut);
  if (faults.length) throw new FaultError(invalid("cut", faults.map((fault) => fault.text).join(" "), faults[0]?.code));
  const { world } = cut;
  if (!Number.isInteger(workers) || workers < 1 || workers > world)
    throw new FaultError(invalid("workers", `${workers} workers for ${world} ranks; 1..${world} are possible`));
  const sizes = sizesOf(spec);
  return Array.from({ length: world }, (_, rank) => shardOf(sizes, cut, { rank, workers }));
}

function shardOf(sizes: Sizes, cut: Cut, { rank, workers }: { rank: number; workers: number }): RankShard {
  const { heads, kvHeads, vocab, denseFfn, moe } = sizes;
  const { world, tp, ep, etp } = cut;
  const slot = Math.floor(rank / etp);
  const firstKvHead = Math.floor((rank * kvHeads) / tp);
  const experts = Array.from({ length: moe?.experts ?? 0 }, (_, e) => e);
  return {
    rank,
    worker: Math.floor((rank * workers) / world),
    heads: partOf(heads, rank, tp),
    kvHeads: kvHeads % tp === 0 ? partOf(kvHeads, rank, tp) : { begin: firstKvHead, end: firstKvHead + 1 },
    vocab: partOf(vocab, rank, tp),
    denseFfn: denseFfn ? ffnPart(denseFfn, rank, tp) : EMPTY,
    sharedFfn: moe?.sharedFfn ? ffnPart(moe.sharedFfn, rank, tp) : EMPTY,
    experts: experts.filter((e) => Math.floor((e * ep) / experts.length) === slot),
    expertFfn: moe ? ffnPart(moe.expertFfn, rank % etp, etp) : EMPTY,
  };
}

/** The part of `extent` stored rows (columns) that belongs to `range` of `count` logical units. */
function scaled(range: Range | undefined, count: number, extent: number): Range {
  const { begin, end } = range ?? EMPTY;
  if (count === extent) return { begin, end };
  return { begin: Math.floor((begin * extent) / count), end: Math.ceil((end * extent) / count) };
}

const DOWNS: ReadonlySet<TensorRole> = new Set([TensorRole.DOWN, TensorRole.SHARED_DOWN, TensorRole.EXPERT_DOWN]);
const SHARED: ReadonlySet<TensorRole> = new Set([TensorRole.SHARED_GATE, TensorRole.SHARED_UP, TensorRole.SHARED_DOWN]);

/** The part of a plane that a rank holds; undefined where it holds nothing of it. */
export function keptBy(
  tensor: TensorSpec,
  shard: RankShard,
  spec: ModelSpec,
): { rows: Range; cols: Range } | undefined {
  return kept(tensor, shard, sizesOf(spec));
}

function kept(tensor: TensorSpec, shard: RankShard, sizes: Sizes): { rows: Range; cols: Range } | undefined {
  const rows = { begin: 0, end: tensor.rows };
  const cols = { begin: 0, end: tensor.cols };
  const some = (part: { rows: Range; cols: Range }) =>
    part.rows.end > part.rows.begin && part.cols.end > part.cols.begin ? part : undefined;
  const ffn = SHARED.has(tensor.role) ? shard.sharedFfn : shard.denseFfn;
  switch (tensor.rule) {
    case ShardRule.REPLICATE:
    case ShardRule.LATENT:
      return { rows, cols };
    case ShardRule.VOCAB:
      return some({ rows: scaled(shard.vocab, sizes.vocab, tensor.rows), cols });
    case ShardRule.HEADS:
      return some({ rows: scaled(shard.heads, sizes.heads, tensor.rows), cols });
    case ShardRule.KV_HEADS:
      return some({ rows: scaled(shard.kvHeads, sizes.kvHeads, tensor.rows), cols });
    case ShardRule.HEAD_ROWS:
      return some({ rows, cols: scaled(shard.heads, sizes.heads, tensor.cols) });
    case ShardRule.COLUMNS:
      return some({ rows: ffn ?? EMPTY, cols });
    case ShardRule.ROWS:
      return some({ rows, cols: ffn ?? EMPTY });
    case ShardRule.EXPERT: {
      if (!shard.experts.includes(tensor.expert)) return undefined;
      const part = shard.expertFfn ?? EMPTY;
      // Scales of an expert go whole to every rank that holds a part of it.
      if (tensor.role === TensorRole.OTHER) return { rows, cols };
      return some(DOWNS.has(tensor.role) ? { rows, cols: part } : { rows: part, cols });
    }
    default:
      return undefined;
  }
}

/** Stored bytes of what a rank holds of a plane. A cut inside a quantised block counts the part, not the block. */
export function keptBytes(tensor: TensorSpec, part: { rows: Range; cols: Range }): number {
  const share = (part.rows.end - part.rows.begin) * (part.cols.end - part.cols.begin);
  return Math.ceil((Number(tensor.bytes) * share) / (tensor.rows * tensor.cols));
}

/** Planes that a rank computes with; frequencies cross in the spec, others are only counted. */
export const isLoaded = (tensor: TensorSpec): boolean =>
  tensor.role !== TensorRole.OTHER && tensor.role !== TensorRole.ROPE_FACTORS && tensor.role !== TensorRole.UNSPECIFIED;

/** The slices that the ranks of one worker load, in order of rank, then tensor. Throws FaultError where the plan is not whole. */
export function slicesOf(plan: ShardPlan, worker: number): TensorSlice[] {
  const { model } = plan;
  if (!model) throw new FaultError(invalid("plan.model", "is missing"));
  if (model.planOnly) throw new FaultError(invalid("plan.model", model.planOnly, "unsupported"));
  const ranks = plan.ranks.filter((shard) => shard.worker === worker);
  if (ranks.length === 0) throw new FaultError(invalid("worker", `the plan has no ranks for worker ${worker}`));
  const sizes = sizesOf(model);
  return ranks.flatMap((shard) =>
    model.tensors.flatMap((tensor, index): TensorSlice[] => {
      const part = isLoaded(tensor) ? kept(tensor, shard, sizes) : undefined;
      return part ? [{ rank: shard.rank, tensor: index, rows: part.rows, cols: part.cols }] : [];
    }),
  );
}

// One candidate: a cut on an inventory, with its ledger and what it is expected to do. Owns the way from a ModelSpec and a
// cut to bytes and seconds; choosing among candidates is plan.ts.
import {
  type Cut,
  LedgerClass,
  type ModelSpec,
  type Prediction,
  type RankLedger,
  type RankShard,
  StoredType,
} from "../../proto/gen/muster/v1/plan.ts";
import { shardsOf } from "../model/shards.ts";
import {
  activationBytes,
  type Condensed,
  communicationBytes,
  condense,
  isLatent,
  kvBytesPerToken,
  kvValuesPerToken,
  type Lines,
  rankLedger,
  reserveBytes,
  sumOf,
  weightLines,
} from "./ledger.ts";
import type { Placement } from "./place.ts";
import { calibrated, decodeStep, prefill, type RankLoad } from "./roofline.ts";
import { kvHeadsOf, moeOf } from "./shape.ts";
import { CONTEXT_DEFAULT, CPU_KV_BYTES_MAX, stepBounds, type Wishes } from "./wishes.ts";

export type Candidate = {
  cut: Cut;
  workers: number;
  shards: RankShard[];
  ledgers: RankLedger[];
  fits: boolean;
  /** Why it does not fit; empty where it does. */
  misfit: { code: string; text: string } | undefined;
  contextTokens: number;
  /** Per rank, the padding block included. */
  kvBlocks: number;
  /** Sequences of full length that the blocks hold. */
  fullSequences: number;
  prediction: Prediction;
};

/** A model as every candidate needs it, prepared once. */
export type Model = { spec: ModelSpec; condensed: Condensed; isFp8: boolean };

export function modelOf(spec: ModelSpec): Model {
  return { spec, condensed: condense(spec), isFp8: isFp8(spec) };
}

/** The prompt that TTFT is stated for. */
const PROMPT_TOKENS = 1024;

export function cutName(cut: Cut, spec: ModelSpec): string {
  return moeOf(spec) === undefined ? `tp${cut.tp}` : `tp${cut.tp}·ep${cut.ep}·etp${cut.etp}`;
}

export function evaluate(model: Model, cut: Cut, placement: Placement, wishes: Wishes): Candidate {
  const { spec } = model;
  const shards = shardsOf(spec, cut, placement.workers);
  const bounds = stepBounds(placement.backend, wishes.concurrency);
  const ranks = shards.map((shard, rank): RankBytes => {
    const capacity = placement.capacities[rank] ?? 0;
    const lines = weightLines(model.condensed, shard);
    lines.set(LedgerClass.EXPERTS, expertBytes(lines, shard, wishes.expertCopies / cut.ep));
    lines.set(LedgerClass.ACTIVATIONS, activationBytes(spec, shard, bounds, placement.backend));
    lines.set(LedgerClass.COMMUNICATION, communicationBytes(spec, cut.world, bounds, placement.backend));
    lines.set(LedgerClass.RESERVE, reserveBytes(capacity, placement.backend, placement.perNode));
    const blockBytes = kvBytesPerToken(spec, shard, placement.backend) * wishes.kvBlockTokens;
    return { lines, capacity: Math.floor(capacity), blockBytes };
  });
  const kv = chooseKv(spec, ranks, placement, wishes);
  const ledgers = ranks.map(({ lines, blockBytes, capacity }, rank) => {
    const all = new Map(lines).set(LedgerClass.KV, kv.blocks * blockBytes);
    return rankLedger(rank, all, capacity);
  });
  const isOver = ledgers.some((ledger) => ledger.used > ledger.capacity);
  const misfit = kv.misfit ?? (isOver ? memoryShort(ledgers) : undefined);
  const candidate = {
    cut,
    workers: placement.workers,
    shards,
    ledgers,
    fits: misfit === undefined,
    misfit,
    contextTokens: kv.contextTokens,
    kvBlocks: kv.blocks,
    fullSequences: ((kv.blocks - 1) * wishes.kvBlockTokens) / kv.contextTokens,
  };
  const load = rankLoad(model, candidate, ranks, placement);
  return { ...candidate, prediction: predict(load, candidate, placement, wishes) };
}

/** With room for the slot's share of the copies: all experts of a model are alike. */
function expertBytes(lines: Lines, { experts }: RankShard, copies: number): number {
  const own = lines.get(LedgerClass.EXPERTS) ?? 0;
  return experts.length === 0 ? own : Math.ceil(own * (1 + copies / experts.length));
}

// ---- KV ----

type RankBytes = { lines: Lines; capacity: number; blockBytes: number };
type Kv = { blocks: number; contextTokens: number; misfit: { code: string; text: string } | undefined };

/**
 * Blocks for context x concurrency where they fit, never fewer than one full context needs. Where nobody has wished for a
 * context it is lowered to what fits; a wished one is kept or refused.
 */
function chooseKv(spec: ModelSpec, ranks: readonly RankBytes[], placement: Placement, wishes: Wishes): Kv {
  const { kvBlockTokens: perBlock } = wishes;
  const blocksFor = (tokens: number): number => Math.ceil(tokens / perBlock);
  const wished = wishes.contextTokens ?? Math.min(spec.contextTokens, CONTEXT_DEFAULT[placement.backend]);
  const blockBytes = Math.max(1, ...ranks.map((rank) => rank.blockBytes));
  const free = Math.min(
    ...ranks.map((rank) => Math.floor((rank.capacity - sumOf(rank.lines)) / Math.max(1, rank.blockBytes))),
  );
  const one = blocksFor(wished) + 1;
  const isFree = wishes.contextTokens === undefined;
  if (wishes.kvBytes !== undefined) {
    const blocks = Math.floor(wishes.kvBytes / blockBytes);
    const short = blocks < (isFree ? 2 : one);
    const need = (isFree ? 2 : one) * blockBytes;
    const text = `${wishes.kvBytes} KV bytes hold ${blocks} blocks; ${isFree ? "2 blocks" : `${wished} tokens`} need ${need} bytes`;
    const contextTokens = isFree ? Math.max(1, Math.min(wished, (blocks - 1) * perBlock)) : wished;
    return { blocks: Math.max(blocks, 2), contextTokens, misfit: short ? { code: "kv-bytes-short", text } : undefined };
  }
  const all = blocksFor(wished) * wishes.concurrency + 1;
  const budget = placement.backend === "cpu" ? Math.max(one, Math.floor(CPU_KV_BYTES_MAX / blockBytes)) : all;
  const blocks = Math.min(all, budget, free);
  if (blocks >= one) return { blocks, contextTokens: wished, misfit: undefined };
  if (isFree && free >= 2)
    return { blocks: free, contextTokens: Math.min(wished, (free - 1) * perBlock), misfit: undefined };
  return { blocks: isFree ? 2 : one, contextTokens: wished, misfit: undefined };
}

function memoryShort(ledgers: readonly RankLedger[]): { code: string; text: string } {
  const over = ledgers.map((ledger) => Number(ledger.used - ledger.capacity));
  const worst = over.indexOf(Math.max(...over));
  const ledger = ledgers[worst];
  const missing = gigabytes(over[worst] ?? 0);
  const text = `rank ${worst} needs ${gigabytes(Number(ledger?.used ?? 0n))}, ${missing} more than it has`;
  return { code: "memory-short", text };
}

export function gigabytes(bytes: number): string {
  if (bytes >= 1e12) return `${(bytes / 1e12).toFixed(2)} TB`;
  if (bytes >= 99.95e9) return `${(bytes / 1e9).toFixed(0)} GB`;
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(1)} GB`;
  if (bytes >= 1e6) return `${(bytes / 1e6).toFixed(1)} MB`;
  return `${(bytes / 1e3).toFixed(1)} KB`;
}

// ---- time ----

type Sized = Omit<Candidate, "prediction">;

/** Of the fullest rank: the step waits for it. */
function rankLoad(model: Model, sized: Sized, ranks: readonly RankBytes[], placement: Placement): RankLoad {
  const { spec } = model;
  const moe = moeOf(spec);
  const { cut } = sized;
  const bytesOf = (lines: Lines, ...classes: LedgerClass[]): number => {
    let sum = 0;
    for (const type of classes) sum += lines.get(type) ?? 0;
    return sum;
  };
  const fixed = ranks.map(({ lines }) =>
    bytesOf(
      lines,
      LedgerClass.ATTENTION,
      LedgerClass.DENSE,
      LedgerClass.SHARED,
      LedgerClass.NORMS,
      LedgerClass.HEAD,
      ...(spec.tiedHead ? [LedgerClass.EMBEDDING] : []),
    ),
  );
  const moeLayers = spec.blocks.filter((block) => block.mlp?.$case === "moe").length;
  const expert = ranks.map(({ lines }, rank) => {
    const held = sized.shards[rank]?.experts.length ?? 0;
    return held === 0 ? 0 : bytesOf(lines, LedgerClass.EXPERTS) / (held * moeLayers);
  });
  const embedding = spec.tiedHead ? 0 : spec.vocabSize * spec.hiddenSize;
  return {
    fixedBytes: Math.max(...fixed),
    expertBytes: Math.max(0, ...expert),
    experts: moe?.experts ?? 0,
    topK: moe?.topK ?? 0,
    moeLayers,
    ep: cut.ep,
    kvBytesPerSequence: kvReadBytes(spec, sized, meanContext(sized), placement),
    flopsPerToken: (2 * (Number(spec.parametersActive) - embedding)) / cut.world,
    attentionFlopsPerContext: attentionFlops(spec, meanContext(sized)) / cut.world,
    layers: spec.blocks.length,
    hidden: spec.hiddenSize,
    world: cut.world,
    workers: placement.workers,
    isFp8: model.isFp8,
  };
}

/** Sequences fill from nothing to the limit: half of it on average. */
function meanContext(sized: Sized): number {
  return Math.max(1, Math.round(sized.contextTokens / 2));
}

/** Share of `context` that a layer with this mask attends to. */
function liveShare(span: number, context: number): number {
  return span === 0 ? 1 : Math.min(1, span / context);
}

/** Averaged over the layers, weights 1. */
function meanLiveShare(spec: ModelSpec, context: number): number {
  const shares = spec.blocks.map((block) => liveShare(block.attention?.mask?.span ?? 0, context));
  return shares.reduce((sum, share) => sum + share, 0) / Math.max(1, shares.length);
}

function kvReadBytes(spec: ModelSpec, sized: Sized, context: number, placement: Placement): number {
  const perToken = Math.max(...sized.shards.map((shard) => kvBytesPerToken(spec, shard, placement.backend)));
  return perToken * context * meanLiveShare(spec, context);
}

/** FLOPs of one token's attention for each token of context, all layers, all heads (scores and values). */
function attentionFlops(spec: ModelSpec, context: number): number {
  const latentDim = isLatent(spec) ? latentWidth(spec) : undefined;
  let flops = 0;
  for (const { attention } of spec.blocks) {
    if (attention === undefined) continue;
    const width = latentDim ?? 2 * attention.headDim;
    flops += 2 * attention.heads * width * liveShare(attention.mask?.span ?? 0, context);
  }
  return flops;
}

/** Absorbed latent attention scores against the whole vector and sums over all of it but the rotary part. */
function latentWidth(spec: ModelSpec): number {
  const vector = 2 * (spec.kvGroups[0]?.headDim ?? 0);
  const rotary = spec.blocks[0]?.attention?.rope?.dims ?? 0;
  return 2 * vector - rotary;
}

function isFp8(spec: ModelSpec): boolean {
  let fp8 = 0;
  let all = 0;
  for (const tensor of spec.tensors) {
    all += Number(tensor.bytes);
    if (tensor.type === StoredType.F8_E4M3) fp8 += Number(tensor.bytes);
  }
  return fp8 * 2 > all;
}

function predict(load: RankLoad, sized: Sized, placement: Placement, wishes: Wishes): Prediction {
  const context = meanContext(sized);
  const held = Math.floor(((sized.kvBlocks - 1) * wishes.kvBlockTokens) / context);
  const rows = Math.max(1, Math.min(wishes.concurrency, held));
  const step = decodeStep(placement.rates, load, rows, context);
  const prompt = Math.min(PROMPT_TOKENS, context);
  const bounds = stepBounds(placement.backend, wishes.concurrency);
  const first = prefill(placement.rates, load, prompt, bounds.tokensMax);
  const seconds = calibrated(step.seconds, wishes.calibration);
  return {
    ttftMs: calibrated(first.seconds + step.seconds, wishes.calibration) * 1e3,
    itlMs: seconds * 1e3,
    tokensPerSecond: rows / seconds,
    concurrency: rows,
    bound: step.bound,
  };
}

/** Bytes that one token of context takes over all ranks, a full copy as data sheets state it. */
export function kvBytesOfModel(spec: ModelSpec, backend: "gpu" | "cpu"): number {
  const whole = { rank: 0, worker: 0, experts: [], kvHeads: { begin: 0, end: kvHeadsOf(spec) } };
  return kvValuesPerToken(spec, whole) * (backend === "gpu" ? 2 : 4);
}

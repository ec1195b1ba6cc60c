// Roofline: how long a step takes at best, from bytes, operations and messages. Owns the formulas and their constants;
// knows no ModelSpec and no cut (candidate.ts turns those into a Load). Seconds, bytes and FLOPs throughout.
//
//   F1  a step takes max(memory, arithmetic) + messages + a fixed part; nothing overlaps that is not proven to.
//   F2  raw figures are physics times the published efficiency of good kernels; `calibrated` scales them once, at the end.

/** Share of peak memory bandwidth, of peak arithmetic in decode and in prefill: fit the published tables of good engines. */
const MEMORY_EFFICIENCY = 0.75;
const DECODE_EFFICIENCY = 0.5;
const PREFILL_EFFICIENCY = 0.4;
/** Launch, sampling, scheduling of one step. */
const STEP_FIXED_SECONDS = 3e-4;
/** Until a deployment has measured itself. */
export const CALIBRATION_START = 0.8;

const LINK_LATENCY_SECONDS = 6e-6;
const LINK_EFFICIENCY = 0.6;
/** One hop between nodes: NIC, switch, NIC. An assumption for RDMA; TCP between processes is the CPU figure. */
const NETWORK_LATENCY_SECONDS = { gpu: 2e-5, cpu: 1e-4 };
/** Bytes of one hidden value on the wire. */
const WIRE_BYTES = { gpu: 2, cpu: 4 };

export type Rates = {
  kind: "gpu" | "cpu";
  memoryBytesPerSecond: number;
  bf16FlopsPerSecond: number;
  fp8FlopsPerSecond: number;
  linkBytesPerSecond: number;
  networkBytesPerSecond: number;
};

/** What the fullest rank has to do, independent of the batch. */
export type RankLoad = {
  /** Read at every step whatever the batch: attention, dense, shared, norms, routers, head. */
  fixedBytes: number;
  /** All planes of one expert of one layer, this rank's share. */
  expertBytes: number;
  experts: number;
  topK: number;
  moeLayers: number;
  ep: number;
  /** KV bytes this rank reads for one sequence of mean length. */
  kvBytesPerSequence: number;
  /** This rank's share. */
  flopsPerToken: number;
  /** This rank's share, for one token with one token of context. */
  attentionFlopsPerContext: number;
  layers: number;
  hidden: number;
  world: number;
  workers: number;
  /** Whether the matrices are stored, and multiplied, in FP8. */
  isFp8: boolean;
};

type StepTime = {
  seconds: number;
  memory: number;
  compute: number;
  communication: number;
  bound: "memory" | "compute" | "communication";
};

function flopsPerSecond(rates: Rates, load: RankLoad): number {
  return load.isFp8 ? rates.fp8FlopsPerSecond : rates.bf16FlopsPerSecond;
}

/** Expected number of different experts that a batch of `rows` touches in one layer, routing being uniform. */
export function distinctExperts(experts: number, topK: number, rows: number): number {
  if (experts === 0) return 0;
  return experts * (1 - (1 - topK / experts) ** rows);
}

/**
 * Distinct experts read by the busiest of `ep` slots. The step waits for it: with one token and eight slots one slot reads a
 * whole expert and seven read none. Mean plus the expected maximum of `ep` binomial counts, within what a slot can hold.
 */
export function busiestSlot(distinct: number, experts: number, ep: number): number {
  if (ep <= 1 || experts === 0) return distinct;
  const held = experts / ep;
  const mean = distinct / ep;
  const spread = Math.sqrt(Math.max(0, mean * (1 - mean / held)));
  const expected = mean + spread * Math.sqrt(2 * Math.log(ep));
  return Math.min(held, Math.max(expected, Math.min(distinct, 1)));
}

/** One sum over all ranks of `rows` hidden vectors: inside the nodes, then each device's share between them. */
export function allReduceSeconds(
  rates: Rates,
  load: Pick<RankLoad, "hidden" | "world" | "workers">,
  rows: number,
): number {
  const { world, workers, hidden } = load;
  if (world <= 1) return 0;
  const bytes = rows * hidden * WIRE_BYTES[rates.kind];
  const local = world / workers;
  let seconds = 0;
  if (local > 1) {
    seconds +=
      LINK_LATENCY_SECONDS + (2 * ((local - 1) / local) * bytes) / (rates.linkBytesPerSecond * LINK_EFFICIENCY);
  }
  if (workers > 1) {
    const share = (2 * ((workers - 1) / workers) * bytes) / local;
    seconds += NETWORK_LATENCY_SECONDS[rates.kind] + share / (rates.networkBytesPerSecond * LINK_EFFICIENCY);
  }
  return seconds;
}

function combine(memory: number, compute: number, communication: number): StepTime {
  const work = Math.max(memory, compute);
  const bound = communication > work ? "communication" : memory >= compute ? "memory" : "compute";
  return { seconds: work + communication + STEP_FIXED_SECONDS, memory, compute, communication, bound };
}

/** Bytes of weights one decode step of `rows` sequences reads on the busiest rank. */
export function decodeWeightBytes(load: RankLoad, rows: number): number {
  const distinct = distinctExperts(load.experts, load.topK, rows);
  return load.fixedBytes + load.moeLayers * busiestSlot(distinct, load.experts, load.ep) * load.expertBytes;
}

/** One decode step of `rows` sequences with `context` tokens each (two all-reduces a layer). */
export function decodeStep(rates: Rates, load: RankLoad, rows: number, context: number): StepTime {
  const bytes = decodeWeightBytes(load, rows) + rows * load.kvBytesPerSequence;
  const flops = rows * (load.flopsPerToken + load.attentionFlopsPerContext * context);
  return combine(
    bytes / (rates.memoryBytesPerSecond * MEMORY_EFFICIENCY),
    flops / (flopsPerSecond(rates, load) * DECODE_EFFICIENCY),
    2 * load.layers * allReduceSeconds(rates, load, rows),
  );
}

/** A whole prompt in chunks of `chunk` tokens; every chunk reads the weights it touches once. */
export function prefill(rates: Rates, load: RankLoad, prompt: number, chunk: number): StepTime {
  const chunks = Math.ceil(prompt / chunk);
  const bytes = chunks * decodeWeightBytes(load, Math.min(prompt, chunk));
  const flops = prompt * (load.flopsPerToken + (load.attentionFlopsPerContext * prompt) / 2);
  const time = combine(
    bytes / (rates.memoryBytesPerSecond * MEMORY_EFFICIENCY),
    flops / (flopsPerSecond(rates, load) * PREFILL_EFFICIENCY),
    chunks * 2 * load.layers * allReduceSeconds(rates, load, Math.min(prompt, chunk)),
  );
  return { ...time, seconds: time.seconds + (chunks - 1) * STEP_FIXED_SECONDS };
}

/** F2: what a deployment with this calibration factor can be expected to do. */
export function calibrated(seconds: number, factor: number): number {
  return seconds / factor;
}

import { expect, describe as suite, test } from "vitest";
import {
  allReduceSeconds,
  busiestSlot,
  decodeStep,
  decodeWeightBytes,
  distinctExperts,
  prefill,
  type RankLoad,
  type Rates,
} from "../../../controller/plan/roofline.ts";

// Golden values: roofline.py, the reference implementation of the planner's formulas, run with
// step(model, "H200", B, 1024, n, dp=False). Each line names its call.
type Golden = {
  call: string;
  shape: Shape;
  /** Sequences over all ranks. */
  rows: number;
  ranks: number;
  seconds: number;
  memory: number;
  compute: number;
  communication: number;
  weightBytes: number;
};

/** Parameters as roofline.py counts them: no norms, no routers; weights in FP8, one byte each. */
type Shape = {
  layers: number;
  moeLayers: number;
  hidden: number;
  heads: number;
  headDim: number;
  attention: number;
  dense: number;
  shared: number;
  head: number;
  expert: number;
  experts: number;
  topK: number;
  kvBytesPerToken: number;
};

const SCOUT: Shape = {
  layers: 48,
  moeLayers: 48,
  hidden: 5120,
  heads: 40,
  headDim: 128,
  attention: 3_019_898_880,
  dense: 0,
  shared: 6_039_797_760,
  head: 1_034_485_760,
  expert: 125_829_120,
  experts: 16,
  topK: 1,
  kvBytesPerToken: 196_608,
};
const MAVERICK: Shape = { ...SCOUT, moeLayers: 24, dense: 6_039_797_760, shared: 3_019_898_880, experts: 128 };
const QWEN_30B: Shape = {
  layers: 48,
  moeLayers: 48,
  hidden: 2048,
  heads: 32,
  headDim: 128,
  attention: 905_969_664,
  dense: 0,
  shared: 0,
  head: 311_164_928,
  expert: 4_718_592,
  experts: 128,
  topK: 8,
  kvBytesPerToken: 98_304,
};
const QWEN_235B: Shape = {
  ...QWEN_30B,
  layers: 94,
  moeLayers: 94,
  hidden: 4096,
  heads: 64,
  attention: 6_702_497_792,
  head: 622_329_856,
  expert: 18_874_368,
  kvBytesPerToken: 192_512,
};

const GOLDEN: readonly Golden[] = [
  {
    ...{ call: "Llama-4-Scout B=1 n=1", shape: SCOUT, rows: 1, ranks: 1, seconds: 0.004837585208888889 },
    ...{ memory: 0.004537585208888889, compute: 3.3627683961596766e-5, communication: 0, weightBytes: 16_133_980_160 },
  },
  {
    ...{ call: "Llama-4-Scout B=32 n=1", shape: SCOUT, rows: 32, ranks: 1, seconds: 0.02833359429354256 },
    ...{
      memory: 0.028033594293542557,
      compute: 0.0010760858867710965,
      communication: 0,
      weightBytes: 94_478_488_512.7532,
    },
  },
  {
    ...{ call: "Llama-4-Scout B=512 n=1", shape: SCOUT, rows: 512, ranks: 1, seconds: 0.058580600462222104 },
    ...{
      memory: 0.0582806004622221,
      compute: 0.017217374188337544,
      communication: 0,
      weightBytes: 106_730_946_559.99957,
    },
  },
  {
    ...{ call: "Qwen3-30B-A3B B=8 n=1", shape: QWEN_30B, rows: 8, ranks: 1, seconds: 0.004109432913680555 },
    ...{
      memory: 0.0038094329136805554,
      compute: 5.549028162102072e-5,
      communication: 0,
      weightBytes: 12_908_652_121.25,
    },
  },
  {
    ...{ call: "Llama-4-Maverick B=2 n=8", shape: MAVERICK, rows: 16, ranks: 8, seconds: 0.003128055322081893 },
    ...{ memory: 0.0021501104331930043, compute: 6.725536792319353e-5, communication: 0.0006779448888888889 },
    weightBytes: 7_337_744_375.494815,
  },
  {
    ...{ call: "Qwen3-235B-A22B B=16 n=4", shape: QWEN_235B, rows: 64, ranks: 4, seconds: 0.018877466444724166 },
    ...{ memory: 0.016901876755835276, compute: 0.0007468955452410308, communication: 0.0016755896888888888 },
    weightBytes: 57_692_639_713.006996,
  },
];

const H200: Rates = {
  kind: "gpu",
  memoryBytesPerSecond: 4.8e12,
  bf16FlopsPerSecond: 989e12,
  fp8FlopsPerSecond: 1979e12,
  linkBytesPerSecond: 450e9,
  networkBytesPerSecond: 50e9,
};
const CONTEXT = 1024;

function loadOf(shape: Shape, ranks: number): RankLoad {
  const fixed = shape.attention + shape.dense + shape.shared + shape.head;
  return {
    fixedBytes: fixed / ranks,
    expertBytes: shape.expert / ranks,
    experts: shape.experts,
    topK: shape.topK,
    moeLayers: shape.moeLayers,
    ep: 1,
    kvBytesPerSequence: (CONTEXT * shape.kvBytesPerToken) / ranks,
    flopsPerToken: (2 * (fixed + shape.moeLayers * shape.topK * shape.expert)) / ranks,
    attentionFlopsPerContext: (4 * shape.layers * shape.heads * shape.headDim) / ranks,
    layers: shape.layers,
    hidden: shape.hidden,
    world: ranks,
    workers: 1,
    isFp8: true,
  };
}

suite("roofline against the reference", () => {
  for (const golden of GOLDEN) {
    test(golden.call, () => {
      const load = loadOf(golden.shape, golden.ranks);
      const step = decodeStep(H200, load, golden.rows, CONTEXT);
      expect(decodeWeightBytes(load, golden.rows) / golden.weightBytes).toBeCloseTo(1, 9);
      expect(step.memory / golden.memory).toBeCloseTo(1, 9);
      expect(step.compute / golden.compute).toBeCloseTo(1, 9);
      expect(step.communication).toBeCloseTo(golden.communication, 12);
      expect(step.seconds / golden.seconds).toBeCloseTo(1, 9);
    });
  }

  test("distinct experts of the reference's examples: 128/8 and 16/1", () => {
    expect(distinctExperts(128, 8, 8)).toBeCloseTo(51.6, 1);
    expect(distinctExperts(128, 8, 32)).toBeCloseTo(111.8, 1);
    expect(distinctExperts(16, 1, 32)).toBeCloseTo(14.0, 1);
    expect(distinctExperts(0, 0, 32)).toBe(0);
  });
});

suite("what the reference leaves out", () => {
  test("the busiest slot reads a whole expert for one token, never less than the mean, never more than it holds", () => {
    expect(busiestSlot(1, 128, 8)).toBeGreaterThanOrEqual(1);
    for (const ep of [1, 2, 4, 8, 16]) {
      for (const distinct of [1, 3, 16, 60, 127, 128]) {
        const busy = busiestSlot(distinct, 128, ep);
        expect(busy).toBeGreaterThanOrEqual(distinct / ep - 1e-9);
        expect(busy).toBeLessThanOrEqual(Math.max(128 / ep, 1) + 1e-9);
      }
    }
    expect(busiestSlot(128, 128, 8)).toBeCloseTo(16, 9);
  });

  test("a sum over one rank is free; over two nodes it costs more than over one", () => {
    const group = { hidden: 4096, world: 16, workers: 1 };
    expect(allReduceSeconds(H200, { ...group, world: 1 }, 64)).toBe(0);
    expect(allReduceSeconds(H200, { ...group, workers: 2 }, 64)).toBeGreaterThan(allReduceSeconds(H200, group, 64));
  });

  test("prefill of a long prompt is bound by arithmetic, and twice the prompt takes more than twice as long", () => {
    const load = loadOf(SCOUT, 1);
    const one = prefill(H200, load, 8192, 8192);
    const two = prefill(H200, load, 16_384, 8192);
    expect(one.bound).toBe("compute");
    expect(two.seconds).toBeGreaterThan(2 * one.seconds - 1e-3);
  });
});

// How a cut divides a model: properties over many cuts, and the refusals.
import fc from "fast-check";
import { expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { cutFaults, keptBy, keptBytes, shardsOf, slicesOf } from "../../../controller/model/shards.ts";
import {
  type Cut,
  type ModelSpec,
  type Range,
  type RankShard,
  Reason_Kind,
  type ShardPlan,
  ShardRule,
  TensorRole,
} from "../../../proto/gen/muster/v1/plan.ts";
import { cacheDir } from "./craft.ts";

const SOURCES = [
  "builtin://nano-maverick",
  "builtin://nano-maverick-q4_k_m",
  "builtin://nano-draft",
  "file://./test/golden/llama-tied",
  "file://./test/golden/llama4-scout",
  "file://./test/fixtures/configs/llama-4-maverick",
  "file://./test/fixtures/configs/deepseek-v3",
];
const specs = await Promise.all(SOURCES.map((source) => readModel(source, { cacheDir, headersOnly: true })));
const [nano, , draft, , , maverick, deepseek] = specs;
const cut = (tp: number, ep = 1): Cut => ({ world: tp, tp, dp: 1, ep, etp: tp / ep, pp: 1 });

function planOf(model: ModelSpec, sizes: Cut, workers: number): ShardPlan {
  return {
    ...{ revision: "r", model, cut: sizes, ranks: shardsOf(model, sizes, workers), ledgers: [], reasons: [], workers },
    ...{ contextTokens: 0, kvBlockTokens: 16, kvBlocks: 0, expertCopies: 0 },
  };
}

const REPLICATED: ReadonlySet<ShardRule> = new Set([ShardRule.REPLICATE, ShardRule.LATENT]);
const area = (rows: Range, cols: Range): number => (rows.end - rows.begin) * (cols.end - cols.begin);

const anyCut = fc.integer({ min: 0, max: 6 }).chain((power) =>
  fc.record({
    spec: fc.constantFrom(...specs),
    tp: fc.constantFrom(1, 2, 3, 4, 5, 8, 2 ** power),
    ep: fc.constantFrom(1, 2, 4, 8, 16),
    workers: fc.integer({ min: 1, max: 4 }),
  }),
);

test("H1: every element of a plane is held once; where a rule replicates, once on each rank that computes with it", () => {
  let checked = 0;
  fc.assert(
    fc.property(anyCut, ({ spec, tp, ep, workers }) => {
      const sizes = cut(tp, ep);
      if (tp % ep !== 0 || cutFaults(spec, sizes).length || workers > tp) return;
      checked++;
      const shards = shardsOf(spec, sizes, workers);
      const isFew = (spec.blocks[0]?.attention?.kvHeads ?? 0) < tp;
      // A big model has thousands of expert planes of one shape: a sample of them is enough.
      const sample = spec.tensors.filter((t, i) => t.rule !== ShardRule.UNSPECIFIED && (i < 600 || i % 97 === 0));
      for (const tensor of sample) {
        const parts = shards.map((shard) => keptBy(tensor, shard, spec)).filter((part) => part !== undefined);
        if (REPLICATED.has(tensor.rule)) {
          expect(parts).toHaveLength(tp);
          for (const part of parts) expect(area(part.rows, part.cols)).toBe(tensor.rows * tensor.cols);
          continue;
        }
        if (tensor.role === TensorRole.OTHER && tensor.rule === ShardRule.EXPERT) continue;
        const copies = tensor.rule === ShardRule.KV_HEADS && isFew ? tp / (spec.blocks[0]?.attention?.kvHeads ?? 1) : 1;
        expect(parts.reduce((sum, part) => sum + area(part.rows, part.cols), 0)).toBe(
          tensor.rows * tensor.cols * copies,
        );
        const starts = new Set(parts.map((part) => `${part.rows.begin} ${part.cols.begin}`));
        expect(starts.size).toBe(parts.length / copies);
      }
    }),
    { seed: 7, numRuns: 600 },
  );
  expect(checked).toBeGreaterThan(40);
});

test("H2: experts live on slot floor(e * ep / experts), each split etp ways", () => {
  const shards = shardsOf(nano ?? never(), { world: 4, tp: 4, dp: 1, ep: 2, etp: 2, pp: 1 }, 2);
  expect(shards.map((shard) => shard.experts)).toEqual([
    [0, 1, 2, 3],
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [4, 5, 6, 7],
  ]);
  expect(shards.map((shard) => shard.expertFfn)).toEqual([
    { begin: 0, end: 128 },
    { begin: 128, end: 256 },
    { begin: 0, end: 128 },
    { begin: 128, end: 256 },
  ]);
  expect(shards.map((shard) => shard.worker)).toEqual([0, 0, 1, 1]);
});

test("H3: a query head's kv head is on its rank, split or replicated", () => {
  for (const tp of [1, 2, 4, 8]) {
    for (const shard of shardsOf(nano ?? never(), cut(tp, 1), 1)) {
      const { heads, kvHeads } = shard;
      for (let head = heads?.begin ?? 0; head < (heads?.end ?? 0); head++) {
        const kv = Math.floor(head / 4);
        expect(kv >= (kvHeads?.begin ?? 0) && kv < (kvHeads?.end ?? 0), `tp ${tp} head ${head}`).toBe(true);
      }
    }
  }
});

test("widths that are no multiple of 32 are still divided, whole blocks first", () => {
  const spec = specs[3] ?? never();
  const widths = (tp: number) =>
    shardsOf(spec, cut(tp), 1).map(({ denseFfn }: RankShard) => (denseFfn?.end ?? 0) - (denseFfn?.begin ?? 0));
  expect(widths(2)).toEqual([32, 64]);
  expect(widths(4)).toEqual([24, 24, 24, 24]);
});

test("three ranks divide nine heads over three kv heads, two do not", () => {
  const nine = structuredClone(draft ?? never());
  for (const block of nine.blocks) if (block.attention) Object.assign(block.attention, { heads: 9, kvHeads: 3 });
  expect(cutFaults(nine, cut(2)).map((fault) => fault.code)).toEqual(["heads-not-divisible", "kv-heads-not-divisible"]);
  expect(cutFaults(nine, cut(2))[0]).toMatchObject({
    kind: Reason_Kind.REFUSED,
    text: "9 query heads do not divide over tp 2.",
  });
  expect(cutFaults(nine, cut(3))).toEqual([]);
  expect(cutFaults(nine, cut(9))).toEqual([]);
});

const codes = (spec: ModelSpec | undefined, sizes: Cut): string[] =>
  cutFaults(spec ?? never(), sizes).map(({ code }) => code);

test("each broken rule has its own reason", () => {
  expect(codes(nano, { ...cut(2), world: 0 })).toEqual(["size-not-positive"]);
  expect(codes(nano, { ...cut(2), tp: 1.5 })).toEqual(["size-not-positive"]);
  expect(codes(nano, { ...cut(2), pp: 2 })).toEqual(["pp-not-supported"]);
  expect(codes(nano, { ...cut(2, 2), tp: 1, dp: 2 })).toEqual(["dp-not-supported"]);
  expect(codes(nano, { ...cut(2), world: 4 })).toEqual(["tp-dp-not-world", "ep-etp-not-world"]);
  expect(codes(nano, cut(16, 16))).toEqual(["heads-not-divisible", "experts-too-few"]);
  expect(codes(draft, cut(2, 2))).toEqual(["no-experts"]);
  expect(codes(maverick, cut(16, 16))).toEqual(["heads-not-divisible"]);
  expect(codes(maverick, cut(8, 8))).toEqual([]);
  expect(codes(deepseek, cut(16, 16))).toEqual([]);
});

test("a cut that does not fit cannot be made by accident", () => {
  expect(() => shardsOf(nano ?? never(), cut(3), 1)).toThrow("cut: 8 query heads do not divide over tp 3.");
  expect(() => shardsOf(nano ?? never(), cut(2, 2), 3)).toThrow("workers: 3 workers for 2 ranks");
});

test("slices of all workers together are the kept parts of all ranks", () => {
  const model = nano ?? never();
  const plan = planOf(model, cut(4, 2), 2);
  const slices = [0, 1].flatMap((worker) => slicesOf(plan, worker));
  expect(new Set(slices.map((slice) => slice.rank))).toEqual(new Set([0, 1, 2, 3]));
  for (const slice of slices) {
    const [tensor, shard] = [model.tensors[slice.tensor], plan.ranks[slice.rank]];
    if (!tensor || !shard) throw new Error("a slice names what is not there");
    expect(keptBy(tensor, shard, model)).toEqual({ rows: slice.rows, cols: slice.cols });
  }
  const expected = model.tensors.flatMap((t) => plan.ranks.filter((shard) => keptBy(t, shard, model)));
  expect(slices).toHaveLength(expected.length);
  const bytes = slices.reduce((sum, { tensor, rows, cols }) => {
    const plane = model.tensors[tensor];
    return sum + (plane && rows && cols ? keptBytes(plane, { rows, cols }) : 0);
  }, 0);
  const stored = model.tensors.reduce(
    (sum, t) => sum + Number(t.bytes) * (REPLICATED.has(t.rule) ? 4 : t.rule === ShardRule.KV_HEADS ? 2 : 1),
    0,
  );
  expect(bytes).toBe(stored);
});

test("embedding and head are cut by the same vocabulary rows", () => {
  const plan = planOf(nano ?? never(), cut(2, 2), 2);
  for (const worker of [0, 1]) {
    const rows = (role: TensorRole) =>
      slicesOf(plan, worker).find((slice) => plan.model?.tensors[slice.tensor]?.role === role)?.rows;
    expect(rows(TensorRole.EMBEDDING)).toEqual({ begin: worker * 1024, end: (worker + 1) * 1024 });
    expect(rows(TensorRole.HEAD)).toEqual(rows(TensorRole.EMBEDDING));
  }
});

test("a model that is plan-only has no slices, a worker without ranks neither", () => {
  expect(() => slicesOf(planOf(deepseek ?? never(), cut(8, 8), 1), 0)).toThrow("family deepseek_v3");
  expect(() => slicesOf(planOf(nano ?? never(), cut(2, 2), 2), 2)).toThrow("the plan has no ranks for worker 2");
});

function never(): never {
  throw new Error("a source was not read");
}

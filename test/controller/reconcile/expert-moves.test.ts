// Experts move where the load says it pays, in pieces that fit, and not otherwise.
import { beforeAll, describe, expect, test } from "vitest";
import { planMap } from "../../../controller/model/expert-slices.ts";
import { readModel } from "../../../controller/model/model.ts";
import { type Inventory, parseInventory } from "../../../controller/plan/hardware.ts";
import { planShards } from "../../../controller/plan/plan.ts";
import { wishesOf } from "../../../controller/plan/wishes.ts";
import { decideExperts, type ExpertVerdict, expertLimits } from "../../../controller/reconcile/expert-moves.ts";
import { type ExpertMap, LedgerClass, type ModelSpec, type ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";

let model: ModelSpec;
beforeAll(async () => {
  model = await readModel(new URL("../../models/nano-maverick/", import.meta.url).href, { headersOnly: true });
});

function gpus(text: string, nodes?: number): Inventory {
  const inventory = parseInventory(text, nodes);
  if (typeof inventory === "string") throw new Error(inventory);
  return inventory;
}

/** 8 experts in 2 layers on 2 slots of 2 workers. */
function planWith(expertCopies = 0): ShardPlan {
  const wishes = wishesOf({ expertCopies, concurrency: 4, pins: { tp: 2, ep: 2, workers: 2 } });
  const planned = planShards(model, gpus("2xH200", 2), wishes);
  if (planned.kind !== "feasible") throw new Error(JSON.stringify(planned.reasons));
  return planned.plan;
}

const EVEN = new Array<number>(8).fill(10_000);

const HOT = [100_000, 5_000, 5_000, 5_000, 5_000, 5_000, 5_000, 5_000];
const SKEWED = [40_000, 30_000, 20_000, 10_000, 1_000, 1_000, 1_000, 1_000];

function ask(plan: ShardPlan, layers: readonly (readonly number[])[], current: ExpertMap = planMap(plan)) {
  const load = current.layers.map(({ block }, index) => ({ block, tokens: (layers[index] ?? []).map(BigInt) }));
  return decideExperts({ plan, current, load, stepMs: 20, windowMs: 300_000 });
}

function moved(verdict: ExpertVerdict): Extract<ExpertVerdict, { kind: "move" }> {
  if (verdict.kind !== "move") throw new Error(`${verdict.code}: ${verdict.text}`);
  return verdict;
}

const held = ({ layers, slots }: ExpertMap, layer: number, slot: number): number[] => {
  const places = layers[layer]?.places ?? [];
  const perSlot = places.length / slots;
  return places.slice(slot * perSlot, (slot + 1) * perSlot).toSorted((a, b) => a - b);
};

describe("decideExperts", () => {
  test("a skewed layer is spread, an even one stays as it is, and the version grows", () => {
    const { map, imbalance, text } = moved(ask(planWith(), [SKEWED, EVEN]));
    expect(map.version).toBe(1);
    expect(imbalance.before).toBeGreaterThan(1.2);
    expect(imbalance.after).toBeLessThan(1.05);
    expect(text).toMatch(/^experts by load: imbalance 1\.\d\d -> 1\.0\d$/);
    expect(held(map, 1, 0)).toEqual([0, 1, 2, 3]);
    expect(held(map, 0, 0)).not.toEqual([0, 1, 2, 3]);
    expect([...held(map, 0, 0), ...held(map, 0, 1)].toSorted((a, b) => a - b)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    // What was decided is decided: the same load again moves nothing.
    expect(ask(planWith(), [SKEWED, EVEN], map)).toMatchObject({ kind: "stay" });
  });

  test("no load, little load and an even load move nothing", () => {
    const plan = planWith();
    expect(ask(plan, [[], []])).toMatchObject({ kind: "stay", code: "load-small" });
    expect(ask(plan, [SKEWED.map((count) => count / 1_000), []])).toMatchObject({ kind: "stay", code: "load-small" });
    expect(ask(plan, [EVEN, EVEN])).toMatchObject({ kind: "stay", code: "same-map" });
  });

  test("one slot has nothing to move", () => {
    const wishes = wishesOf({ concurrency: 4, pins: { tp: 2, ep: 1 } });
    const planned = planShards(model, gpus("2xH200"), wishes);
    if (planned.kind !== "feasible") throw new Error("infeasible");
    expect(ask(planned.plan, [SKEWED, SKEWED])).toMatchObject({ kind: "stay", code: "one-slot" });
  });

  test("copies come to the busiest experts; their room was planned", () => {
    const plan = planWith(2);
    const bytes = (of: ShardPlan) =>
      Number(of.ledgers[0]?.lines.find((line) => line.class === LedgerClass.EXPERTS)?.bytes ?? 0n);
    // One place more besides four.
    expect(bytes(plan) / bytes(planWith())).toBeCloseTo(1.25, 3);
    expect(plan.revision).not.toBe(planWith().revision);
    const { map, text } = moved(ask(plan, [HOT, EVEN]));
    expect(text).toMatch(/^2 copies in each layer/);
    for (const layer of [0, 1]) expect(held(map, layer, 0)).toHaveLength(5);
    const both = held(map, 0, 0).filter((expert) => held(map, 0, 1).includes(expert));
    expect(both).toContain(0);
    // The even layer keeps what its slots had, as far as one of two sets of five can.
    expect(held(map, 1, 0).filter((expert) => expert < 4).length).toBeGreaterThanOrEqual(3);
    expect(ask(plan, [HOT, EVEN], map)).toMatchObject({ kind: "stay" });
  });

  test("what is moved at once fits in the reserve: the layer that gains most comes first", () => {
    const plan = planWith();
    const reserve = (bytes: bigint): ShardPlan => ({
      ...plan,
      ledgers: plan.ledgers.map((ledger) => ({
        ...ledger,
        lines: ledger.lines.map((line) => (line.class === LedgerClass.RESERVE ? { ...line, bytes } : line)),
      })),
    });
    const mild = [20_000, 20_000, 20_000, 20_000, 10_000, 10_000, 10_000, 10_000];
    const tight = moved(ask(reserve(1n), [mild, SKEWED]));
    expect(held(tight.map, 0, 0)).toEqual([0, 1, 2, 3]);
    expect(held(tight.map, 1, 0)).not.toEqual([0, 1, 2, 3]);
    const next = moved(ask(reserve(1n), [mild, SKEWED], tight.map));
    expect(next.map.version).toBe(2);
    expect(held(next.map, 0, 0)).not.toEqual([0, 1, 2, 3]);
    const roomy = moved(ask(plan, [mild, SKEWED]));
    expect(held(roomy.map, 0, 0)).not.toEqual([0, 1, 2, 3]);
  });

  test("a move that costs more than it saves until the next look stays", () => {
    const plan = planWith();
    const current = planMap(plan);
    const load = current.layers.map(({ block }) => ({ block, tokens: SKEWED.map(BigInt) }));
    const limits = { ...expertLimits, moveBytesPerSecond: 1 };
    expect(decideExperts({ plan, current, load, stepMs: 20, windowMs: 300_000 }, limits)).toMatchObject({
      kind: "stay",
      code: "cost-large",
    });
  });
});

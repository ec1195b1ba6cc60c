// What a plan is said to have given: marks that only rise, latencies that go with their mark, and the share of the roofline.
import { expect, test } from "vitest";
import { latenciesOf, measuredWith, type Seen } from "../../../../controller/kube/owners/plan-measured.ts";
import type { LoadSample } from "../../../../controller/reconcile/autoscale.ts";

const NOW = Date.UTC(2026, 10, 2, 10, 0, 0);
const PREDICTION = {
  ttftMs: 10,
  itlMs: 5,
  tokensPerSecond: 800,
  concurrency: 16,
  bound: "memory",
  calibration: 0.8,
} as const;
const at = (ms: number) => new Date(NOW + ms).toISOString();
const seen = (
  tokensPerSecond: number,
  concurrency: number,
  more: Partial<Seen> & { accepted?: number } = {},
): Seen => ({
  rates: [{ tokensPerSecond, plainPerSecond: tokensPerSecond - (more.accepted ?? 0), concurrency }],
  latencies: more.latencies ?? {},
});

/** One after the other, ten seconds apart. */
const after = (...looks: readonly Seen[]) =>
  looks.reduce<ReturnType<typeof measuredWith>>(
    (before, look, index) => measuredWith(before, PREDICTION, look, NOW + index * 10_000),
    undefined,
  );

test("M1: the most of one group counts; a mark has its concurrency and its time, and what is less, or by chance more, is none", () => {
  expect(after({ rates: [], latencies: {} })).toBeUndefined();
  expect(after(seen(0, 0))).toBeUndefined();
  const mark = { at: at(0), tokensPerSecond: 100, concurrency: 2 };
  expect(after(seen(100.001, 2.2))).toEqual(mark);
  expect(after(seen(100, 2), seen(90, 2), seen(104, 8))).toEqual(mark);
  expect(after(seen(100, 2), seen(106, 3))).toEqual({ at: at(10_000), tokensPerSecond: 106, concurrency: 3 });
  const two = { rates: [...seen(40, 1).rates, ...seen(70, 4).rates], latencies: {} };
  expect(after(two)).toMatchObject({ tokensPerSecond: 70, concurrency: 4 });
});

test("M2: latencies are those at the most sequences at once, the least of them; what nobody told is left out", () => {
  const mark = { at: at(0), tokensPerSecond: 100, concurrency: 4 };
  const told = (latencies: Seen["latencies"], concurrency = 4) => seen(100, concurrency, { latencies });
  expect(after(told({}))).toEqual(mark);
  expect(after(told({}), told({ ttftMs: 90, itlMs: 12 }))).toEqual({
    ...mark,
    ttftMs: 90,
    itlMs: 12,
    latencyConcurrency: 4,
  });
  const latencies = { ttftMs: 90, itlMs: 12 };
  const known = { ...mark, ...latencies, latencyConcurrency: 4 };
  expect(after(told(latencies), told({ ttftMs: 200, itlMs: 40 }))).toEqual(known);
  expect(after(told(latencies), told({ ttftMs: 88, itlMs: 6 }))).toEqual({ ...known, itlMs: 6 });
  expect(after(told({ itlMs: 12 }), told({ ttftMs: 90, itlMs: 99 }))).toEqual(known);
  expect(after(told(latencies), told({ ttftMs: 1, itlMs: 1 }, 2))).toEqual(known);
  expect(after(told(latencies), told({ itlMs: 30 }, 8))).toEqual({ ...mark, itlMs: 30, latencyConcurrency: 8 });
  // A new mark of whose latencies nobody tells leaves them as they were.
  expect(after(told(latencies), seen(300, 9))).toEqual({
    ...known,
    at: at(10_000),
    tokensPerSecond: 300,
    concurrency: 9,
  });
  // Gateways tell of all groups: on average.
  const two = { rates: [...seen(40, 2).rates, ...seen(70, 6).rates], latencies };
  expect(after(two)).toMatchObject({ concurrency: 6, latencyConcurrency: 4 });
});

test("M4: the share of the roofline is the best at the predicted concurrency, guesses aside; it outlives its mark", () => {
  expect(after(seen(700, 8))).not.toHaveProperty("calibration");
  expect(after(seen(700, 18))).not.toHaveProperty("calibration");
  expect(after(seen(700, 16))?.calibration).toBe(0.7);
  expect(after(seen(700, 14.5, { accepted: 200 }))?.calibration).toBe(0.5);
  expect(after(seen(700, 16), seen(300, 16))?.calibration).toBe(0.7);
  expect(after(seen(300, 16), seen(700, 64), seen(450, 15.9))).toEqual({
    at: at(10_000),
    tokensPerSecond: 700,
    concurrency: 64,
    calibration: 0.45,
  });
});

const sample = (secondsAgo: number, change: Partial<LoadSample> = {}): LoadSample => ({
  atMs: NOW - secondsAgo * 1_000,
  serving: 2,
  queue: 0,
  running: 3,
  arrivals: 1,
  tokensPerSecond: 10,
  ttftMs: undefined,
  itlMs: undefined,
  ...change,
});

test("M3: the worst of the last ten seconds, and nothing until every replica has served for twice as long", () => {
  const told = [
    sample(17, { ttftMs: 900, itlMs: 70 }),
    sample(12),
    sample(7, { ttftMs: 40, itlMs: 8.126 }),
    sample(2, { itlMs: 9 }),
  ];
  expect(latenciesOf(told, NOW)).toEqual({ ttftMs: 40, itlMs: 9 });
  expect(latenciesOf([...told.slice(0, 3), sample(2)], NOW)).toEqual({ ttftMs: 40, itlMs: 8.13 });
  expect(latenciesOf([sample(17), sample(12), sample(7), sample(2)], NOW)).toEqual({});
  expect(latenciesOf(told.slice(2), NOW)).toEqual({});
  expect(latenciesOf([], NOW)).toEqual({});
  const held = [sample(17, { serving: 0, queue: 1 }), sample(12), ...told.slice(2)];
  expect(latenciesOf(held, NOW)).toEqual({});
  const lost = [sample(17), sample(12, { serving: 1 }), ...told.slice(2)];
  expect(latenciesOf(lost, NOW)).toEqual({});
  const grown = [sample(17, { serving: 1 }), sample(12, { serving: 1 }), ...told.slice(2)];
  expect(latenciesOf(grown, NOW)).toEqual({ ttftMs: 40, itlMs: 9 });
});

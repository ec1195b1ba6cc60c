// The autoscaler: rules one by one, then whole traces in virtual time against fixed numbers of replicas.
// Regenerate the committed trace: UPDATE_GOLDEN=1 npx vitest run test/controller/reconcile/autoscale.test.ts
import { readFileSync, writeFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  autoscale,
  freshState,
  HISTORY_MS,
  type LoadSample,
  type ScalePolicy,
  type ScaleState,
  scaleLimits,
} from "../../../controller/reconcile/autoscale.ts";
import { countsPerMinute, type Outcome, play, type ReplicaModel, type Run, requestsOf } from "./traffic.ts";

const POLICY: ScalePolicy = {
  min: 1,
  max: 12,
  targets: { queue: 4, ttftMs: 10_000 },
  concurrency: 8,
  tokensPerSecond: undefined,
  startMs: 60_000,
};
const NOW = 1_000_000;

function sample(changes: Partial<LoadSample> = {}): LoadSample {
  const base = { atMs: NOW, serving: 2, queue: 0, running: 10, arrivals: 1, tokensPerSecond: 100 };
  return { ...base, ttftMs: 500, itlMs: 30, ...changes };
}

/** A load that has lasted for `ms`. */
function lasting(ms: number, changes: Partial<LoadSample> = {}): LoadSample[] {
  return Array.from({ length: ms / 5000 + 1 }, (_, index) => sample({ ...changes, atMs: NOW - ms + index * 5000 }));
}

const rested = (target: number, changes: Partial<ScaleState> = {}): ScaleState => ({
  ...freshState(target, 0),
  ...changes,
});
const ask = (history: LoadSample[], state: ScaleState, policy: Partial<ScalePolicy> = {}) =>
  autoscale({ nowMs: NOW, history, policy: { ...POLICY, ...policy }, state });
const code = (...question: Parameters<typeof ask>) => {
  const { targetReplicas, reason } = ask(...question);
  return [reason.code, targetReplicas];
};

describe("growing", () => {
  test("each signal asks by its own name", () => {
    expect(code(lasting(60_000, { running: 14 }), rested(2))).toEqual(["concurrency", 3]);
    expect(code(lasting(60_000, { queue: 9, running: 10 }), rested(2), { concurrency: 64 })).toEqual(["queue", 3]);
    expect(code(lasting(60_000, { ttftMs: 14_000 }), rested(2))).toEqual(["ttft", 3]);
    expect(code(lasting(60_000, { itlMs: 90 }), rested(2), { targets: { itlMs: 30 } })).toEqual(["itl", 4]);
    expect(code(lasting(60_000, { tokensPerSecond: 220 }), rested(2), { tokensPerSecond: 100 })).toEqual([
      "throughput",
      3,
    ]);
    const rising = lasting(115_000).map((each, index) => ({ ...each, running: 1 + index }));
    expect(code(rising, rested(3))).toEqual(["trend", 5]);
  });

  test("a rise within chance is no trend", () => {
    const rising = lasting(115_000).map((each, index) => ({ ...each, running: 10 + (index % 12) / 3 + index / 8 }));
    expect(code(rising, rested(3))[0]).not.toBe("trend");
  });

  test("slow answers of an empty deployment are not for want of replicas", () => {
    expect(code(lasting(60_000, { running: 7, ttftMs: 60_000 }), rested(2))[0]).toBe("steady");
  });

  test("a backlog of a deployment that has grown already is not counted whole", () => {
    const flow = { running: 24, serving: 3, arrivals: 5, ttftMs: undefined };
    const saturated = lasting(60_000, flow).map((each, index) => ({ ...each, queue: 40 + index }));
    const { reason } = ask(saturated, rested(3));
    // Counted whole it would be 24 + 46 sequences: nine replicas of eight and more.
    expect(reason.wanted).toBeLessThan(9);
    expect(reason.wanted).toBeGreaterThan(3);
  });

  test("S3: the target at most doubles, or grows by two from one", () => {
    expect(code(lasting(60_000, { queue: 500, serving: 3 }), rested(3))).toEqual(["concurrency", 6]);
    expect(code(lasting(60_000, { queue: 500, serving: 1 }), rested(1))).toEqual(["concurrency", 3]);
  });

  test("S4: no second step before the first could show, and none past max, both said", () => {
    const busy = lasting(60_000, { queue: 500 });
    expect(code(busy, rested(2, { grownMs: NOW - 10_000 }))).toEqual(["cooling", 2]);
    expect(ask(busy, rested(2, { grownMs: NOW - 20_000 })).wakeMs).toBe(NOW + 10_000);
    expect(code(busy, rested(12))).toEqual(["at-max", 12]);
    expect(code(busy, rested(10))).toEqual(["concurrency", 12]);
  });
});

describe("shrinking", () => {
  const LONG = HISTORY_MS;
  const quiet = lasting(LONG, { running: 2, serving: 8 });
  const since = (ms: number) => rested(8, { grownMs: NOW - ms });

  test("S4: not before calmMs have passed since it grew, and at most once in meanMs", () => {
    expect(code(quiet, since(scaleLimits.calmMs))).toEqual(["low", 4]);
    expect(ask(quiet, since(scaleLimits.calmMs - 4000))).toMatchObject({
      targetReplicas: 8,
      reason: { code: "calming" },
      wakeMs: NOW + 4000,
    });
    expect(code(quiet, rested(8, { shrunkMs: NOW - scaleLimits.meanMs + 1 }))).toEqual(["calming", 8]);
    expect(code(quiet, rested(8, { shrunkMs: NOW - scaleLimits.meanMs }))).toEqual(["low", 4]);
    expect(code(quiet, rested(2))).toEqual(["low", 1]);
    expect(code(quiet, rested(1))).toEqual(["steady", 1]);
  });

  test("S4: to the most that was wanted during calmMs, however long ago in it", () => {
    const busy = (fromMs: number) =>
      quiet.map((each) =>
        each.atMs > NOW - fromMs && each.atMs <= NOW - fromMs + 60_000 ? { ...each, running: 30 } : each,
      );
    expect(code(busy(540_000), rested(8))).toEqual(["low", 7]);
    expect(code(busy(240_000), rested(8))).toEqual(["low", 7]);
    expect(code(busy(700_000), rested(8))).toEqual(["low", 4]);
  });

  test("what was before the first sample is not known and is waited for", () => {
    expect(code(lasting(60_000, { running: 2, serving: 8 }), rested(8))).toEqual(["calming", 8]);
  });

  test("between growing and shrinking it rests", () => {
    for (const running of [4, 8, 12]) expect(code(lasting(LONG, { running }), rested(2))).toEqual(["steady", 2]);
    expect(code(lasting(LONG, { running: 13 }), rested(2))).toEqual(["concurrency", 3]);
    expect(code(lasting(LONG, { running: 1 }), rested(2))).toEqual(["low", 1]);
  });
});

describe("sleep and wake", () => {
  const nothing = lasting(HISTORY_MS, { running: 0, arrivals: 0, serving: 1, ttftMs: undefined, itlMs: undefined });
  const policy = { min: 0 };

  test("S2: falls asleep after idleMs, not before, and never where min is 1", () => {
    const state = rested(1, { idleSinceMs: NOW - scaleLimits.idleMs });
    expect(code(nothing, state, policy)).toEqual(["idle", 0]);
    expect(code(nothing, rested(5, { idleSinceMs: NOW - scaleLimits.idleMs }), policy)).toEqual(["idle", 0]);
    expect(code(nothing, state)).toEqual(["steady", 1]);
    expect(ask(nothing, rested(1, { idleSinceMs: NOW - scaleLimits.idleMs + 4000 }), policy).wakeMs).toBe(NOW + 4000);
    expect(ask(nothing, rested(1), policy).state.idleSinceMs).toBe(NOW);
  });

  test("a request between two looks is seen by its arrival", () => {
    const seen = nothing.with(-1, sample({ running: 0, serving: 1, arrivals: 1 }));
    const decision = ask(seen, rested(1, { idleSinceMs: 0 }), policy);
    expect(decision).toMatchObject({ targetReplicas: 1, state: { idleSinceMs: undefined } });
  });

  test("S6: a waiting request wakes it at once, many wake several", () => {
    const asleep = rested(0, { grownMs: NOW - 1, shrunkMs: NOW - 1 });
    const held = (queue: number) => [sample({ serving: 0, running: 0, queue })];
    expect(code(nothing, asleep, policy)).toEqual(["idle", 0]);
    expect(code(held(1), asleep, policy)).toEqual(["wake", 1]);
    expect(code(held(30), asleep, policy)).toEqual(["wake", 4]);
    expect(code(held(900), asleep, policy)).toEqual(["wake", 12]);
  });
});

test("S5: without a fresh measurement nothing changes but the bounds", () => {
  const state = rested(5, { idleSinceMs: 1 });
  const unseen = { targetReplicas: 5, reason: { code: "no-load-seen" }, state: { idleSinceMs: undefined } };
  expect(ask([], state)).toMatchObject(unseen);
  expect(ask([sample({ atMs: NOW - 61_000, running: 0, queue: 99 })], state)).toMatchObject(unseen);
  expect(code([], rested(50))).toEqual(["bounds", 12]);
  expect(code([], rested(0))).toEqual(["bounds", 1]);
});

// ---- properties over any history ----

const histories = fc.array(
  fc.record({
    serving: fc.nat({ max: 12 }),
    queue: fc.oneof(fc.constant(0), fc.nat({ max: 300 })),
    running: fc.oneof(fc.constant(0), fc.nat({ max: 100 })),
    arrivals: fc.oneof(fc.constant(0), fc.nat({ max: 50 })),
    tokensPerSecond: fc.nat({ max: 5000 }),
    ttftMs: fc.option(fc.nat({ max: 60_000 }), { nil: undefined }),
    itlMs: fc.option(fc.nat({ max: 500 }), { nil: undefined }),
  }),
  { minLength: 1, maxLength: 120 },
);

test("S1 to S4 hold at every look of any history", () => {
  const policies = fc.record({ min: fc.nat({ max: 2 }), max: fc.integer({ min: 2, max: 12 }) });
  fc.assert(
    fc.property(histories, policies, fc.constantFrom(5000, 20_000, 90_000), (loads, bounds, stepMs) => {
      const policy: ScalePolicy = { ...POLICY, ...bounds, tokensPerSecond: 400 };
      const history: LoadSample[] = [];
      let state = freshState(bounds.min, 0);
      let lastUpMs = Number.NEGATIVE_INFINITY;
      let lastDownMs = Number.NEGATIVE_INFINITY;
      for (const [index, load] of loads.entries()) {
        const nowMs = index * stepMs;
        history.push({ ...load, atMs: nowMs });
        const question = { nowMs, history, policy, state };
        const decision = autoscale(question);
        expect(autoscale(structuredClone(question))).toEqual(decision);
        const { targetReplicas: to, reason } = decision;
        const from = state.target;
        expect(to).toBeGreaterThanOrEqual(policy.min);
        expect(to).toBeLessThanOrEqual(policy.max);
        expect(decision.wakeMs).toBeGreaterThan(nowMs);
        expect(reason.text).not.toBe("");
        if (to > from && from > 0) {
          expect(to).toBeLessThanOrEqual(Math.max(from * 2, from + scaleLimits.stepUpMin));
          expect(nowMs - lastUpMs).toBeGreaterThanOrEqual(scaleLimits.upCoolMs);
        }
        if (reason.code === "low") {
          expect(to).toBeGreaterThanOrEqual(from - Math.max(1, Math.floor(from / 2)));
          expect(nowMs - lastUpMs).toBeGreaterThanOrEqual(scaleLimits.calmMs);
          expect(nowMs - lastDownMs).toBeGreaterThanOrEqual(scaleLimits.meanMs);
        }
        if (to < from) expect(["low", "idle"]).toContain(reason.code);
        if (to === 0) expect(reason.code).toBe("idle");
        if (to > from) lastUpMs = nowMs;
        if (to < from) lastDownMs = nowMs;
        state = decision.state;
      }
    }),
    { numRuns: 300 },
  );
});

// ---- traces ----

const MINUTE = 60_000;

/** A day: nobody for an hour of the night, two humps by day, four bursts of eight minutes; requests per second. */
function rateAt(minute: number): number {
  if (minute >= 150 && minute < 210) return 0;
  const hump = (at: number, width: number): number => Math.exp(-(((minute - at) / width) ** 2));
  const rate = 0.06 + 1.5 * hump(660, 150) + 1.1 * hump(1080, 120);
  return [430, 700, 900, 1290].some((at) => minute >= at && minute < at + 8) ? rate * 1.6 + 0.1 : rate;
}

const FILE = new URL("traffic.csv", import.meta.url);
const HEADER = "minute,requests";
const made = countsPerMinute(rateAt, 1440, 4);
if (process.env.UPDATE_GOLDEN === "1") {
  writeFileSync(FILE, `${HEADER}\n${made.map((requests, minute) => `${minute},${requests}`).join("\n")}\n`);
}

function committed(): number[] {
  const lines = readFileSync(FILE, "utf8").trim().split("\n").slice(1);
  return lines.map((line) => Number(line.split(",")[1]));
}

test("the committed day is what its generator makes", () => expect(committed()).toEqual(made));

const REPLICA: ReplicaModel = {
  concurrency: 8,
  startMs: MINUTE,
  prefillTokensPerSecond: 4000,
  itlMs: 90,
  itlMsPerSequence: 10,
};
const RUN: Run = {
  policy: {
    ...POLICY,
    concurrency: REPLICA.concurrency,
    startMs: REPLICA.startMs,
    targets: { queue: 2, ttftMs: 10_000 },
  },
  replica: REPLICA,
  start: 1,
};

const summary = ({ withinTtft, replicaSeconds, peak, changes }: Outcome): string =>
  `${(withinTtft * 100).toFixed(2)} % within the target, ${(replicaSeconds / 3600).toFixed(1)} replica hours, at most ${peak}, ${changes.length} changes`;

describe("the committed day in virtual time", () => {
  const trace = requestsOf(committed(), 5);
  const scaled = play(trace, RUN);

  test("serves what a fixed number serves that costs twice as much", () => {
    const least = Math.ceil(scaled.replicaSeconds / 86_400);
    const fixed = Array.from({ length: 13 - least }, (_, index) => play(trace, { ...RUN, fixed: least + index }));
    console.log(`autoscaled: ${summary(scaled)}`);
    for (const outcome of fixed) console.log(`fixed: ${summary(outcome)}`);
    expect(scaled.withinTtft).toBeGreaterThan(0.99);
    const cheapest = fixed.find(({ withinTtft }) => withinTtft >= scaled.withinTtft);
    expect(cheapest).toBeDefined();
    expect(scaled.replicaSeconds * 2).toBeLessThan(cheapest?.replicaSeconds ?? 0);
  });

  test("does not flap: no growth is taken back within calmMs, no replica comes and goes more often than load does", () => {
    let grownMs = Number.NEGATIVE_INFINITY;
    let taken = 0;
    for (const { atMs, from, to } of scaled.changes) {
      if (to > from) grownMs = atMs;
      else expect(atMs - grownMs).toBeGreaterThanOrEqual(scaleLimits.calmMs);
      taken += Math.abs(to - from);
    }
    // Two humps of eight replicas and four bursts of three are about 2 * (2 * 8 + 4 * 3) = 56 steps up and down.
    expect(taken).toBeLessThan(112);
  });

  test("sleeps through the silence and wakes for the first request", () => {
    const outcome = play(trace, { ...RUN, policy: { ...RUN.policy, min: 0 } });
    const asleep = outcome.changes.find(({ to, atMs }) => to === 0 && atMs > 100 * MINUTE);
    const awake = outcome.changes.find(({ from, atMs }) => from === 0 && atMs > (asleep?.atMs ?? 0));
    expect(asleep?.code).toBe("idle");
    expect((asleep?.atMs ?? 0) / MINUTE).toBeGreaterThanOrEqual(150);
    expect((asleep?.atMs ?? 0) / MINUTE).toBeLessThan(165);
    expect(awake?.code).toBe("wake");
    const first = trace.find(({ atMs }) => atMs >= 210 * MINUTE)?.atMs ?? 0;
    expect((awake?.atMs ?? 0) - first).toBeLessThanOrEqual(10_000);
    expect(outcome.replicaSeconds).toBeLessThan(scaled.replicaSeconds);
  });

  test("S1: same day, same run", () => {
    expect(play(trace, RUN)).toEqual(scaled);
  });
});

test("a constant load is left alone most of the time, whatever its size", () => {
  for (const [seed, rate] of [0.1, 0.4, 0.9, 1.5].entries()) {
    const { changes, withinTtft } = play(
      requestsOf(
        countsPerMinute(() => rate, 600, seed + 1),
        seed + 1,
      ),
      RUN,
    );
    const late = changes.filter(({ atMs }) => atMs > 30 * MINUTE);
    console.log(`constant ${rate}/s: ${late.length} changes in 9.5 hours, ${(withinTtft * 100).toFixed(1)} % in time`);
    expect(late.length).toBeLessThanOrEqual(40);
    expect(withinTtft).toBeGreaterThan(0.97);
  }
});

// What a deployment has measured of itself, in later questions to the planner, in suggestions and in the autoscaler's idea of
// one replica; and what it never does: plan anything anew.
import { describe, expect, test } from "vitest";
import { deviceOf, gpuInventory } from "../../../controller/plan/hardware.ts";
import {
  CALIBRATION_MIN,
  calibrationFor,
  calibrationFrom,
  expectedTokensPerSecond,
} from "../../../controller/reconcile/deployment/calibration.ts";
import { decideDeployment } from "../../../controller/reconcile/deployment/decide.ts";
import { answerFor } from "../../../controller/reconcile/deployment/planning.ts";
import { betterPlan } from "../../../controller/reconcile/deployment/stored-plan.ts";
import type { StoredPlan } from "../../../controller/reconcile/deployment/world.ts";
import { modelSpec, NINE_HEADS } from "../plan/models.ts";
import { group, NOW, SERVING, storedPlan, wishOf, world } from "./deployment-views.ts";

const PREDICTION = { ttftMs: 10, itlMs: 5, tokensPerSecond: 800, concurrency: 16, bound: "memory" } as const;

function planOf(
  name: string,
  more: { calibration?: number; createdMs?: number; prediction?: object } = {},
): StoredPlan {
  const plan = storedPlan(name, "", more.createdMs ?? NOW);
  const prediction = { ...PREDICTION, ...more.prediction };
  return { ...plan, spec: { ...plan.spec, prediction }, measured: { calibration: more.calibration } };
}

describe("C1 to C3: a share of the roofline", () => {
  const from = (tokensPerSecond: number, calibration?: number, concurrency = 16) =>
    calibrationFrom(
      { ...PREDICTION, ...(calibration === undefined ? {} : { calibration }) },
      { tokensPerSecond, concurrency },
    );

  test.each([
    [800, undefined, 0.8],
    [800, 0.8, 0.8],
    [800, 0.5, 0.5],
    [400, 0.5, 0.25],
    [849, 0.8, 0.8],
    [850, 0.8, 0.85],
    [5_000, 0.8, 1],
    [1, 0.8, CALIBRATION_MIN],
    [0, 0.8, undefined],
  ])("%d tokens/s of 800 predicted with %s is %s of the roofline", (tokensPerSecond, calibration, share) => {
    expect(from(tokensPerSecond, calibration)).toBe(share);
  });

  test("only at the predicted concurrency: nothing else was predicted", () => {
    expect([14, 14.5, 17.5, 18].map((concurrency) => from(800, 0.8, concurrency))).toEqual([
      undefined,
      0.8,
      0.8,
      undefined,
    ]);
  });

  test("of everything between it is a step, and no less for more tokens", () => {
    let last = 0;
    for (let tokensPerSecond = 1; tokensPerSecond < 1_200; tokensPerSecond += 7) {
      const share = from(tokensPerSecond) ?? Number.NaN;
      expect(Number.isInteger(Math.round(share * 1e9) / 5e7)).toBe(true);
      expect(share).toBeGreaterThanOrEqual(last);
      last = share;
    }
  });
});

test("a question takes it from the wanted plan, else from one that groups follow, else from the newest that has one", () => {
  const old = planOf("chat-old00", { calibration: 0.3, createdMs: NOW - 3 });
  const used = planOf("chat-used0", { calibration: 0.5, createdMs: NOW - 2 });
  const idle = planOf("chat-idle0", { calibration: 0.7, createdMs: NOW - 1 });
  const silent = planOf("chat-new00");
  const groups = [group({ ordinal: 0, plan: "chat-used0", status: SERVING })];
  const plans = [idle, old, silent, used];
  expect(calibrationFor("chat-old00", { plans, groups })).toBe(0.3);
  expect(calibrationFor("chat-new00", { plans, groups })).toBe(0.5);
  expect(calibrationFor("chat-new00", { plans, groups: [] })).toBe(0.7);
  expect(calibrationFor("chat-new00", { plans: [silent], groups })).toBeUndefined();
});

describe("C4: a measurement plans nothing anew", () => {
  const device = deviceOf("H200");
  const all = device === undefined ? { nodes: [] } : gpuInventory(device, 8);
  const model = { ...modelSpec(NINE_HEADS), digest: "ab".repeat(32) };
  const answer = (calibration: number | undefined) => {
    const planning = answerFor(model, { question: wishOf().question, grounds: { free: all, all }, calibration });
    if (planning.kind !== "feasible") throw new Error("infeasible");
    return planning.spec;
  };

  /** Reasons say what is predicted, too. */
  const unpredicted = ({ prediction: _, reasons, ...rest }: ReturnType<typeof answer>) => ({
    ...rest,
    reasons: reasons.map(({ text, ...reason }) => ({
      ...reason,
      text: text.replace(/\d+ tokens\/s for/, "tokens/s for"),
    })),
  });

  test("whatever the factor, the answer is the same plan but for what is predicted, and says what it counts on", () => {
    const first = answer(undefined);
    const { prediction: before } = first;
    expect(before.calibration).toBe(0.8);
    for (const calibration of [0.05, 0.4, 0.8, 1]) {
      const next = answer(calibration);
      const { prediction } = next;
      expect(unpredicted(next)).toEqual(unpredicted(first));
      expect(prediction.calibration).toBe(calibration);
      expect(prediction.tokensPerSecond).toBeCloseTo((before.tokensPerSecond * calibration) / 0.8, 6);
      expect(prediction.itlMs).toBeCloseTo((before.itlMs * 0.8) / calibration, 6);
    }
  });

  test("decisions about an owner whose plan is stored are the same before and after", () => {
    const { planName } = wishOf();
    const decide = (calibration?: number) =>
      decideDeployment(
        world({
          plans: [planOf(planName, calibration === undefined ? {} : { calibration })],
          groups: [group({ ordinal: 0, plan: planName, status: SERVING })],
        }),
      );
    expect(decide(0.05)).toEqual(decide());
    expect(decide(1)).toEqual(decide());
    expect(decide().actions).toEqual([]);
  });

  test("a better plan is better with one factor for both, whichever it was found with", () => {
    const stored = planOf("chat-00000", { prediction: { calibration: 0.8 } });
    const other = (tokensPerSecond: number, calibration: number) => ({
      ...stored.spec,
      revision: "c".repeat(32),
      prediction: { ...PREDICTION, tokensPerSecond, calibration },
    });
    expect(betterPlan(stored, other(1_000, 1))).toBeUndefined();
    expect(betterPlan(stored, other(1_200, 1))).toContain("20% more tokens per second");
    expect(betterPlan(stored, other(600, 0.4))).toContain("50% more tokens per second");
    const { prediction: _, ...rest } = stored.spec;
    const unsaid = { ...stored, spec: { ...rest, prediction: PREDICTION } };
    expect(betterPlan(unsaid, other(888, 0.8))).toContain("11% more tokens per second");
  });
});

test("one replica is expected to give what its prediction is by the measured factor, and no less than it was seen to give", () => {
  const expected = (measured: StoredPlan["measured"], calibration = 0.8) =>
    expectedTokensPerSecond({ ...planOf("chat-00000", { prediction: { calibration } }), measured });
  expect(expected({})).toBe(800);
  expect(expected({ calibration: 0.4 })).toBe(400);
  expect(expected({ calibration: 0.8 }, 0.4)).toBe(1_600);
  expect(expected({ calibration: 0.4, tokensPerSecond: 300 })).toBe(400);
  expect(expected({ calibration: 0.4, tokensPerSecond: 650 })).toBe(650);
});

test("the autoscaler counts on what was measured: a load that one predicted replica would bear asks for two real ones", () => {
  const autoscale = { min: 1, max: 4, targets: { queue: 4 } };
  const { planName } = wishOf({ autoscale });
  const load = Array.from({ length: 13 }, (_, index) => ({
    atMs: NOW - (12 - index) * 5_000,
    serving: 1,
    queue: 0,
    running: 4,
    arrivals: 1,
    tokensPerSecond: 300,
    ttftMs: undefined,
    itlMs: undefined,
  }));
  const target = (calibration?: number) =>
    decideDeployment(
      world(
        {
          plans: [planOf(planName, calibration === undefined ? {} : { calibration })],
          groups: [group({ ordinal: 0, plan: planName, status: SERVING })],
          load,
          scale: { target: 1, grownMs: NOW - 3_600_000, shrunkMs: undefined, idleSinceMs: undefined },
        },
        { autoscale },
      ),
    ).status.targetReplicas;
  expect(target()).toBe(1);
  expect(target(0.3)).toBe(2);
});

import { describe, expect, test } from "vitest";
import { modelDeploymentStatus } from "../../../controller/api/model-deployment.ts";
import { deviceCount, deviceOf, gpuInventory } from "../../../controller/plan/hardware.ts";
import { planColumn, spanText, throughputColumn } from "../../../controller/reconcile/deployment/columns.ts";
import { decideDeployment } from "../../../controller/reconcile/deployment/decide.ts";
import { eventsBetween } from "../../../controller/reconcile/deployment/events.ts";
import { pairing } from "../../../controller/reconcile/deployment/pairing.ts";
import { answerFor, shareOf } from "../../../controller/reconcile/deployment/planning.ts";
import { statusFor } from "../../../controller/reconcile/deployment/status.ts";
import { groupName } from "../../../controller/reconcile/deployment/wish.ts";
import type {
  Answer,
  DeploymentWorld,
  GroupView,
  OwnerStatus,
} from "../../../controller/reconcile/deployment/world.ts";
import { invalid } from "../../../proto/fault.ts";
import { fullDeployment } from "../api/objects.ts";
import { modelSpec, NINE_HEADS } from "../plan/models.ts";
import { group, LOADING, NOW, planSpec, SERVING, storedPlan, wishOf, world } from "./deployment-views.ts";

const QUESTION = wishOf().question.hash;
const NAME = wishOf().planName;
const kinds = (seen: DeploymentWorld) => decideDeployment(seen).actions.map(({ kind }) => kind);
const conditionOf = (status: OwnerStatus, type: string) => status.conditions?.find((one) => one.type === type);

describe("questions and names", () => {
  test("W1: they are what they have always been; a change here plans every deployment anew", () => {
    expect(wishOf().question.hash).toBe("c4c472faef51be9b432842d9802cc2fa");
    expect(wishOf(fullDeployment().spec).question.hash).toBe("431d194b3ab9018d1fe9fceeb0d79b10");
    expect([wishOf().planName, groupName("chat", wishOf().planName, 7)]).toEqual(["chat-b514b47018", "chat-b514b-7"]);
  });

  test("W2: each field of the plan asks another question, the others do not", () => {
    const full = fullDeployment().spec;
    const { autoscale: _, ...fixed } = full;
    const base = wishOf(fixed);
    const asks: Record<string, unknown>[] = [
      { model: { ...full.model, revision: "v2" } },
      { format: { container: "gguf", quantisation: "Q8_0" } },
      { parallelism: { tp: 8, ep: 8 } },
      { slo: { ...full.slo, contextTokens: 1024 } },
      { slo: { ...full.slo, concurrency: 33 } },
      { kvCache: { fraction: 0.5 } },
      { gpu: { ...full.gpu, product: "H100" } },
      { gpu: { ...full.gpu, nodeSelector: {} } },
      { gpu: { ...full.gpu, tolerations: [] } },
      { gpu: { ...full.gpu, topology: { nodes: 2, within: "nvlink" } } },
    ];
    const others: Record<string, unknown>[] = [
      { replicas: 7 },
      { autoscale: { min: 0, max: 9, targets: { queue: 1 } } },
      { slo: { ...full.slo, ttftMs: 1, itlMs: 1 } },
      { rollout: { kind: "surge", drainTimeout: "1s" } },
      { priority: 0 },
    ];
    for (const change of asks)
      expect(wishOf({ ...fixed, ...change }).question.hash, JSON.stringify(change)).not.toBe(base.question.hash);
    for (const change of others)
      expect(wishOf({ ...fixed, ...change }).planName, JSON.stringify(change)).toBe(base.planName);
    for (const change of [{ podPatch: { labels: { a: "b" } } }, { speculation: { draftPool: "others" } }]) {
      const pods = { tolerations: full.podPatch.tolerations };
      const wish = wishOf({
        ...fixed,
        ...change,
        ...("podPatch" in change ? { podPatch: { ...change.podPatch, ...pods } } : {}),
      });
      expect(wish.question.hash).toBe(base.question.hash);
      expect(wish.planName).not.toBe(base.planName);
    }
    expect(wishOf(fixed, { "muster.dev/replan": "1" }).question.hash).not.toBe(base.question.hash);
  });

  test("names of the longest owner leave room for pods of a host name", () => {
    const owner = "a".repeat(40);
    expect(groupName(owner, `${owner}-0123456789`, 999_999).length + "-99-15".length).toBeLessThanOrEqual(63);
  });
});

// ---- the enumerated domain ----

const fault = invalid("spec.model.source", "there is no such model");
const ANSWERS: readonly (Answer | undefined)[] = [
  undefined,
  { kind: "running", sinceMs: NOW },
  { kind: "feasible", spec: planSpec(), isShort: false },
  { kind: "feasible", spec: { ...planSpec(), model: { ...planSpec().model, planOnly: "FP8" } }, isShort: false },
  { kind: "infeasible", reasons: [{ code: "memory_short", text: "it does not fit." }], remedy: "ranks 8 fits" },
  { kind: "refused", fault },
  { kind: "failed", detail: "no route", againMs: NOW + 5_000 },
];
const OLD = "chat-0ld0000000";
const PLANS = [
  [],
  [storedPlan(NAME, QUESTION)],
  [storedPlan(OLD, "0".repeat(32))],
  [storedPlan("chat-5ame000000", QUESTION)],
];
const GROUPS: readonly (readonly GroupView[])[] = [
  [],
  [group({ ordinal: 0, plan: NAME, status: SERVING })],
  [group({ ordinal: 0, plan: NAME, status: LOADING })],
  [group({ ordinal: 0, plan: OLD, status: SERVING }), group({ ordinal: 1, plan: NAME, status: LOADING })],
  [
    group({ ordinal: 0, plan: NAME, status: SERVING }),
    group({ ordinal: 1, plan: NAME, status: { phase: "Degraded", restarts: 2 } }),
  ],
];

function* worlds(): Generator<DeploymentWorld> {
  for (const answer of ANSWERS)
    for (const plans of PLANS)
      for (const groups of GROUPS)
        for (const replicas of [0, 1, 2])
          for (const nextOrdinal of [undefined, 5]) {
            const base = world({}, { replicas });
            const status = nextOrdinal === undefined ? {} : { nextOrdinal };
            yield { ...base, answer, plans, groups, owner: { ...base.owner, status } };
          }
}

describe("every small world", () => {
  test("has a whole status that the API takes, one cause, and is decided the same again", () => {
    let count = 0;
    for (const seen of worlds()) {
      const { status, wakeMs } = decideDeployment(seen);
      expect(modelDeploymentStatus.safeParse(status).error).toBeUndefined();
      expect(status.observedGeneration).toBe(3);
      expect(status.phase).toBeDefined();
      expect(status.cause?.message).not.toBe("");
      expect(wakeMs).toBeGreaterThan(NOW);
      expect(decideDeployment(seen)).toEqual(decideDeployment(seen));
      const later = decideDeployment({ ...seen, nowMs: NOW + 60_000, owner: { ...seen.owner, status } });
      expect(statusFor("ModelDeployment", later.status)).toEqual(statusFor("ModelDeployment", status));
      count += 1;
    }
    expect(count).toBe(ANSWERS.length * PLANS.length * GROUPS.length * 6);
  });

  test("E1: a plan is stored only where there is none of that name, and asked for only where the question has none", () => {
    for (const seen of worlds()) {
      const { actions, ask } = decideDeployment(seen);
      const stores = actions.filter(({ kind }) => kind === "store-plan");
      const isStored = seen.plans.some(({ name }) => name === NAME);
      const isAnswered = seen.plans.some(({ question }) => question === QUESTION);
      if (isStored) expect(stores).toEqual([]);
      if (isAnswered) expect(ask).not.toBe("first");
      if (isAnswered && !isStored) expect(stores).toHaveLength(1);
      if (!isAnswered) expect(ask === "first" || stores.length === 1).toBe(true);
    }
  });

  test("no group is made without its stored plan, none of an ordinal that was used", () => {
    let made = 0;
    for (const seen of worlds()) {
      const used = Math.max(seen.owner.status.nextOrdinal ?? 0, ...seen.groups.map(({ spec }) => spec.ordinal + 1));
      for (const action of decideDeployment(seen).actions) {
        if (action.kind !== "apply-group") continue;
        made += 1;
        expect(seen.plans.some(({ name }) => name === action.spec.plan)).toBe(true);
        expect(action.spec.ordinal).toBeGreaterThanOrEqual(used);
      }
    }
    expect(made).toBeGreaterThan(50);
  });

  test("while groups serve Serving is True, whatever the new wish comes to", () => {
    for (const seen of worlds()) {
      const { status } = decideDeployment(seen);
      const count = seen.groups.filter(({ status: { phase } }) => phase === "Serving").length;
      expect(conditionOf(status, "Serving")?.status).toBe(count > 0 ? "True" : "False");
    }
  });
});

describe("what changes nothing", () => {
  const running = { plans: [storedPlan(NAME, QUESTION)], groups: [group({ ordinal: 0, plan: NAME, status: SERVING })] };

  test("E2: a refused spec is said with its field; the rest of the status stands", () => {
    const before = decideDeployment(world(running)).status;
    const seen = world(running);
    const owner = {
      ...seen.owner,
      status: before,
      wish: { kind: "refused" as const, fault: invalid("spec.replicas", "write at least 0") },
    };
    const { actions, status } = decideDeployment({ ...seen, owner });
    expect(actions).toEqual([]);
    expect(status).toMatchObject({
      phase: "Infeasible",
      cause: { message: "spec.replicas: write at least 0" },
      plan: before.plan,
      readyReplicas: 1,
    });
  });

  test("E2: an object that cannot be read stops everything, by name", () => {
    const { actions, status } = decideDeployment(world({ unreadable: ["ReplicaGroup chat-1: spec.plan"] }));
    expect(actions).toEqual([]);
    expect(status.cause).toMatchObject({ code: "unreadable" });
    expect(status.cause?.message).toContain("ReplicaGroup chat-1: spec.plan");
  });

  test("one that is being deleted", () => {
    const seen = world(running);
    expect(decideDeployment({ ...seen, owner: { ...seen.owner, isLeaving: true } })).toMatchObject({
      actions: [],
      status: {},
    });
  });

  test("another image: the stored plan keeps its own", () => {
    expect(kinds(world({ ...running, image: "worker@sha256:another" }))).toEqual([]);
  });
});

describe("what is said", () => {
  test("an infeasible wish has its typed reason and the remedy; an invalid source its field", () => {
    const answer = (kind: string) => ANSWERS.find((one) => one?.kind === kind);
    expect(decideDeployment(world({ answer: answer("infeasible") })).status).toMatchObject({
      phase: "Infeasible",
      cause: { code: "memory-short", message: "it does not fit. What would do: ranks 8 fits." },
    });
    expect(decideDeployment(world({ answer: answer("refused") })).status.cause?.message).toBe(
      "spec.model.source: there is no such model",
    );
    const failed = decideDeployment(world({ answer: answer("failed") }));
    expect(failed.status).toMatchObject({ phase: "Scheduling", cause: { code: "source-unreadable" } });
    expect(failed.wakeMs).toBe(NOW + 5_000);
  });

  test("a cause keeps its age while it is the same", () => {
    const seen = world({ answer: { kind: "running", sinceMs: NOW } });
    const { status } = decideDeployment(seen);
    const later = decideDeployment({ ...seen, nowMs: NOW + 90_000, owner: { ...seen.owner, status } }).status;
    expect(later.cause?.since).toBe("2026-11-02T10:00:00Z");
  });

  test("fields without effect yet are said, and predictions that miss the wish", () => {
    const spec = { kvCache: { dtype: "fp8", offload: { hostMemory: "1Gi" } }, slo: { itlMs: 1, ttftMs: 1 } };
    const wish = wishOf(spec);
    const slow = { ...planSpec().prediction, itlMs: 30 };
    const plans = [{ ...storedPlan(wish.planName, wish.question.hash), spec: planSpec({ prediction: slow }) }];
    const { notices } = decideDeployment(world({ plans }, spec)).status;
    expect(notices?.map(({ field, kind }) => `${kind} ${field}`)).toEqual([
      "NotYet spec.kvCache.dtype",
      "NotYet spec.kvCache.offload",
      "Needed spec.slo.ttftMs",
      "Needed spec.slo.itlMs",
    ]);
  });

  test("loading has bytes and the nearest end; some of several serving says whom it waits for", () => {
    const loading = (ordinal: number, eta: string) =>
      group({
        ordinal,
        plan: NAME,
        status: {
          ...LOADING,
          cause: {
            code: "loading",
            message: "1 of 2 GB",
            since: "2026-11-02T09:59:00Z",
            bytesLoaded: 1,
            bytesTotal: 2,
            eta,
          },
        },
      });
    const plans = [storedPlan(NAME, QUESTION)];
    const both = [loading(0, "2026-11-02T10:03:20Z"), loading(1, "2026-11-02T10:09:00Z")];
    expect(decideDeployment(world({ plans, groups: both }, { replicas: 2 })).status).toMatchObject({
      phase: "Loading",
      cause: { bytesLoaded: 2, bytesTotal: 4, eta: "2026-11-02T10:03:20Z" },
      eta: "3m20s",
      ready: "0/8",
    });
    const one = [group({ ordinal: 0, plan: NAME, status: SERVING }), loading(1, "2026-11-02T10:09:00Z")];
    const { status } = decideDeployment(world({ plans, groups: one }, { replicas: 2 }));
    expect(status).toMatchObject({ phase: "Serving", cause: { code: "scaling" }, ready: "4/8" });
    expect(status.cause?.message).toContain(`${both[1]?.name}: 1 of 2 GB`);
    const broken = [one[0], { ...loading(1, ""), status: { ...LOADING, restarts: 1 } }].flatMap((each) => each ?? []);
    expect(decideDeployment(world({ plans, groups: broken }, { replicas: 2 })).status).toMatchObject({
      phase: "Degraded",
      cause: { code: "replica-lost" },
    });
  });

  test("a surge without room says how many GPUs it lacks, and for how long half of it would be gone", () => {
    const device = deviceOf("H200");
    if (device === undefined) throw new Error("no H200 in the table");
    const since = "2026-11-02T10:02:00Z";
    const served = {
      type: "Serving" as const,
      status: "True" as const,
      reason: "Serving",
      message: "",
      lastTransitionTime: since,
      observedGeneration: 1,
    };
    const old = [0, 1].map((ordinal) => group({ ordinal, plan: OLD, status: { ...SERVING, conditions: [served] } }));
    const plans = [storedPlan(NAME, QUESTION), storedPlan(OLD)];
    const { status, actions } = decideDeployment(
      world({ plans, groups: old, free: gpuInventory(device, 2) }, { replicas: 2 }),
    );
    expect(actions).toEqual([]);
    expect(status.notices?.map(({ message }) => message)).toEqual([
      "the new plan needs 2 more GPUs beside the old one; with rollout.kind: inPlace it runs at 50% capacity for about 6m0s",
    ]);
  });
});

describe("pairs", () => {
  const view = { name: "drafts", vocabulary: "0000000000000007", vocabularies: [], ready: 1 };
  test("equal vocabularies alone", () => {
    expect(pairing("drafts", view, "0000000000000007")).toMatchObject({
      speculation: { active: true },
      isAllowed: true,
      notices: [],
    });
    expect(pairing("drafts", { ...view, ready: 0 }, "0000000000000007")).toMatchObject({
      speculation: { active: false },
      notices: [],
    });
    expect(pairing("drafts", view, "0000000000000008")).toMatchObject({
      isAllowed: false,
      notices: [{ kind: "Refused" }],
    });
    expect(pairing("drafts", { ...view, vocabularies: ["0000000000000008"] }, "0000000000000008")).toMatchObject({
      isAllowed: false,
    });
    expect(pairing("drafts", undefined, "0000000000000007")).toMatchObject({
      speculation: { active: false },
      isAllowed: true,
      notices: [{ kind: "Needed" }],
    });
    expect(pairing("drafts", view, undefined)).toMatchObject({ speculation: { active: false }, isAllowed: true });
  });
});

test("events: each change once, none for none", () => {
  const [first, second] = [decideDeployment(world()).status, decideDeployment(world({ answer: ANSWERS[4] })).status];
  expect(eventsBetween({}, first).map(({ reason }) => reason)).toEqual(["Scheduling"]);
  expect(eventsBetween(first, first)).toEqual([]);
  expect(eventsBetween(first, second)).toMatchObject([{ type: "Warning", reason: "Infeasible" }]);
});

test("columns", () => {
  expect(planColumn({ world: 16, tp: 16, dp: 1, ep: 16, etp: 1, pp: 1 }, 2)).toBe("tp16·ep16·2x");
  expect(planColumn({ world: 4, tp: 2, dp: 2, ep: 1, etp: 4, pp: 1 }, 1)).toBe("tp2·dp2·1x");
  expect([0.04, 9.96, 99.9, 1234, 123_456].map(throughputColumn)).toEqual(["0.0", "10.0", "100", "1.2k", "123k"]);
  expect([0, 61_000, 200_000, 3_660_000].map(spanText)).toEqual(["5s", "1m5s", "3m20s", "1h1m"]);
});

describe("grounds for a plan", () => {
  const model = { ...modelSpec(NINE_HEADS), digest: "ab".repeat(32) };
  const device = deviceOf("H200");
  const inventory = (count: number, perNode = 8) =>
    device === undefined ? { nodes: [] } : gpuInventory(device, count, perNode);
  const ask = (spec: Record<string, unknown>, free: number, all: number) =>
    answerFor(model, {
      question: wishOf(spec).question,
      grounds: { free: inventory(free), all: inventory(all) },
      calibration: undefined,
    });

  test("each replica is given its part of what is free; where that is too little, more; held GPUs are only hoped for", () => {
    const three = { gpu: { count: 3 } };
    expect(ask({ ...three, replicas: 1 }, 3, 3)).toMatchObject({ kind: "feasible", isShort: false });
    expect(ask({ ...three, replicas: 2 }, 6, 6)).toMatchObject({ kind: "feasible", isShort: false });
    expect(ask({ ...three, replicas: 2 }, 3, 6)).toMatchObject({ kind: "feasible", isShort: true });
    expect(ask({ ...three, replicas: 1 }, 2, 3)).toMatchObject({ kind: "feasible", isShort: true });
    expect(ask({ replicas: 3 }, 8, 8)).toMatchObject({ kind: "feasible", spec: { cut: { world: 1 } } });
  });

  test("nothing to run on, a format that is not there", () => {
    expect(ask({}, 0, 0)).toMatchObject({ kind: "infeasible", reasons: [{ code: "no-nodes" }] });
    expect(ask({ format: { container: "gguf" } }, 8, 8)).toMatchObject({
      kind: "refused",
      fault: { field: "spec.format.container" },
    });
  });

  test("a part never has more than its share, and loses no device to rounding of nodes", () => {
    for (const count of [1, 2, 7, 8, 9, 16, 23])
      for (const replicas of [1, 2, 3, 5]) {
        const part = deviceCount(shareOf(inventory(count), replicas));
        expect(part).toBe(Math.floor(count / replicas));
      }
  });
});

// Which rank holds up a step, and how long a group may stand still in each phase before it serves.
import { expect, describe as suite, test } from "vitest";
import { cpuInventory } from "../../../controller/plan/hardware.ts";
import { FAILED_NODES_MAX, type StepsSeen, type WorkerSeen } from "../../../controller/reconcile/cluster.ts";
import { decide } from "../../../controller/reconcile/decide.ts";
import { defaultLimits } from "../../../controller/reconcile/limits.ts";
import { Phase } from "../../../controller/reconcile/status.ts";
import type { Decision, World } from "../../../controller/reconcile/world.ts";
import { WorkerPhase } from "../../../proto/gen/muster/v1/worker.ts";
import { describe, exited, GROUP, recordOf, running, seen, serveGoal } from "./groups.ts";

const NOW = 1_000_000;
const limits = defaultLimits;
const SERVING = { phase: WorkerPhase.SERVING, bytesLoaded: 100n, numericsId: "n" };

const at = (worker: WorkerSeen): WorkerSeen => ({ ...worker, node: `gpu-${worker.name.worker}` });
const serving = (worker: number) => at(running(worker, SERVING));
const silent = (worker: number) =>
  at(seen(worker, { kind: "silent", sinceMs: NOW - 100, detail: "deadline", last: describe(worker, SERVING) }));

function steps(changes: Partial<StepsSeen> = {}): StepsSeen {
  const standing = { sinceMs: NOW - limits.stepMs, saidMs: NOW - 500 };
  return { epochs: [7n, 7n, 7n], isPending: true, isHeard: true, ...standing, ...changes };
}

function worldOf(workers: readonly WorkerSeen[], said: StepsSeen | undefined, changes: Partial<World> = {}): World {
  return {
    nowMs: NOW,
    goal: serveGoal(workers.length),
    inventory: cpuInventory(workers.length),
    seen: { group: GROUP, record: recordOf(), workers, steps: said },
    last: undefined,
    trouble: undefined,
    ...changes,
  };
}

const recordIn = (decision: Decision) => decision.actions.find((action) => action.kind === "record")?.record;
const endedBy = (workers: readonly WorkerSeen[], said: StepsSeen) =>
  recordIn(decide(worldOf(workers, said), limits))?.failures.at(-1)?.detail;

const ALL = [serving(0), serving(1), serving(2)];

suite("a rank that holds up a step", () => {
  test("the lowest epoch is named, with its node, its step and how long; the incarnation ends and its node is remembered", () => {
    const decision = decide(worldOf(ALL, steps({ epochs: [8n, 7n, 8n] })), limits);
    const record = recordIn(decision);
    expect(record?.failures.at(-1)?.detail).toBe("rank 1 on node gpu-1 has not finished step 8 for 2.5 s");
    expect(record).toMatchObject({ incarnation: 4n, begun: false, failedNodes: { "gpu-1": 1 } });
    expect(decision.status.cause).toContain("rank 1 on node gpu-1 has not finished step 8");
    expect(decision.actions.filter(({ kind }) => kind === "stop-worker")).toHaveLength(3);
  });

  test("where several are lowest, the one whose worker does not answer is named", () => {
    expect(endedBy([serving(0), serving(1), silent(2)], steps())).toContain("rank 2 on node gpu-2");
    // Silence of one that is ahead explains nothing.
    expect(endedBy([silent(0), serving(1), serving(2)], steps({ epochs: [8n, 7n, 8n] }))).toContain("rank 1 on");
  });

  test("a leader that has fallen silent while work was pending is named itself, whatever it said of the others last", () => {
    const quiet = { saidMs: NOW - limits.stepMs };
    expect(endedBy([silent(0), serving(1), serving(2)], steps({ ...quiet, epochs: [8n, 7n, 8n] }))).toContain(
      "rank 0 on",
    );
    expect(endedBy([silent(0), serving(1), serving(2)], steps({ isHeard: false }))).toContain("rank 0 on node gpu-0");
    // It answers: only its stream is away, and what it said is old.
    expect(endedBy(ALL, steps({ ...quiet, epochs: [8n, 7n, 8n] }))).toBeUndefined();
  });

  test("nobody is named before the bound, without pending work, or for a long step of all", () => {
    const behind = { epochs: [8n, 7n, 8n] };
    expect(endedBy(ALL, steps({ ...behind, sinceMs: NOW - limits.stepMs + 1 }))).toBeUndefined();
    expect(endedBy(ALL, steps({ ...behind, isPending: false }))).toBeUndefined();
    expect(endedBy(ALL, steps({ sinceMs: NOW - 60_000 }))).toBeUndefined();
    expect(
      endedBy([silent(0), silent(1), serving(2)], steps({ isPending: false, saidMs: NOW - 60_000 })),
    ).toBeUndefined();
  });

  test("it is looked at again when the bound is over", () => {
    const { wakeMs } = decide(worldOf(ALL, steps({ sinceMs: NOW - 1_000 })), limits);
    expect(wakeMs).toBe(NOW - 1_000 + limits.stepMs);
  });

  test("the bound leaves room for an answer that does not come and for writing it down, within 5 s", () => {
    const [reportMs, describeMs] = [1_000, 1_000];
    expect(reportMs + limits.stepMs + describeMs).toBeLessThan(5_000);
  });
});

suite("nodes that failed a group", () => {
  test("are counted once for each incarnation, and at most so many are remembered: those that failed most", () => {
    const failedNodes = Object.fromEntries(
      Array.from({ length: FAILED_NODES_MAX }, (_, index) => [`old-${index}`, index === 0 ? 1 : 2]),
    );
    const world = worldOf([exited(0, 1, null), serving(1)], undefined);
    const blamed = ["gpu-0", "gpu-0"];
    const ended = recordIn(decide({ ...world, seen: { ...world.seen, blamed } }, limits));
    expect(ended?.failedNodes).toEqual({ "gpu-0": 1 });
    const full = { ...world.seen, blamed: ["old-1"], record: recordOf({ failedNodes }) };
    const kept = recordIn(decide({ ...world, seen: full }, limits))?.failedNodes ?? {};
    expect(Object.keys(kept)).toHaveLength(FAILED_NODES_MAX);
    expect(kept["old-1"]).toBe(3);
  });

  test("stay remembered over a new plan and after serving for long", () => {
    const record = recordOf({ failedNodes: { "gpu-9": 2 } });
    const world = worldOf([serving(0), serving(1)], undefined, { goal: serveGoal(2, "r2") });
    const next = recordIn(decide({ ...world, seen: { ...world.seen, record } }, limits));
    expect(next).toMatchObject({ revision: "r2", failedNodes: { "gpu-9": 2 } });
  });
});

suite("standing still before serving", () => {
  const cases = [
    ["pulling", { phase: WorkerPhase.PULLING }, limits.stall.pullMs],
    ["loading", { phase: WorkerPhase.LOADING, bytesLoaded: 10n }, limits.stall.loadMs],
    ["connecting", { phase: WorkerPhase.CONNECTING, bytesLoaded: 100n }, limits.stall.connectMs],
    ["warming", { phase: WorkerPhase.WARMING, bytesLoaded: 100n }, limits.stall.warmMs],
  ] as const;

  test.each(cases)("%s has its own bound", (_, changes, boundMs) => {
    const workers = [running(0, changes), running(1, changes)];
    const first = decide(worldOf(workers, undefined), limits);
    const later = (nowMs: number) => decide(worldOf(workers, undefined, { nowMs, last: first.status }), limits);
    expect(recordIn(later(NOW + boundMs - 1))).toBeUndefined();
    expect(recordIn(later(NOW + boundMs))?.failures.at(-1)?.detail).toContain("nothing has moved for");
  });

  test("bytes begin the bound anew", () => {
    const loading = (bytesLoaded: bigint) =>
      [0, 1].map((worker) => running(worker, { phase: WorkerPhase.LOADING, bytesLoaded }));
    const first = decide(worldOf(loading(10n), undefined), limits);
    const nowMs = NOW + limits.stall.loadMs - 1;
    const second = decide(worldOf(loading(11n), undefined, { nowMs, last: first.status }), limits);
    expect(second.status).toMatchObject({ phase: Phase.LOADING, progressMs: nowMs });
    const third = worldOf(loading(11n), undefined, { nowMs: NOW + limits.stall.loadMs + 1, last: second.status });
    expect(recordIn(decide(third, limits))).toBeUndefined();
  });

  test("a load says when it is expected to end", () => {
    const loading = (bytesLoaded: bigint) =>
      [0, 1].map((worker) => running(worker, { phase: WorkerPhase.LOADING, bytesLoaded }));
    const first = decide(worldOf(loading(0n), undefined), limits);
    const half = worldOf(loading(50n), undefined, { nowMs: NOW + 10_000, last: first.status });
    expect(decide(half, limits).status.etaMs).toBe(NOW + 20_000);
  });
});

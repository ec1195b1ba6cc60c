import { expect, describe as suite, test } from "vitest";
import { cpuInventory } from "../../../controller/plan/hardware.ts";
import type { Action, WorkerSeen } from "../../../controller/reconcile/cluster.ts";
import { freshRecord } from "../../../controller/reconcile/cluster.ts";
import { backoffMs, decide, hasGivenUp } from "../../../controller/reconcile/decide.ts";
import { defaultLimits } from "../../../controller/reconcile/limits.ts";
import { type GroupStatus, Phase } from "../../../controller/reconcile/status.ts";
import type { Decision, World } from "../../../controller/reconcile/world.ts";
import { Fault_Kind, WorkerPhase } from "../../../proto/gen/muster/v1/worker.ts";
import { describe, exited, GROUP, recordOf, running, seen, serveGoal } from "./groups.ts";

const NOW = 1_000_000;
const limits = defaultLimits;

function worldOf(workers: readonly WorkerSeen[], changes: Partial<World> = {}): World {
  return {
    nowMs: NOW,
    goal: serveGoal(2),
    inventory: cpuInventory(2),
    seen: { group: GROUP, record: recordOf(), workers },
    last: undefined,
    trouble: undefined,
    ...changes,
  };
}

const kinds = (decision: Decision): string[] =>
  decision.actions.map((action) => (action.kind === "record" ? "record" : `${action.kind} ${action.name.worker}`));

const recordIn = (decision: Decision) => decision.actions.find((action) => action.kind === "record")?.record;

/** Every state that one worker of the record's incarnation can be seen in. */
const STATES: Record<string, (worker: number) => WorkerSeen | undefined> = {
  missing: () => undefined,
  "exit-0": (worker) => exited(worker, 0, null),
  killed: (worker) => exited(worker, null, "SIGKILL"),
  starting: (worker) => seen(worker, { kind: "silent", sinceMs: NOW - 100, detail: "refused", last: undefined }),
  "never-spoke": (worker) =>
    seen(worker, { kind: "silent", sinceMs: NOW - limits.startMs, detail: "refused", last: undefined }),
  "quiet-serving": (worker) =>
    seen(worker, {
      kind: "silent",
      sinceMs: NOW - 100,
      detail: "deadline",
      last: describe(worker, { phase: WorkerPhase.SERVING, numericsId: "n" }),
    }),
  lost: (worker) =>
    seen(worker, {
      kind: "silent",
      sinceMs: NOW - limits.silentMs,
      detail: "deadline",
      last: describe(worker, { phase: WorkerPhase.SERVING, numericsId: "n" }),
    }),
  "idle-no-links": (worker) => running(worker, { commAddress: "" }),
  idle: (worker) => running(worker),
  loading: (worker) => running(worker, { phase: WorkerPhase.LOADING, bytesLoaded: 10n }),
  connecting: (worker) => running(worker, { phase: WorkerPhase.CONNECTING, bytesLoaded: 100n }),
  warming: (worker) => running(worker, { phase: WorkerPhase.WARMING, bytesLoaded: 100n }),
  serving: (worker) => running(worker, { phase: WorkerPhase.SERVING, bytesLoaded: 100n, numericsId: "n" }),
  draining: (worker) => running(worker, { phase: WorkerPhase.DRAINING }),
  failed: (worker) => running(worker, { phase: WorkerPhase.FAILED }),
  impostor: (worker) => {
    const worker0 = running(worker);
    const view = { kind: "described", description: describe(worker, { incarnation: 2n }) } as const;
    return { ...worker0, state: { kind: "running", view } };
  },
};

const DEAD = new Set(["exit-0", "killed", "never-spoke", "lost", "draining", "failed", "impostor"]);
const ALIVE = new Set(["serving", "quiet-serving"]);

type Case = { names: string[]; workers: WorkerSeen[]; stray: boolean };

function allCases(): Case[] {
  const names = Object.keys(STATES);
  const groups = [...names.map((name) => [name]), ...names.flatMap((one) => names.map((two) => [one, two]))];
  return groups.flatMap((group) =>
    [false, true].map((stray) => {
      const own = group.map((name, worker) => STATES[name]?.(worker)).filter((worker) => worker !== undefined);
      return { names: group, workers: stray ? [...own, running(0, {}, 2n)] : own, stray };
    }),
  );
}

const runs = (action: Action): boolean => action.kind === "start-worker";

suite("every state of one and two workers", () => {
  const cases = allCases();
  const decided = cases.map((one) => {
    const world = worldOf(one.workers, { goal: serveGoal(one.names.length) });
    return { ...one, world, decision: decide(world, limits) };
  });

  test(`the domain is whole: ${cases.length} worlds`, () => {
    expect(cases.length).toBe(2 * (16 + 16 * 16));
  });

  test("same world, same decision", () => {
    for (const { world, decision } of decided) expect(decide(world, limits)).toEqual(decision);
  });

  test("S2: the leader is named exactly where the whole incarnation serves", () => {
    for (const { names, decision } of decided) {
      expect(decision.status.leaderAddress !== "", names.join()).toBe(names.every((name) => ALIVE.has(name)));
    }
  });

  test("I2: nothing starts beside a worker of another incarnation, and that one is stopped", () => {
    for (const { names, stray, decision } of decided) {
      if (!stray) continue;
      expect(decision.actions.some(runs), names.join()).toBe(false);
      expect(
        decision.actions.some((action) => action.kind === "stop-worker" && action.name.incarnation === 2n),
        names.join(),
      ).toBe(true);
    }
  });

  test("I3: one dead worker ends the incarnation: the record moves on by one and every survivor is stopped", () => {
    for (const { names, workers, decision } of decided) {
      if (!names.some((name) => DEAD.has(name))) continue;
      expect(recordIn(decision), names.join()).toMatchObject({ incarnation: 4n, begun: false, restarts: 3 });
      expect(recordIn(decision)?.failures).toHaveLength(1);
      const alive = workers.filter((worker) => worker.state.kind === "running").length;
      expect(decision.actions.filter((action) => action.kind === "stop-worker")).toHaveLength(alive);
      expect(decision.actions.some((action) => action.kind === "load-worker" || runs(action))).toBe(false);
      expect(decision.status.incarnation, "of what the group is now").toBe(4n);
    }
  });

  test("I1: the record comes before anything else", () => {
    for (const { decision } of decided) {
      const at = decision.actions.findIndex((action) => action.kind === "record");
      const others = decision.actions.findIndex((action) => action.kind !== "record" && action.name.incarnation === 3n);
      if (at >= 0 && others >= 0) expect(at).toBeLessThan(others);
    }
  });

  test("Load is given only where every worker is there, answers and has its links open", () => {
    for (const { names, decision } of decided) {
      const loads = decision.actions.filter((action) => action.kind === "load-worker");
      if (loads.length === 0) continue;
      expect(
        names.every((name) => ["idle", "loading", "connecting"].includes(name)),
        names.join(),
      ).toBe(true);
      expect(loads.map((load) => load.name.worker)).toEqual(
        names.flatMap((name, worker) => (name === "idle" ? [worker] : [])),
      );
      for (const load of loads) {
        expect(load.request.commAddresses).toHaveLength(names.length);
        expect(load.request.incarnation).toBe(3n);
        expect(load.request.slices.length).toBeGreaterThan(0);
        expect(
          load.request.slices.every((slice) => slice.rank === load.name.worker),
          "one rank a worker",
        ).toBe(true);
      }
    }
  });

  test("one cause with one age, and always a later look", () => {
    for (const { names, decision } of decided) {
      expect(decision.status.cause, names.join()).not.toBe("");
      expect(decision.status.code, names.join()).not.toBe("");
      expect(decision.status.sinceMs).toBeLessThanOrEqual(NOW);
      expect(decision.wakeMs).toBeGreaterThan(NOW);
      expect(decision.wakeMs).toBeLessThanOrEqual(NOW + limits.heartbeatMs);
      const hasActed = decision.actions.length > 0;
      expect(decision.because.length > 0, `${names.join()}: each action has its reason`).toBe(hasActed);
    }
  });

  test("stop and infeasible goals stop whatever runs and start nothing", () => {
    for (const { workers } of cases) {
      for (const goal of [
        { kind: "stop", graceMs: 500 },
        { kind: "infeasible", detail: "too large" },
      ] as const) {
        const decision = decide(worldOf(workers, { goal }), limits);
        const alive = workers.filter((worker) => worker.state.kind === "running").length;
        expect(decision.actions.filter((action) => action.kind === "stop-worker")).toHaveLength(alive);
        expect(decision.actions.every((action) => action.kind === "stop-worker" || action.kind === "record")).toBe(
          true,
        );
        expect(decision.status.leaderAddress).toBe("");
        expect(decision.status.phase).toBe(goal.kind === "stop" ? Phase.STOPPED : Phase.INFEASIBLE);
      }
    }
  });
});

suite("the way up", () => {
  test("a group nobody has seen is recorded as begun, then started", () => {
    const world = worldOf([], { seen: { group: GROUP, record: freshRecord(), workers: [] } });
    const decision = decide(world, limits);
    expect(kinds(decision)).toEqual(["record", "start-worker 0", "start-worker 1"]);
    expect(recordIn(decision)).toMatchObject({ incarnation: 1n, begun: true, revision: "r1" });
  });

  test("too few nodes is said as such, and nothing starts", () => {
    const record = freshRecord();
    const decision = decide(
      worldOf([], { inventory: cpuInventory(1), seen: { group: GROUP, record, workers: [] } }),
      limits,
    );
    expect(decision.actions).toEqual([]);
    expect(decision.status).toMatchObject({ phase: Phase.CAPACITY_SHORT, cause: "1 of 2 nodes are there" });
  });

  test("a worker that was not started before the controller died is started by the next one", () => {
    expect(kinds(decide(worldOf([running(0)]), limits))).toEqual(["start-worker 1"]);
  });

  test("the group is as far as its slowest worker; bytes are summed", () => {
    const workers = [
      running(0, { phase: WorkerPhase.WARMING, bytesLoaded: 100n }),
      running(1, { phase: WorkerPhase.LOADING, bytesLoaded: 30n }),
    ];
    const { status } = decide(worldOf(workers), limits);
    expect(status).toMatchObject({ phase: Phase.LOADING, bytesLoaded: 130n, bytesTotal: 200n, readyRanks: 0 });
  });

  test("one worker that pulls is a group that pulls, with its bytes; nobody has lost anything by it", () => {
    const pulling = running(1, { phase: WorkerPhase.PULLING, bytesLoaded: 30n });
    for (const other of [running(0, { phase: WorkerPhase.LOADING, bytesLoaded: 10n }), running(0)]) {
      const { status, actions } = decide(worldOf([other, pulling]), limits);
      expect(status).toMatchObject({
        phase: Phase.PULLING,
        code: "pulling",
        cause: expect.stringContaining("are pulled"),
      });
      expect(actions.filter(({ kind }) => kind === "record" || kind === "stop-worker")).toEqual([]);
    }
  });

  test("a silent worker of a serving group degrades it without taking the leader away", () => {
    const workers = [STATES.serving?.(0), STATES["quiet-serving"]?.(1)].filter((worker) => worker !== undefined);
    const { status, actions } = decide(worldOf(workers), limits);
    expect(status).toMatchObject({ phase: Phase.DEGRADED, readyRanks: 1, leaderAddress: "127.0.0.1:6003" });
    expect(actions).toEqual([]);
  });

  test("workers of different numerics do not serve together", () => {
    const workers = ["a", "b"].map((numericsId, worker) => running(worker, { phase: WorkerPhase.SERVING, numericsId }));
    const decision = decide(worldOf(workers), limits);
    expect(recordIn(decision)?.failures[0]?.detail).toContain("do not compute alike: a and b");
  });

  test("a worker that has switched its experts a moment before the others is one with them", () => {
    const workers = ["a-x0123456789ab", "a"].map((numericsId, worker) =>
      running(worker, { phase: WorkerPhase.SERVING, numericsId }),
    );
    const { status, actions } = decide(worldOf(workers), limits);
    expect(status).toMatchObject({ phase: Phase.SERVING, numericsId: "a-x0123456789ab" });
    expect(actions).toEqual([]);
  });
});

suite("failures", () => {
  const many = (count: number, everyMs: number) =>
    Array.from({ length: count }, (_, index) => ({
      atMs: NOW - (count - index) * everyMs,
      detail: "x",
      isFinal: false,
    }));

  test("I4: the back-off doubles from 0.2 s to 10 s", () => {
    expect([0, 1, 2, 3, 6, 7, 50].map((count) => backoffMs(count, limits))).toEqual([
      0, 200, 400, 800, 6400, 10_000, 10_000,
    ]);
  });

  test("I4: nothing starts before the back-off is over, and the wake is its end", () => {
    const record = recordOf({ begun: false, failures: many(1, 10), notBeforeMs: NOW + 77 });
    const before = decide(worldOf([], { seen: { group: GROUP, record, workers: [] } }), limits);
    expect(before.actions).toEqual([]);
    expect(before.wakeMs).toBe(NOW + 77);
    const after = decide(worldOf([], { nowMs: NOW + 77, seen: { group: GROUP, record, workers: [] } }), limits);
    expect(kinds(after)).toEqual(["record", "start-worker 0", "start-worker 1"]);
  });

  test("I4: ten failures in five minutes stop the group with its last cause; a new plan starts it again", () => {
    const record = recordOf({ failures: many(9, 1000) });
    const decision = decide(
      worldOf([exited(0, 3, null), running(1)], {
        seen: { group: GROUP, record, workers: [exited(0, 3, null), running(1)] },
      }),
      limits,
    );
    expect(decision.status).toMatchObject({ phase: Phase.DEGRADED, code: "stopped-trying" });
    expect(decision.status.cause).toContain("worker 0 exited with code 3");
    const stopped = recordIn(decision) ?? recordOf();
    const later = worldOf([], { nowMs: NOW + 3_600_000, seen: { group: GROUP, record: stopped, workers: [] } });
    expect(decide(later, limits).actions, "also an hour later").toEqual([]);
    expect(kinds(decide({ ...later, goal: serveGoal(2, "r2") }, limits))).toEqual([
      "record",
      "start-worker 0",
      "start-worker 1",
    ]);
  });

  test("slow failures do not add up", () => {
    expect(hasGivenUp(many(10, 40_000), limits)).toBe(false);
    expect(hasGivenUp(many(10, 30_000), limits)).toBe(true);
  });

  test("what a person must change is not tried again", () => {
    const fault = {
      kind: Fault_Kind.INVALID,
      field: "model.safetensors",
      detail: "12 bytes short",
      code: "invalid_value",
    };
    const workers = [running(0, { phase: WorkerPhase.FAILED, fault }), running(1)];
    const { status } = decide(worldOf(workers), limits);
    expect(status).toMatchObject({ phase: Phase.DEGRADED, code: "stopped-trying" });
    expect(status.cause).toContain("trying again cannot help): worker 0 has failed: model.safetensors: 12 bytes short");
  });

  test("I5: standing still before serving ends the incarnation", () => {
    const workers = [running(0, { phase: WorkerPhase.LOADING }), running(1, { phase: WorkerPhase.CONNECTING })];
    const first = decide(worldOf(workers), limits);
    const later = worldOf(workers, { nowMs: NOW + limits.stall.loadMs, last: first.status });
    expect(recordIn(decide(later, limits))?.failures[0]?.detail).toContain("nothing has moved for 120.0 s");
  });

  test("serving long enough forgets failures", () => {
    const record = recordOf({ failures: many(3, 10) });
    const workers = [STATES.serving?.(0), STATES.serving?.(1)].filter((worker) => worker !== undefined);
    const group = { group: GROUP, record, workers };
    let last: GroupStatus | undefined;
    const at = (afterMs: number): Decision => {
      const decision = decide(worldOf(workers, { nowMs: NOW + afterMs, seen: group, last }), limits);
      last = decision.status;
      return decision;
    };
    expect(at(0).actions).toEqual([]);
    expect(at(limits.stableMs - 1)).toMatchObject({ actions: [], wakeMs: NOW + limits.stableMs });
    expect(recordIn(at(limits.stableMs))).toMatchObject({ incarnation: 3n, failures: [] });
  });
});

suite("changes from outside", () => {
  test("another plan lets the old workers drain under a new incarnation, without counting a failure", () => {
    const workers = [STATES.serving?.(0), STATES.serving?.(1)].filter((worker) => worker !== undefined);
    const decision = decide(worldOf(workers, { goal: serveGoal(2, "r2") }), limits);
    expect(recordIn(decision)).toMatchObject({
      incarnation: 4n,
      revision: "r2",
      begun: false,
      restarts: 2,
      failures: [],
    });
    expect(decision.actions.filter((action) => action.kind === "stop-worker")).toMatchObject([
      { graceMs: limits.drainMs },
      { graceMs: limits.drainMs },
    ]);
  });

  test("a record that was lost is set past what runs", () => {
    const group = { group: GROUP, record: freshRecord(), workers: [running(0, { phase: WorkerPhase.SERVING }, 7n)] };
    const decision = decide(worldOf([], { seen: group }), limits);
    expect(recordIn(decision)).toMatchObject({ incarnation: 8n, begun: false });
    expect(kinds(decision)).toEqual(["record", "stop-worker 0"]);
    expect(decision.status.leaderAddress).toBe("");
  });

  test("an action that fails is the cause as long as nothing serves", () => {
    const trouble = { sinceMs: NOW - 900, detail: "cannot start-worker 1: spawn ENOENT" };
    const { status } = decide(worldOf([running(0)], { trouble }), limits);
    expect(status).toMatchObject({ code: "action-failed", sinceMs: NOW - 900 });
    expect(status.cause).toContain("spawn ENOENT");
  });
});

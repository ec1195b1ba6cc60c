import { expect, describe as suite, test } from "vitest";
import type { Action } from "../../../controller/reconcile/cluster.ts";
import { defaultLimits } from "../../../controller/reconcile/limits.ts";
import { Reconciler } from "../../../controller/reconcile/run.ts";
import { type GroupStatus, Phase } from "../../../controller/reconcile/status.ts";
import type { Goal } from "../../../controller/reconcile/world.ts";
import { GROUP, serveGoal } from "./groups.ts";
import { type Faults, SimCluster } from "./simulator.ts";

const NO_FAULTS: Faults = {
  untilMs: 0,
  crash: 0,
  crashWithinMs: 30_000,
  silence: 0,
  applyFails: 0,
  observeFails: 0,
  controllerDies: 0,
  startComesLate: 0,
};
const FAULTS: Faults = {
  untilMs: 300_000,
  crash: 0.35,
  crashWithinMs: 30_000,
  silence: 0.2,
  applyFails: 0.05,
  observeFails: 0.05,
  controllerDies: 0.02,
  startComesLate: 0.03,
};
const END_MS = 900_000;

type Outcome = { sim: SimCluster; statuses: GroupStatus[]; last: GroupStatus | undefined; controllers: number };

/** Runs controllers, one after the other where they die, until the end of virtual time. */
async function simulate(
  seed: number,
  faults: Faults,
  steps: { workers?: number; goalAt?: { atMs: number; goal: Goal }; Cluster?: typeof SimCluster } = {},
): Promise<Outcome> {
  const { workers = 2, Cluster = SimCluster } = steps;
  const sim = new Cluster(seed, { workers, endMs: END_MS, faults });
  const end = new AbortController();
  sim.onEnd = () => end.abort();
  const statuses: GroupStatus[] = [];
  let goal: Goal = serveGoal(workers);
  let controllers = 0;
  let last: GroupStatus | undefined;
  while (!end.signal.aborted) {
    controllers += 1;
    const life = new AbortController();
    end.signal.addEventListener("abort", () => life.abort(), { once: true });
    sim.onControllerDeath = () => life.abort();
    const reconciler: Reconciler = new Reconciler(goal, {
      group: GROUP,
      cluster: sim,
      clock: sim,
      limits: defaultLimits,
      onStatus: (status) => {
        last = status;
        statuses.push(status);
        expect(status.restarts, "L3: no restart is told that is not recorded").toBeLessThanOrEqual(sim.record.restarts);
        if (status.leaderAddress !== "") sim.checkLeader(status.leaderAddress, status.incarnation);
        if (steps.goalAt !== undefined && sim.nowMs() >= steps.goalAt.atMs && goal !== steps.goalAt.goal) {
          goal = steps.goalAt.goal;
          reconciler.setGoal(goal);
        }
      },
    });
    await reconciler.run(life.signal);
  }
  return { sim, statuses, last, controllers };
}

suite("the simulator without faults", () => {
  test("a group comes up in the order of its phases, and every status differs from the one before", async () => {
    const { sim, statuses, last } = await simulate(1, NO_FAULTS);
    expect(sim.violations).toEqual([]);
    expect(last).toMatchObject({ phase: Phase.SERVING, readyRanks: 2, restarts: 0, incarnation: 1n });
    const phases = statuses.map((status) => status.phase).filter((phase, index, all) => phase !== all[index - 1]);
    const served = Number(sim.trace.findLast((line) => line.includes("serve"))?.split(" ")[0]);
    const seenAfterMs = Math.abs((last?.sinceMs ?? 0) - served);
    expect(seenAfterMs, "L4: seen when it happens, not at the next heartbeat").toBeLessThan(20);
    expect(phases).toEqual([Phase.SCHEDULING, Phase.LOADING, Phase.CONNECTING, Phase.WARMING, Phase.SERVING]);
  });

  test("a stop goal drains and ends everything, and the record is ready for another life", async () => {
    const goalAt = { atMs: 0, goal: { kind: "stop", graceMs: 5000 } as const };
    const { sim, last } = await simulate(2, NO_FAULTS, { goalAt });
    expect(sim.runningCount).toBe(0);
    expect(last).toMatchObject({ phase: Phase.STOPPED, code: "stopped", leaderAddress: "" });
    expect(sim.record).toMatchObject({ begun: false, failures: [] });
  });
});

suite("the simulator with faults", () => {
  const SEEDS = Array.from({ length: 150 }, (_, index) => index + 1);

  test("two incarnations never serve at once, back-off is kept, and every crash leads to serving or a stated stop", async () => {
    let restarts = 0;
    let stops = 0;
    for (const seed of SEEDS) {
      const { sim, last } = await simulate(seed, FAULTS, { workers: 1 + (seed % 4) });
      expect(sim.violations, `seed ${seed}`).toEqual([]);
      const isStopped = last?.code === "stopped-trying";
      expect(isStopped || (last?.phase === Phase.SERVING && sim.serving), `seed ${seed}: ${last?.cause}`).toBe(true);
      expect(sim.record.restarts, `seed ${seed}: a restart without a fault`).toBeLessThanOrEqual(sim.injected);
      restarts += sim.record.restarts;
      stops += isStopped ? 1 : 0;
    }
    // The schedule must bite, or the test shows nothing.
    expect(restarts).toBeGreaterThan(SEEDS.length);
    expect(stops).toBeLessThan(SEEDS.length / 2);
  });

  test("a model that always dies soon is given up after ten incarnations, with its cause", async () => {
    const { sim, last } = await simulate(7, { ...NO_FAULTS, untilMs: END_MS, crash: 1, crashWithinMs: 2_000 });
    expect(sim.violations).toEqual([]);
    expect(sim.record.restarts).toBe(defaultLimits.failuresMax);
    expect(sim.runningCount).toBe(0);
    expect(last).toMatchObject({ phase: Phase.DEGRADED, code: "stopped-trying", leaderAddress: "" });
    expect(last?.cause).toMatch(/10 failures in .* s\): worker \d was ended by SIGKILL/);
  });

  test("replays are equal", async () => {
    for (const seed of [3, 11, 42]) {
      const one = await simulate(seed, FAULTS);
      const two = await simulate(seed, FAULTS);
      expect(two.sim.trace).toEqual(one.sim.trace);
      expect(two.statuses).toEqual(one.statuses);
    }
  });
});

suite("L1: a world that cannot be read", () => {
  test("nothing is done, and what serves goes on serving", async () => {
    const { sim, statuses } = await simulate(5, { ...NO_FAULTS, untilMs: 600_000, observeFails: 0.93 });
    expect(sim.violations).toEqual([]);
    expect(sim.record.restarts).toBe(0);
    const marked = statuses.filter((status) => status.code === "unreadable");
    expect(marked.length).toBeGreaterThan(0);
    const firstServing = statuses.findIndex((status) => status.phase === Phase.SERVING);
    for (const status of statuses.slice(firstServing)) expect(status.leaderAddress).not.toBe("");
  });
});

/** Takes no record of a second incarnation for a minute after it was first asked for one. */
class Unwriting extends SimCluster {
  #sinceMs: number | undefined;

  override async apply(action: Action): Promise<void> {
    if (action.kind === "record" && action.record.restarts === 1) {
      this.#sinceMs ??= this.nowMs();
      if (this.nowMs() - this.#sinceMs < 60_000) throw new Error("the record is refused");
    }
    await super.apply(action);
  }
}

suite("L3: a record that cannot be written", () => {
  test("what follows from it is told when it is; the trouble is told after a while", async () => {
    const faults = { ...NO_FAULTS, untilMs: 60_000, crash: 1, crashWithinMs: 20_000 };
    const { sim, statuses, last } = await simulate(1, faults, { Cluster: Unwriting });
    expect(sim.violations).toEqual([]);
    const marked = statuses.filter((status) => status.code === "unwritten");
    expect(marked.length).toBeGreaterThan(0);
    for (const status of marked) expect(status).toMatchObject({ restarts: 0, incarnation: 1n });
    expect(marked[0]?.cause).toContain("the record is refused");
    expect(last).toMatchObject({ phase: Phase.SERVING });
    expect(last?.restarts).toBeGreaterThan(0);
  });
});

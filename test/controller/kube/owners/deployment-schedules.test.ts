// The shell under a person who edits, a network that fails and processes that die, from seeds.
import { describe, expect, test } from "vitest";
import { defaultStatusLimits } from "../../../../controller/kube/status/status-writer.ts";
import { calm, type FaultPlan, FaultyApi } from "../../../sim/faults.ts";
import { randomOf } from "../../../sim/random.ts";
import { CrashingApi } from "../crashing-api.ts";
import { Bed, converged, deployment, modelDeployments, never, shardPlans, statusOf } from "./deployment-bed.ts";

const faults = (random: () => number, untilMs: number): FaultPlan => ({
  ...calm,
  untilMs,
  latencyMs: [1, 1 + random() * 200],
  refuse: random() * 0.1,
  unreachable: random() * 0.1,
  loseReply: random() * 0.1,
  watchBreak: random() * 0.1,
  watchGone: random() * 0.05,
  watchDuplicate: random() * 0.1,
  watchDelayMs: [0, random() * 500],
});

const { burst: BURST, perSecond: PER_SECOND } = defaultStatusLimits.writes;
const SOURCES = ["builtin://one", "builtin://two"];
const happened = new Map<string, number>();

/** A person who edits, a controller that dies, a bad network; then calm. Answers the log of all changes. */
async function schedule(seed: number): Promise<{ bed: Bed; log: string }> {
  const bed = new Bed({ seed });
  const random = randomOf(seed * 7919);
  await bed.begin({ nodes: 1 + Math.floor(random() * 3) });
  const calmMs = bed.time.nowMs() + 60_000;
  const begin = () => {
    const api = new FaultyApi(bed.server, { time: bed.time, random, plan: faults(random, calmMs) });
    return { ...bed.run(api), api };
  };
  let running = begin();
  const spec = () => ({
    model: { source: SOURCES[Math.floor(random() * 2)] },
    replicas: Math.floor(random() * 3) + (random() < 0.9 ? 1 : 0),
    rollout: { kind: random() < 0.6 ? "surge" : "inPlace", drainTimeout: "20s" },
  });
  await bed.server.create(
    modelDeployments,
    deployment("chat", { ...spec(), replicas: 1 + Math.floor(random() * 2) }),
    never,
  );
  const edits = 2 + Math.floor(random() * 3);
  for (let edit = 0; edit < edits; edit++) {
    await bed.time.runFor(random() * 15_000);
    const dice = random();
    if (dice < 0.7) await bed.edit("chat", spec());
    else if (dice < 0.75) await bed.cordon("gpu-0", random() < 0.7);
    else if (dice < 0.8) bed.server.compact();
    else if (dice < 0.9) bed.server.dropWatches();
    else {
      running.stop.abort();
      for (const [fault, count] of running.api.happened) happened.set(fault, (happened.get(fault) ?? 0) + count);
      running = begin();
    }
  }
  // A surge that finds no room waits for ever, by design: the last word is one that can be had.
  await bed.edit("chat", { ...spec(), replicas: 1, rollout: { kind: "inPlace", drainTimeout: "20s" } });
  await bed.cordon("gpu-0", false);
  await bed.time.runUntil(Math.max(bed.time.nowMs(), calmMs));
  await converged(bed);
  await bed.time.runFor(45_000);
  for (const [fault, count] of running.api.happened) happened.set(fault, (happened.get(fault) ?? 0) + count);
  running.stop.abort();
  await bed.time.finish(running.done);
  return { bed, log: bed.log.join("\n") };
}

describe("schedules", () => {
  test("200 seeded schedules with faults converge; surge, plans, ordinals and drains hold at every change", async () => {
    for (let seed = 1; seed <= 200; seed++) {
      const { bed } = await schedule(seed);
      expect({ seed, broken: bed.broken }).toEqual({ seed, broken: [] });
      expect(bed.statusWrittenMs.length, `seed ${seed}: status writes`).toBeLessThan(150);
      expect(bed.isConverged("chat"), `seed ${seed}`).toBe(true);
    }
    for (const fault of ["refuse", "unreachable", "loseReply", "watchBreak", "watchGone", "watchDuplicate"]) {
      expect(happened.get(fault) ?? 0, `${fault} has happened`).toBeGreaterThan(20);
    }
  });

  test("the same seed makes the same changes at the same moments", async () => {
    for (const seed of [11, 12, 13]) expect((await schedule(seed)).log).toBe((await schedule(seed)).log);
  });
});

describe("crashes", () => {
  /** Two replicas, a rollout, then one replica: every kind of write occurs. */
  async function life(dieAfter: number) {
    const bed = new Bed({ seed: 21 });
    await bed.begin();
    let next: ReturnType<Bed["run"]> | undefined;
    const api = new CrashingApi(bed.server, dieAfter, () => {
      first.stop.abort();
      next = bed.run(bed.server);
    });
    const first = bed.run(api);
    await bed.server.create(modelDeployments, deployment("chat", { replicas: 2 }), never);
    await converged(bed);
    await bed.edit("chat", { model: { source: "builtin://two" } });
    await converged(bed);
    await bed.edit("chat", { replicas: 1 });
    await converged(bed);
    await bed.time.runFor(60_000);
    for (const running of [first, next]) running?.stop.abort();
    return { bed, api };
  }

  const timeless = (value: unknown) =>
    JSON.stringify(value, (key, field) => (/^(since|lastTransitionTime)$/.test(key) ? "" : field));

  function endOf(bed: Bed) {
    const plans = bed.server
      .objects(shardPlans)
      .map(({ metadata, spec }) => [metadata.name, metadata.annotations, spec]);
    const groups = bed.groups.map(({ metadata, spec }) => [metadata.name, spec]);
    return timeless([plans, groups, statusOf(bed)]);
  }

  test("after each single write: another takes over and comes to the same end", async () => {
    const whole = await life(Number.POSITIVE_INFINITY);
    expect(whole.bed.broken).toEqual([]);
    const end = endOf(whole.bed);
    const { writes } = whole.api;
    expect(new Set(writes)).toEqual(
      new Set([
        "create shardplans",
        "apply replicagroups",
        "json replicagroups",
        "delete replicagroups",
        "status modeldeployments",
      ]),
    );
    for (let point = 1; point <= writes.length; point++) {
      const { bed, api } = await life(point);
      expect({ point, hasFired: api.isDead, after: api.writes[point - 1] }).toEqual({
        point,
        hasFired: true,
        after: writes[point - 1],
      });
      expect({ point, broken: bed.broken }).toEqual({ point, broken: [] });
      expect(endOf(bed), `after write ${point}: ${writes[point - 1]}`).toBe(end);
    }
  });
});

describe("many", () => {
  test("a hundred owners at once: all serve, and their statuses are written within the budget", async () => {
    const bed = new Bed({ seed: 41 });
    await bed.begin({ nodes: 60 });
    const running = bed.run(bed.server);
    const names = Array.from({ length: 100 }, (_, index) => `m${index}`);
    for (const name of names) await bed.server.create(modelDeployments, deployment(name), never);
    for (const name of names) await converged(bed, name);
    running.stop.abort();
    await bed.time.finish(running.done);
    expect(bed.broken).toEqual([]);
    expect(running.failures).toEqual([]);
    const times = bed.statusWrittenMs;
    for (const sinceMs of times) {
      const within = times.filter((atMs) => atMs >= sinceMs && atMs < sinceMs + 1_000).length;
      expect(within).toBeLessThanOrEqual(BURST + PER_SECOND);
    }
    expect(times.length / names.length).toBeLessThan(8);
  });
});

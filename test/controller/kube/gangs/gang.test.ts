import { expect, describe as suite, test } from "vitest";
import { LABELS } from "../../../../controller/api/meta.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { Gangs } from "../../../../controller/kube/gangs/gang.ts";
import { GANG_GATE } from "../../../../controller/kube/gangs/gang-pods.ts";
import { gangLimits } from "../../../../controller/kube/gangs/reservations.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { Phase } from "../../../../controller/reconcile/status.ts";
import { calm, type FaultPlan } from "../../../sim/faults.ts";
import { Bed, WHOLE_MS } from "../groups/group-bed.ts";
import { node } from "../objects.ts";

const openOf = (bed: Bed, group: string) =>
  bed.podsOf(group).filter(({ spec }) => !JSON.stringify(spec).includes("muster.dev/gang"));

suite("two groups and too few GPUs", () => {
  test("one serves, the other says what it waits for and holds nothing, and follows when there is room", async () => {
    const bed = await Bed.create({ seed: 2, nodes: { n1: 1, n2: 1, n3: 1 }, groups: { a: 2, b: 2 } });
    bed.start();
    await bed.time.runTill(() => bed.isServing("a") || bed.isServing("b"), "one serves", 60_000);
    await bed.time.runFor(60_000);
    const [first, second] = bed.isServing("a") ? ["a", "b"] : ["b", "a"];
    expect(bed.podsOf(second)).toEqual([]);
    expect(bed.recordOf(second)).toMatchObject({ begun: false, restarts: 0, failures: [] });
    const causes = bed.history.filter(({ group }) => group === second).map(({ status }) => status);
    expect(causes.every(({ phase }) => phase === Phase.CAPACITY_SHORT)).toBe(true);
    expect(bed.told.get(second)?.cause).toMatch(/1 of 2 nodes are there|2 nodes with 1 free GPUs each are needed/);
    bed.setGoal(first, { kind: "stop", graceMs: 1_000 });
    await bed.time.runTill(() => bed.isServing(second), "the other serves", 60_000);
    expect(bed.expectNothingWrong()).toEqual([]);
  });

  test("G1: a GPU that others take between reservation and binding costs the incarnation, not the group", async () => {
    const bed = await Bed.create({ seed: 4, nodes: { n1: 1, n2: 1, n3: 1 }, groups: { a: 2 } });
    let isTaken = false;
    bed.server.onChange(({ after }) => {
      if (isTaken || after?.metadata.name !== "a-1-1" || openOf(bed, "a").length < 2) return;
      isTaken = true;
      bed.time.at(bed.time.nowMs(), () => void bed.takeGpu("theirs", "n2"));
    });
    bed.start();
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 60_000);
    expect(isTaken).toBe(true);
    expect(bed.recordOf("a")).toMatchObject({ incarnation: 2n, restarts: 1 });
    expect(bed.recordOf("a").failures[0]?.detail).toContain("went to other pods");
    expect(bed.sim.workers.map(({ node }) => node).toSorted()).toEqual(["n1", "n3"]);
    expect(bed.expectNothingWrong()).toEqual([]);
  });

  test("G2: a half that never becomes whole is given back after T, by whichever controller leads then", async () => {
    const bed = await Bed.create({ seed: 6, nodes: { n1: 1, n2: 1 }, groups: { a: 2 } });
    bed.sim.hold("a-1-1");
    bed.start();
    await bed.time.runTill(() => openOf(bed, "a").length === 2, "both gates are open", 10_000);
    const openedMs = bed.time.nowMs();
    await bed.time.runFor(WHOLE_MS / 2);
    await bed.end();
    bed.start();
    await bed.time.runTill(
      () => !bed.podsOf("a").some(({ metadata }) => metadata.name.startsWith("a-1-")),
      "it is gone",
      60_000,
    );
    expect(bed.time.nowMs() - openedMs).toBeGreaterThanOrEqual(WHOLE_MS);
    expect(bed.time.nowMs() - openedMs).toBeLessThan(WHOLE_MS + 8_000);
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 30_000);
    expect(bed.recordOf("a").failures[0]?.detail).toContain("1 of 2 pods are bound 20 s after the reservation");
    expect(bed.expectNothingWrong()).toEqual([]);
  });
});

suite("Q3: a patch without an answer", () => {
  const group = (name: string, incarnation: number, begun: boolean, version: string): KubeObject => ({
    apiVersion: "muster.dev/v1alpha1",
    kind: "ReplicaGroup",
    metadata: { name, namespace: "x", uid: `uid-${name}`, resourceVersion: version },
    spec: { owner: { kind: "ModelDeployment", name: "m" }, plan: "plan-2", ordinal: 0 },
    status: { record: { incarnation, revision: "r", begun, failures: [], restarts: 0 } },
  });
  const closed = (name: string, worker: number, version: string): KubeObject => ({
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name: `${name}-1-${worker}`,
      namespace: "x",
      uid: `uid-${name}-${worker}`,
      resourceVersion: version,
      labels: { [LABELS.group]: name, [LABELS.incarnation]: "1", [LABELS.worker]: String(worker) },
    },
    spec: {
      schedulingGates: [{ name: GANG_GATE }],
      containers: [{ name: "worker", resources: { limits: { "nvidia.com/gpu": 1 } } }],
    },
  });

  test("keeps its seats from everybody else until the pod is seen again", () => {
    const stores = { groups: new Store(), pods: new Store(), nodes: new Store(), slices: undefined };
    const wish = { devices: [1, 1], priority: 0, selection: {}, within: "any", port: 1 } as const;
    const gangs = new Gangs({
      stores,
      wishOf: () => ({ ...wish, podOf: () => closed("never", 0, "1"), besideOf: () => [] }),
    });
    stores.nodes.replace([node("n1", { gpus: 1 }), node("n2", { gpus: 1 })], "1");
    stores.groups.replace([group("a", 1, true, "2")], "2");
    const first = closed("a", 0, "3");
    stores.pods.replace([first, closed("a", 1, "4")], "4");
    const place = gangs.placeOf("x/a", 1n, 1_000);
    if (place.kind !== "reserved") throw new Error(place.text);
    gangs.opening(first, place.reservation);
    // The answer is lost, the incarnation ends, another group comes: for all we know a-1-0 is on its way to n1.
    stores.groups.put(group("a", 2, false, "5"));
    stores.groups.put(group("b", 1, true, "6"));
    expect(gangs.placeOf("x/b", 1n, 1_001).kind).toBe("waiting");
    stores.pods.put(closed("a", 0, "7"));
    expect(gangs.placeOf("x/b", 1n, 1_002).kind, "it was not opened after all").toBe("reserved");
  });
});

test("Q2: what was given back before it has begun is asked for anew, though nothing else changes", () => {
  const stores = { groups: new Store(), pods: new Store(), nodes: new Store(), slices: undefined };
  const wish = { devices: [1], priority: 0, selection: {}, within: "any", port: 1 } as const;
  const never = () => {
    throw new Error("nothing is created here");
  };
  const gangs = new Gangs({
    stores,
    limits: { ...gangLimits, wholeMs: 10_000 },
    wishOf: () => ({ ...wish, podOf: never, besideOf: () => [] }),
  });
  stores.nodes.replace([node("n1", { gpus: 1 })], "1");
  const metadata = { name: "a", namespace: "x", uid: "uid-a", resourceVersion: "2" };
  const spec = { owner: { kind: "ModelDeployment", name: "m" }, plan: "plan-1", ordinal: 0 };
  stores.groups.replace([{ apiVersion: "muster.dev/v1alpha1", kind: "ReplicaGroup", metadata, spec }], "2");
  stores.pods.replace([], "2");
  expect(gangs.ask("x/a", 1n, 1_000).place.kind).toBe("reserved");
  expect(gangs.ask("x/a", 1n, 11_000).place).toMatchObject({ kind: "released", code: "not-whole" });
  expect(gangs.ask("x/a", 1n, 11_001).place.kind).toBe("reserved");
});

suite("schedules", () => {
  const SEEDS = Array.from({ length: 300 }, (_, index) => index + 1);
  const FAULTS_MS = 45_000;

  const storm = (untilMs: number): FaultPlan => ({
    ...calm,
    untilMs,
    latencyMs: [1, 30],
    refuse: 0.06,
    unreachable: 0.04,
    loseReply: 0.04,
    pageGone: 0.05,
    watchBreak: 0.04,
    watchGone: 0.015,
    watchDuplicate: 0.03,
    watchStall: 0.004,
    watchDelayMs: [0, 200],
  });

  /** Controllers that die, pods that die and an API server that fails, until all of that ends. */
  async function run(seed: number): Promise<Bed> {
    const untilMs = Date.UTC(2026, 0, 1) + FAULTS_MS;
    const nodes: Record<string, number> = { n1: 1, n2: 1, n3: 1, ...(seed % 3 === 0 ? { n4: 1 } : {}) };
    const podFaults = { untilMs, crash: 0.2, vanish: 0.1, silence: 0.1, slowImage: 0.1, withinMs: 20_000 };
    const groups = { a: 2, b: 2 };
    const bed = await Bed.create({ seed, nodes, groups, faults: storm(untilMs), podFaults, slackMs: 75_000 });
    while (bed.time.nowMs() < untilMs) {
      const when = bed.random() < 0.5 ? "before" : "after";
      const life = bed.start(bed.random() < 0.7 ? { write: Math.floor(bed.random() * 12), when } : undefined);
      const endMs = bed.time.nowMs() + 30_000;
      await bed.time.runTill(() => life.stop.signal.aborted || bed.time.nowMs() >= endMs, "a life ends", 40_000);
      await bed.end();
      await bed.time.runFor(bed.random() * 3_000);
    }
    bed.start();
    return bed;
  }

  test("no GPU has two owners, no half outlives T, no leader outlives a rank, nothing starts twice; and all of it comes to serve", async () => {
    const sum = { restarts: 0, deaths: 0 };
    const happened = new Map<string, number>();
    for (const seed of SEEDS) {
      const bed = await run(seed);
      const isRoomForBoth = seed % 3 === 0;
      const isDone = () =>
        isRoomForBoth ? bed.isServing("a") && bed.isServing("b") : bed.isServing("a") || bed.isServing("b");
      await bed.time.runTill(isDone, `seed ${seed}: it serves`, 250_000);
      expect(bed.expectNothingWrong(), `seed ${seed}`).toEqual([]);
      const restarts = bed.groups.reduce((all, group) => all + bed.recordOf(group).restarts, 0);
      const faults = [...bed.api.happened.values(), ...bed.sim.happened.values()].reduce(
        (all, count) => all + count,
        0,
      );
      expect(restarts, `seed ${seed}: a restart without a fault`).toBeLessThanOrEqual(faults + bed.controllers - 1);
      sum.deaths += bed.controllers - 1;
      sum.restarts += restarts;
      for (const [fault, count] of [...bed.api.happened, ...bed.sim.happened])
        happened.set(fault, (happened.get(fault) ?? 0) + count);
    }
    // The schedules must bite, or they show nothing.
    expect(sum.deaths).toBeGreaterThan(SEEDS.length);
    expect(sum.restarts).toBeGreaterThan(SEEDS.length / 2);
    for (const fault of [
      "refuse",
      "unreachable",
      "loseReply",
      "watchBreak",
      "watchGone",
      "watchStall",
      "crash",
      "vanish",
    ])
      expect(happened.get(fault), fault).toBeGreaterThan(5);
  }, 120_000);

  test("replays are equal", async () => {
    for (const seed of [3, 8]) {
      const [one, two] = [await run(seed), await run(seed)];
      expect(two.digest).toBe(one.digest);
    }
  });
});

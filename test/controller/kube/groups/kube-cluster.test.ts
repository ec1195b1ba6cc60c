import { expect, describe as suite, test } from "vitest";
import { KubeError, type KubeObject } from "../../../../controller/kube/api/client.ts";
import { replicaGroups } from "../../../../controller/kube/api/resources.ts";
import { Phase } from "../../../../controller/reconcile/status.ts";
import { calm } from "../../../sim/faults.ts";
import type { CrashPoint } from "../mortal-api.ts";
import { Bed, type BedOptions, NS } from "./group-bed.ts";

const never = new AbortController().signal;
const TWO = { nodes: { n1: 1, n2: 1 }, groups: { a: 2 } };

async function serving(options: Partial<BedOptions> = {}): Promise<Bed> {
  const bed = await Bed.create({ seed: 1, ...TWO, ...options });
  bed.start();
  await bed.time.runTill(() => bed.isServing("a"), "a serves", 60_000);
  return bed;
}

const workerOf = (bed: Bed, index: number) => {
  const found = bed.sim.workers.find(({ description }) => description.worker === index);
  if (found === undefined) throw new Error(`worker ${index} does not run`);
  return found;
};

const namesOf = (pods: readonly KubeObject[]) => pods.map(({ metadata }) => metadata.name);

suite("KubeCluster under the reconciler", () => {
  test("P2, P3: a group of two comes to serve: record, then all pods, then all gates; each worker on its own node", async () => {
    const bed = await serving();
    const beside = ["apply services/a", "apply poddisruptionbudgets/a"];
    expect(bed.writes).toEqual([...beside, "record a", "create a-1-0", "create a-1-1", "open a-1-0", "open a-1-1"]);
    expect(bed.told.get("a")).toMatchObject({ phase: Phase.SERVING, readyRanks: 2, restarts: 0, incarnation: 1n });
    expect(bed.told.get("a")?.leaderAddress).toBe(`${workerOf(bed, 0).address}:7070`);
    expect(new Set(bed.sim.workers.map(({ node }) => node)).size).toBe(2);
    const phases = bed.history.map(({ status }) => status.phase);
    expect(phases.filter((phase, index) => phase !== phases[index - 1])).toEqual([
      Phase.SCHEDULING,
      Phase.PULLING,
      Phase.LOADING,
      Phase.CONNECTING,
      Phase.WARMING,
      Phase.SERVING,
    ]);
    expect(bed.expectNothingWrong()).toEqual([]);
  });

  test.for(["crash", "vanish"] as const)("a pod's %s ends its incarnation and the next one serves", async (how) => {
    const bed = await serving();
    bed.sim[how](workerOf(bed, 1));
    await bed.time.runTill(() => bed.isServing("a") && bed.recordOf("a").incarnation === 2n, "it serves again", 60_000);
    expect(bed.recordOf("a")).toMatchObject({ begun: true, restarts: 1, failures: [{ isFinal: false }] });
    // Whichever is seen first: the end itself, or the other rank that has lost its link.
    const detail = bed.recordOf("a").failures[0]?.detail;
    expect(detail).toMatch(/^worker (1 was ended by SIGKILL|1 is gone without a trace|0 has failed)/);
    await bed.time.runFor(10_000);
    expect(namesOf(bed.podsOf("a")), "P1: ended pods of the old incarnation are deleted as well").toEqual([
      "a-2-0",
      "a-2-1",
    ]);
    expect(bed.expectNothingWrong()).toEqual([]);
  });

  test("a stop goal leaves no pod behind and the record ready for another life", async () => {
    const bed = await serving();
    bed.setGoal("a", { kind: "stop", graceMs: 2_000 });
    await bed.time.runTill(() => bed.podsOf("a").length === 0, "all pods are gone", 30_000);
    await bed.time.runFor(6_000);
    expect(bed.recordOf("a")).toMatchObject({ incarnation: 2n, begun: false, failures: [], restarts: 0 });
    expect(bed.told.get("a")).toMatchObject({ phase: Phase.STOPPED, leaderAddress: "" });
  });

  test("a node that dies is left within a minute, though nobody there ends its pods", async () => {
    const bed = await serving({ nodes: { n1: 1, n2: 1, n3: 1 }, slackMs: 30_000 });
    const { node } = workerOf(bed, 0);
    await bed.sim.killNode(node);
    await bed.time.runTill(() => bed.isServing("a") && bed.recordOf("a").incarnation === 2n, "it serves again", 60_000);
    expect(bed.sim.workers.map((worker) => worker.node)).not.toContain(node);
    expect(bed.expectNothingWrong()).toEqual([]);
  });
});

suite("P1: a zombie", () => {
  test("that lives on a node nobody reaches is fenced off: the next incarnation serves beside it", async () => {
    const bed = await serving({ nodes: { n1: 1, n2: 1, n3: 1 }, slackMs: 30_000 });
    const zombie = workerOf(bed, 0);
    await bed.sim.killNode(zombie.node, { isZombie: true });
    await bed.time.runFor(30_000);
    expect(bed.recordOf("a").restarts, "who answers is not dead, whatever its node says").toBe(0);
    bed.sim.crash(workerOf(bed, 1));
    await bed.time.runTill(() => bed.isServing("a") && bed.recordOf("a").incarnation === 2n, "it serves again", 60_000);
    expect(bed.sim.workers).toContain(zombie);
    expect(bed.told.get("a")?.leaderAddress).not.toContain(zombie.address);
    expect(namesOf(bed.podsOf("a"))).toEqual(["a-2-0", "a-2-1"]);
    expect(bed.expectNothingWrong()).toEqual([]);
  });
});

suite("a controller that dies", () => {
  /** Every write of a bring-up, and of a restart after a crash. */
  const points = (count: number): CrashPoint[] =>
    Array.from({ length: count }, (_, write) => (["before", "after"] as const).map((when) => ({ write, when }))).flat();

  test("P4: at every write of a bring-up it is followed by one that brings the group to serve, and no worker starts twice", async () => {
    let costly = 0;
    for (const point of points(7)) {
      const bed = await Bed.create({ seed: 7, ...TWO });
      const life = bed.start(point);
      const title = `${point.when} write ${point.write}`;
      await bed.time.runTill(() => life.stop.signal.aborted, `the controller dies ${title}`, 60_000);
      await bed.time.finish(life.ended);
      await bed.time.runFor(1_500);
      bed.start();
      await bed.time.runTill(() => bed.isServing("a"), `a serves after a death ${title}`, 60_000);
      expect(bed.expectNothingWrong(), title).toEqual([]);
      const { restarts } = bed.recordOf("a");
      // Begun with no pod to show for it: nobody can know whether there were any, so its number is not used again.
      const isBare = (point.write === 2 && point.when === "after") || (point.write === 3 && point.when === "before");
      expect(restarts, title).toBe(isBare ? 1 : 0);
      costly += restarts;
    }
    expect(costly).toBe(2);
  });

  test("P4: at every write of a restart as well", async () => {
    let fired = 0;
    for (const point of points(8)) {
      const bed = await serving({ seed: 9 });
      await bed.end();
      const title = `${point.when} write ${point.write}`;
      const life = bed.start(point);
      bed.sim.crash(workerOf(bed, 0));
      const isDone = () => life.stop.signal.aborted || (bed.isServing("a") && bed.recordOf("a").incarnation > 1n);
      await bed.time.runTill(isDone, `the controller dies ${title}`, 60_000);
      fired += life.stop.signal.aborted ? 1 : 0;
      await bed.end();
      await bed.time.runFor(1_500);
      bed.start();
      await bed.time.runTill(() => bed.isServing("a"), `a serves after a death ${title}`, 60_000);
      expect(bed.expectNothingWrong(), title).toEqual([]);
      expect(bed.recordOf("a").restarts, title).toBeLessThanOrEqual(2);
    }
    expect(fired, "crash points must be reached").toBeGreaterThanOrEqual(14);
  });

  test("O1: a pod that ran and vanished while nobody led is not made again: its incarnation ends", async () => {
    const bed = await Bed.create({ seed: 7, ...TWO });
    const life = bed.start({ write: 5, when: "after" });
    await bed.time.runTill(() => life.stop.signal.aborted, "it dies with one gate open", 60_000);
    await bed.end();
    await bed.time.runTill(() => bed.sim.workers.length === 1, "that pod runs", 10_000);
    bed.sim.vanish(workerOf(bed, 0));
    await bed.time.runFor(1_000);
    expect(namesOf(bed.podsOf("a"))).toEqual(["a-1-1"]);
    bed.start();
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 60_000);
    expect(bed.recordOf("a")).toMatchObject({ incarnation: 2n, restarts: 1 });
    expect(bed.recordOf("a").failures[0]?.detail).toContain("its name is not used again");
    expect(bed.expectNothingWrong()).toEqual([]);
  });

  test("a group that serves notices nothing", async () => {
    const bed = await serving();
    const before = bed.recordOf("a");
    await bed.end();
    await bed.time.runFor(30_000);
    const { writes } = bed;
    writes.length = 0;
    bed.start();
    await bed.time.runFor(30_000);
    expect(writes).toEqual([]);
    expect(bed.recordOf("a")).toEqual(before);
    expect(bed.told.get("a")?.phase).toBe(Phase.SERVING);
  });
});

suite("P6: addresses that other pods have got since", () => {
  test("a pod that ended unseen is not mistaken for the stranger at its address", async () => {
    const bed = await Bed.create({ seed: 11, nodes: { n1: 1, n2: 1 }, groups: { a: 1, b: 1 } });
    bed.start();
    await bed.time.runTill(() => bed.isServing("a") && bed.isServing("b"), "both serve", 60_000);
    const cluster = bed.life?.clusters.get("a");
    const victim = bed.sim.workers.find(({ group }) => group === `${NS}/a`);
    const stranger = bed.sim.workers.find(({ group }) => group === `${NS}/b`);
    if (cluster === undefined || victim === undefined || stranger === undefined) throw new Error("both run");
    expect(stranger.description).toMatchObject({ incarnation: 1n, worker: 0 });
    bed.sim.impersonate(victim, stranger);
    const seen = await bed.time.finish(cluster.observe(`${NS}/a`, never));
    expect(seen.workers[0]?.state).toMatchObject({
      kind: "running",
      view: { kind: "silent", detail: expect.stringContaining("belongs to another pod now") },
    });
  });
});

suite("C4: the record", () => {
  test("is replaced only where the stored incarnation is the one that was seen", async () => {
    const bed = await serving();
    const cluster = bed.life?.clusters.get("a");
    const record = { ...bed.recordOf("a"), incarnation: 9n };
    const action = { kind: "record", group: `${NS}/a`, replaces: 8n, record } as const;
    await expect(cluster?.apply(action, never)).rejects.toThrow("record of serving/a: incarnation is 1, not 8");
    expect(bed.recordOf("a").incarnation).toBe(1n);
  });

  test("that was written though its answer was lost costs nothing", async () => {
    const bed = await Bed.create({ seed: 5, ...TWO, faults: { untilMs: Number.POSITIVE_INFINITY, loseReply: 1 } });
    bed.server.onChange(({ resource, before }) => {
      if (resource.plural !== "replicagroups" || before === undefined) return;
      bed.time.at(bed.time.nowMs(), () => {
        bed.api.plan = calm;
      });
    });
    bed.start();
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 60_000);
    expect(bed.api.happened.get("loseReply")).toBeGreaterThan(0);
    expect(bed.recordOf("a")).toMatchObject({ incarnation: 1n, restarts: 0 });
  });

  test("P2: no worker of another incarnation is started, nor one of what has not begun", async () => {
    const bed = await serving();
    const cluster = bed.life?.clusters.get("a");
    const name = { group: `${NS}/a`, incarnation: 2n, worker: 0 };
    const early = cluster?.apply({ kind: "start-worker", name }, never);
    await expect(early).rejects.toThrow("worker 0 of serving/a #2 is not started: the record is at 1");
    expect(namesOf(bed.podsOf("a"))).toEqual(["a-1-0", "a-1-1"]);
  });

  test("is refused where somebody has written meanwhile, and the next look sees what", async () => {
    const bed = await serving();
    const cluster = bed.life?.clusters.get("a");
    const [group] = bed.server.objects(replicaGroups);
    if (cluster === undefined || group === undefined) throw new Error("a is there");
    const { status } = group;
    const stored = { ...bed.recordOf("a"), incarnation: 2n, begun: false };
    const at = new Date(bed.time.nowMs()).toISOString();
    const record = { incarnation: 2, revision: "", begun: false, failures: [], notBefore: at, restarts: 5 };
    const write = bed.server.replaceStatus(replicaGroups, { ...group, status: { ...Object(status), record } }, never);
    const ours = cluster.apply({ kind: "record", group: `${NS}/a`, replaces: 1n, record: stored }, never);
    await write;
    await expect(ours).rejects.toMatchObject({ code: 409 });
    const seen = await bed.time.finish(cluster.observe(`${NS}/a`, never));
    expect(seen.record).toMatchObject({ incarnation: 2n, restarts: 5 });
  });
});

suite("what is said while a group is not further", () => {
  test("a quota without room is a cause, not a failure, and passes", async () => {
    let isFull = true;
    const bed = await Bed.create({
      seed: 3,
      ...TWO,
      admit: (object) => {
        const isLast = object.kind === "Pod" && object.metadata.name === "a-1-1";
        if (isFull && isLast) throw new KubeError(403, "Forbidden", 'pods "a-1-1" is forbidden: exceeded quota: gpus');
      },
    });
    bed.start();
    await bed.time.runFor(10_000);
    expect(bed.told.get("a")).toMatchObject({ phase: Phase.SCHEDULING, code: "pod-refused" });
    expect(bed.told.get("a")?.cause).toContain("exceeded quota: gpus");
    expect(bed.sim.workers, "P3: no gate opens before all pods are there").toEqual([]);
    isFull = false;
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 20_000);
    expect(bed.recordOf("a").restarts).toBe(0);
  });

  test("P2: pods that the server would not have begin no incarnation: it is said, holds no place, and passes", async () => {
    let isRefused = true;
    const bed = await Bed.create({
      seed: 3,
      nodes: { n1: 1 },
      groups: { a: 1, b: 1 },
      admit: (object) => {
        const isOurs = object.kind === "Pod" && object.metadata.name.startsWith("a-");
        if (isRefused && isOurs)
          throw new KubeError(403, "Forbidden", 'pods "a-1-0" is forbidden: exceeded quota: gpus');
      },
    });
    bed.start();
    await bed.time.runTill(() => bed.isServing("b"), "the other has the place", 60_000);
    await bed.time.runFor(600_000);
    expect(bed.recordOf("a")).toMatchObject({ begun: false, restarts: 0 });
    expect(bed.podsOf("a")).toEqual([]);
    await bed.addNode("n2", 1);
    await bed.time.runTill(() => bed.told.get("a")?.code === "pod-refused", "it is said", 60_000);
    expect(bed.told.get("a")?.cause).toContain("exceeded quota: gpus");
    isRefused = false;
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 60_000);
    expect(bed.recordOf("a").restarts).toBe(0);
  });

  test("a pod that the server will never have, though the first would do, ends in a stated stop", async () => {
    const bed = await Bed.create({
      seed: 3,
      ...TWO,
      admit: (object) => {
        const isSecond = object.kind === "Pod" && object.metadata.name.endsWith("-1");
        if (isSecond) throw new KubeError(422, "Invalid", "spec.containers[0].image: Required value");
      },
    });
    bed.start();
    await bed.time.runTill(() => bed.told.get("a")?.code === "stopped-trying", "it is given up", 300_000);
    expect(bed.told.get("a")?.cause).toContain("spec.containers[0].image: Required value");
    expect(bed.podsOf("a")).toEqual([]);
  });

  test("an image that takes its time is Pulling, and no failure", async () => {
    const podFaults = { untilMs: Number.POSITIVE_INFINITY, slowImage: 1 };
    const bed = await Bed.create({ seed: 5, ...TWO, podFaults });
    bed.start();
    await bed.time.runTill(() => bed.told.get("a")?.phase === Phase.PULLING, "it pulls", 10_000);
    expect(bed.told.get("a")).toMatchObject({ code: "creating" });
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 80_000);
    expect(bed.recordOf("a").restarts).toBe(0);
  });
});

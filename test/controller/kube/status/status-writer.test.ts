import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { replicaGroups } from "../../../../controller/kube/api/resources.ts";
import { isRecord } from "../../../../controller/kube/api/wire.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { StatusWriter } from "../../../../controller/kube/status/status-writer.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { calm, FaultyApi } from "../../../sim/faults.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { NS } from "../beds.ts";

const { signal } = new AbortController();

const groupOf = (name: string): KubeObject => ({
  apiVersion: "muster.dev/v1alpha1",
  kind: "ReplicaGroup",
  metadata: { name, namespace: NS },
  spec: {},
});

const phaseOf = (status: unknown): string => (isRecord(status) ? String(status.phase) : "");

function begin(limits = {}, plan = calm) {
  const time = new VirtualClock();
  const startMs = time.nowMs();
  const server = new SimApiServer(time);
  const api = new FaultyApi(server, { time, random: randomOf(1), plan });
  const store = new Store();
  const metrics = new KubeMetrics();
  const conflicts: string[] = [];
  const refused: string[] = [];
  const writes: string[] = [];
  server.onChange(({ before, after, object }) => {
    if (before === undefined || after === undefined) return;
    const status = isRecord(object.status) ? object.status : {};
    writes.push(`${object.metadata.name} ${status.phase} ${status.tokens} @${time.nowMs() - startMs}`);
  });
  const writer = new StatusWriter({
    api,
    resource: replicaGroups,
    clock: time,
    random: () => 1,
    headlineOf: phaseOf,
    onWritten: (object) => store.learn(object),
    onConflict: (key) => conflicts.push(key),
    onRefused: (key, error) => refused.push(`${key} ${error.code}`),
    limits,
    metrics,
  });
  void writer.run(signal);
  const make = async (name: string) => store.learn(await server.create(replicaGroups, groupOf(name), signal));
  const offer = (name: string, phase: string, tokens: number) => {
    const object = store.get(`${NS}/${name}`);
    if (object === undefined) throw new Error(`no ${name}`);
    writer.offer(object, { phase, tokens });
  };
  return { time, server, api, store, writer, metrics, conflicts, refused, writes, make, offer };
}

describe("status writer", () => {
  test("S1, S2: phases are written at once, numbers at most every 10 s, the newest only, and nothing twice", async () => {
    const { time, make, offer, writes } = begin();
    await make("g");
    for (let second = 0; second < 31; second += 1) {
      offer("g", second < 15 ? "Loading" : "Serving", second < 28 ? second : 27);
      await time.runFor(1_000);
    }
    await time.runFor(60_000);
    expect(writes).toEqual([
      "g Loading 0 @0",
      "g Loading 9 @10000",
      "g Serving 15 @15000",
      "g Serving 24 @25000",
      "g Serving 27 @35000",
    ]);
  });

  test("a status that has come back to what is there is not written", async () => {
    const { time, make, offer, writes } = begin();
    await make("g");
    offer("g", "Serving", 1);
    await time.runFor(1);
    offer("g", "Serving", 2);
    offer("g", "Serving", 1);
    await time.runFor(60_000);
    expect(writes).toHaveLength(1);
  });

  test("S4: the budget holds over all objects, and phases are not behind numbers in it", async () => {
    const { time, make, offer, writes } = begin({ writes: { perSecond: 20, burst: 20 } });
    const names = Array.from({ length: 200 }, (_, at) => `g${at}`);
    for (const name of names) await make(name);
    for (const name of names) offer(name, "Serving", 0);
    await time.runFor(30_000);
    expect(writes).toHaveLength(200);
    expect(writes.at(-1)).toBe("g199 Serving 0 @9000");
    for (const name of names) offer(name, "Serving", 1);
    await time.runFor(1_000);
    offer("g150", "Degraded", 1);
    const before = writes.length;
    await time.runFor(200);
    expect(writes[before]).toContain("g150 Degraded 1");
    expect(writes.length).toBeGreaterThan(before + 1);
    const inTime = writes.map((line) => Number(line.split("@")[1]));
    inTime.forEach((fromMs, at) => {
      expect(inTime.slice(at).filter((ms) => ms < fromMs + 1_000).length).toBeLessThanOrEqual(40);
    });
  });

  test("S3: what was decided on an old state is dropped and looked at again, nothing of another writer is lost", async () => {
    const { time, server, make, offer, writer, conflicts, metrics, store } = begin();
    await make("g");
    const old = store.get(`${NS}/g`);
    if (old === undefined) throw new Error("no g");
    const theirs = await server.replaceStatus(
      replicaGroups,
      { ...old, status: { phase: "Serving", by: "the next leader" } },
      signal,
    );
    writer.offer(old, { phase: "Failed", by: "the last leader" });
    await time.runFor(60_000);
    expect(conflicts).toEqual([`${NS}/g`]);
    expect(server.objects(replicaGroups)[0]?.status).toEqual(theirs.status);
    expect(metrics.total("muster_status_writes_total", { outcome: "conflict" })).toBe(1);
    store.learn(theirs);
    offer("g", "Degraded", 1);
    await time.runFor(1);
    expect(server.objects(replicaGroups)[0]?.status).toEqual({ phase: "Degraded", tokens: 1 });
  });

  test("an offer made while a write is on its way is not a conflict with it", async () => {
    const { time, make, offer, conflicts, writes } = begin({}, { ...calm, latencyMs: [500, 500] });
    await make("g");
    offer("g", "Loading", 0);
    await time.runFor(600);
    offer("g", "Serving", 1);
    await time.runFor(5_000);
    expect(conflicts).toEqual([]);
    expect(writes.map((line) => line.split(" @")[0])).toEqual(["g Loading 0", "g Serving 1"]);
  });

  test("an object that has gone is forgotten; one that the server refuses is told", async () => {
    const { time, server, make, offer, refused, metrics } = begin();
    await make("g");
    offer("g", "Serving", 1);
    await server.delete(replicaGroups, "g", NS, {}, signal);
    await time.runFor(60_000);
    expect(metrics.samples().find(({ name }) => name === "muster_status_pending")?.value).toBe(0);
    expect(refused).toEqual([]);
    const strict = new SimApiServer(time, { kinds: [] });
    const writer = new StatusWriter({
      api: strict,
      resource: replicaGroups,
      clock: time,
      random: () => 1,
      headlineOf: phaseOf,
      onWritten: () => {},
      onConflict: () => {},
      onRefused: (key, error) => refused.push(`${key} ${error.code}`),
    });
    void writer.run(signal);
    const object = { ...groupOf("h"), status: {} };
    writer.offer({ ...object, metadata: { ...object.metadata, resourceVersion: "1" } }, { phase: "x" });
    await time.runFor(1);
    expect(refused).toEqual([]);
  });

  test("under refusals and lost answers the last word is written in the end", async () => {
    await fc.assert(
      fc.asyncProperty(fc.integer(), async (seed) => {
        const plan = { ...calm, untilMs: Number.POSITIVE_INFINITY, refuse: 0.3, unreachable: 0.2, loseReply: 0.2 };
        const bed = begin({}, plan);
        const random = randomOf(seed);
        await bed.make("g");
        for (let count = 0; count < 30; count += 1) {
          // What a controller does: looks at the server's newest where it was told of a conflict.
          if (bed.conflicts.length > 0) {
            const [live] = bed.server.objects(replicaGroups);
            if (live !== undefined) bed.store.learn(live);
            bed.conflicts.length = 0;
          }
          bed.offer("g", count % 4 === 0 ? "Loading" : "Serving", count);
          await bed.time.runFor(Math.floor(random() * 5_000));
        }
        bed.api.plan = calm;
        for (let count = 0; count < 4; count += 1) {
          await bed.time.runFor(60_000);
          const [live] = bed.server.objects(replicaGroups);
          if (live !== undefined) bed.store.learn(live);
          bed.offer("g", "Serving", 99);
        }
        await bed.time.runFor(60_000);
        expect(bed.server.objects(replicaGroups)[0]?.status).toEqual({ phase: "Serving", tokens: 99 });
      }),
      { numRuns: 50, seed: 9 },
    );
  });
});

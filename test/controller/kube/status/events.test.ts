import { describe, expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { events } from "../../../../controller/kube/api/resources.ts";
import { isRecord } from "../../../../controller/kube/api/wire.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { EventRecorder, type Happening } from "../../../../controller/kube/status/events.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { calm, FaultyApi } from "../../../sim/faults.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { NS } from "../beds.ts";

const { signal } = new AbortController();

function begin(limits = {}, plan = calm) {
  const time = new VirtualClock();
  const server = new SimApiServer(time);
  const api = new FaultyApi(server, { time, random: () => 0.5, plan });
  const metrics = new KubeMetrics();
  const writesMs: number[] = [];
  const startMs = time.nowMs();
  server.onChange(() => writesMs.push(time.nowMs() - startMs));
  const recorder = new EventRecorder({
    api,
    clock: time,
    random: () => 1,
    controller: "muster.dev/controller",
    instance: "muster-0",
    limits,
    metrics,
  });
  void recorder.run(signal);
  return { time, server, api, recorder, metrics, writesMs };
}

const regarding: KubeObject = {
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "m", namespace: NS, uid: "u1", resourceVersion: "7" },
};

const happening = (note: string): Happening => ({ type: "Normal", reason: "Placed", action: "Place", note });
const notes = (server: SimApiServer) => server.objects(events).map(({ note }) => String(note));
const countOf = (event: KubeObject | undefined) => (isRecord(event?.series) ? event.series.count : 1);

describe("events", () => {
  test("one says what happened to what, in the server's shape", async () => {
    const { time, server, recorder } = begin();
    recorder.record(regarding, happening("placed on n1"));
    recorder.record({ ...regarding, metadata: { name: "node-1", uid: "u2" } }, happening("cordoned"));
    await time.runFor(1);
    const [onNode, onModel] = server.objects(events);
    expect(onModel).toMatchObject({
      metadata: { namespace: NS },
      eventTime: "2026-01-01T00:00:00.000000Z",
      reportingController: "muster.dev/controller",
      reportingInstance: "muster-0",
      regarding: { kind: "ModelDeployment", name: "m", namespace: NS, uid: "u1", resourceVersion: "7" },
      type: "Normal",
      reason: "Placed",
      action: "Place",
      note: "placed on n1",
    });
    expect(onModel?.metadata.name).toMatch(/^m\.[0-9a-f]+$/);
    expect(onNode?.metadata.namespace).toBe("default");
  });

  test("V1, V2: the same again is counted in one series, written at most once a minute, its last count too", async () => {
    const { time, server, recorder, writesMs, metrics } = begin();
    for (let second = 0; second < 150; second += 1) {
      recorder.record(regarding, happening("same"));
      await time.runFor(1_000);
    }
    expect(server.objects(events)).toHaveLength(1);
    expect(writesMs).toEqual([0, 60_000, 120_000]);
    await time.runFor(120_000);
    expect(countOf(server.objects(events)[0])).toBe(150);
    expect(writesMs.length).toBe(4);
    expect(metrics.total("muster_events_total", { outcome: "aggregated" })).toBe(149);
    // After the series another begins.
    await time.runFor(400_000);
    recorder.record(regarding, happening("same"));
    await time.runFor(1);
    expect(server.objects(events)).toHaveLength(2);
  });

  test("V3: one object that chatters leaves room for others; all together have a bound", async () => {
    const { time, server, recorder, metrics } = begin({ overall: { perSecond: 1, burst: 25 } });
    for (let count = 0; count < 50; count += 1) recorder.record(regarding, happening(`n${count}`));
    const other = { ...regarding, metadata: { ...regarding.metadata, name: "o", uid: "u3" } };
    for (let count = 0; count < 10; count += 1) recorder.record(other, happening(`o${count}`));
    await time.runFor(1_000);
    expect(notes(server).filter((note) => note.startsWith("n"))).toHaveLength(20);
    expect(notes(server).filter((note) => note.startsWith("o"))).toHaveLength(5);
    expect(metrics.total("muster_events_total", { outcome: "dropped" })).toBe(35);
  });

  test("V4: a server in trouble is tried again some times, a lost answer makes no second event, and nobody waits", async () => {
    const plan = { ...calm, untilMs: Number.POSITIVE_INFINITY, loseReply: 1 };
    const { time, server, api, recorder, metrics } = begin({}, plan);
    recorder.record(regarding, happening("once"));
    await time.runFor(700);
    api.plan = calm;
    await time.runFor(60_000);
    expect(notes(server)).toEqual(["once"]);
    expect(metrics.total("muster_events_total", { outcome: "sent" })).toBe(1);
    api.plan = { ...plan, loseReply: 0, unreachable: 1 };
    recorder.record(regarding, happening("lost"));
    await time.runFor(60_000);
    expect(metrics.total("muster_events_total", { outcome: "dropped" })).toBe(1);
    for (let count = 0; count < 2_000; count += 1) {
      const one = { ...regarding, metadata: { ...regarding.metadata, uid: `many-${count}` } };
      recorder.record(one, happening("x"));
    }
    expect(metrics.total("muster_events_total", { outcome: "dropped" })).toBeGreaterThan(1_000);
  });

  test("long notes are cut within the server's bound, on a whole character; long names too", async () => {
    const { time, server, recorder } = begin();
    const long = { ...regarding, metadata: { ...regarding.metadata, name: "m".repeat(253) } };
    recorder.record(long, happening("世".repeat(1_000)));
    await time.runFor(1);
    const [event] = server.objects(events);
    expect(Buffer.byteLength(String(event?.note))).toBeLessThanOrEqual(1024);
    expect(String(event?.note)).toMatch(/^世+…$/);
    expect(event?.metadata.name.length).toBeLessThanOrEqual(253);
  });
});

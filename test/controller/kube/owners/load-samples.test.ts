// What gateways and leaders say becomes the autoscaler's history; and the whole way from held requests to replicas, in virtual time.
import { expect, onTestFinished, test } from "vitest";
import { LoadSamples, SAMPLE_MS } from "../../../../controller/kube/owners/load-samples.ts";
import { ReportsBoard } from "../../../../controller/kube/workers/reports-board.ts";
import { HISTORY_MS, scaleLimits } from "../../../../controller/reconcile/autoscale.ts";
import { GroupReport, ModelDemand } from "../../../../proto/gen/muster/v1/report.ts";
import { WorkerPhase } from "../../../../proto/gen/muster/v1/worker.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { Bed, deployment, HOUR_MS, modelDeployments, NS, never, statusOf } from "./deployment-bed.ts";

const KEY = `${NS}/chat`;
const demand = (changes: Partial<ModelDemand>): ModelDemand =>
  ModelDemand.fromPartial({ namespace: NS, deployment: "chat", ...changes });

class Load {
  readonly time: VirtualClock;
  readonly board: ReportsBoard;
  readonly samples: LoadSamples;
  readonly stop = new AbortController();

  constructor(time = new VirtualClock()) {
    this.time = time;
    this.board = new ReportsBoard(() => time.nowMs());
    this.samples = new LoadSamples({ clock: time, board: this.board });
    void this.samples.run(this.stop.signal);
    onTestFinished(() => this.stop.abort());
  }

  serve(group: string, { waiting = 0, tokens = 0 } = {}): void {
    const stats = { waiting, tokensGenerated: BigInt(tokens) };
    const report = GroupReport.fromPartial({ phase: WorkerPhase.SERVING, stats });
    const owner = { kind: "ModelDeployment", name: "chat" };
    this.board.hear({ group: `${NS}/${group}`, incarnation: 1n, owner }, report);
  }

  get last() {
    return this.samples.of(KEY).at(-1);
  }
}

test("S1: while no gateway reports there is no sample, however the leaders serve", async () => {
  const load = new Load();
  load.serve("chat-0");
  expect(load.samples.of(KEY)).toEqual([]);
  await load.time.runFor(60_000);
  expect(load.samples.of(KEY)).toEqual([]);
});

test("gateways and leaders are added up; what waits at a leader's door is a queue, what is absent is not asked for", async () => {
  const load = new Load();
  const [one, other] = [load.samples.open(), load.samples.open()];
  load.samples.of(KEY);
  load.serve("chat-0", { waiting: 2, tokens: 0 });
  load.serve("chat-1", { tokens: 0 });
  one.hear([demand({ held: 1, running: 5, arrivals: 10n, ttftMs: 80 })]);
  one.hear([demand({ held: 1, running: 5, arrivals: 10n, ttftMs: 20, itlMs: 9 })]);
  other.hear([demand({ running: 4, arrivals: 3n, ttftMs: 30 })]);
  await load.time.runFor(2_000);
  load.serve("chat-0", { waiting: 2, tokens: 100 });
  load.serve("chat-1", { tokens: 60 });
  await load.time.runFor(SAMPLE_MS - 2_000);
  expect(load.last).toMatchObject({ serving: 2, queue: 3, running: 7, arrivals: 13, ttftMs: 80, itlMs: 9 });
  expect(load.last?.tokensPerSecond).toBe(80);
  other.hear([]);
  one.hear([demand({ running: 5, arrivals: 12n })]);
  load.serve("chat-0");
  await load.time.runFor(SAMPLE_MS);
  expect(load.last).toMatchObject({ queue: 0, running: 5, arrivals: 2, ttftMs: undefined, itlMs: undefined });
});

test("S3: a stream that is opened again counts from 0, and what it brought before is not lost or counted twice", async () => {
  const load = new Load();
  load.samples.of(KEY);
  const first = load.samples.open();
  first.hear([demand({ arrivals: 5n })]);
  await load.time.runFor(SAMPLE_MS);
  expect(load.last?.arrivals).toBe(5);
  first.close();
  const second = load.samples.open();
  second.hear([demand({ arrivals: 2n })]);
  await load.time.runFor(SAMPLE_MS);
  expect(load.last?.arrivals).toBe(2);
});

test("S2: history ends where it is of no use, and who is not asked about is forgotten", async () => {
  const load = new Load();
  load.samples.open();
  load.samples.of(KEY);
  await load.time.runFor(HISTORY_MS - SAMPLE_MS);
  load.samples.of(KEY);
  await load.time.runFor(HISTORY_MS / 2);
  const kept = load.samples.of(KEY);
  expect(load.time.nowMs() - (kept[0]?.atMs ?? 0)).toBeLessThanOrEqual(HISTORY_MS);
  expect(kept.length).toBeLessThanOrEqual(HISTORY_MS / SAMPLE_MS + 1);
  await load.time.runFor(HISTORY_MS + 2 * SAMPLE_MS);
  expect(load.samples.of(KEY)).toHaveLength(1);
});

test("S4: a request that is held where nothing serves is told at once, and once", () => {
  const load = new Load();
  const told: string[] = [];
  load.samples.subscribe((key) => told.push(key));
  const gateway = load.samples.open();
  gateway.hear([demand({ held: 1 })]);
  expect(told).toEqual([]); // nobody has asked about it yet: its first look shows it
  expect(load.last).toMatchObject({ queue: 1, serving: 0 });
  gateway.hear([]);
  load.samples.clear();
  const again = load.samples.open();
  load.samples.of(KEY);
  again.hear([demand({ held: 1 })]);
  again.hear([demand({ held: 2 })]);
  expect(told).toEqual([KEY]);
  expect(load.last).toMatchObject({ queue: 1 });
});

test("a deployment grows with its load, shrinks when it has gone, sleeps, and wakes with the first request", async () => {
  const bed = new Bed({ seed: 11 });
  const load = new Load(bed.time);
  await bed.begin({ nodes: 4 });
  const running = bed.run(bed.server, {
    loadOf: (kind, key) => (kind === "ModelDeployment" ? load.samples.of(key) : []),
    onWaiting: (wake) => load.samples.subscribe(wake),
  });
  onTestFinished(async () => {
    running.stop.abort();
    await bed.time.finish(running.done);
  });
  const autoscale = { min: 0, max: 4, targets: { queue: 4 } };
  await bed.server.create(modelDeployments, deployment("chat", { autoscale, slo: { concurrency: 8 } }), never);
  const gateway = load.samples.open();
  let asked = { running: 0, held: 0 };
  let arrivals = 0n;
  /** Gateways and leaders speak every second. */
  const talking = async () => {
    while (!load.stop.signal.aborted) {
      const serving = bed.groups.filter(({ status, spec }) => status?.phase === "Serving" && spec.state === "Serving");
      for (const { metadata } of serving) load.serve(metadata.name);
      const held = serving.length === 0 ? asked.running + asked.held : asked.held;
      const placed = serving.length === 0 ? 0 : asked.running;
      arrivals += BigInt(Math.ceil(asked.running / 8));
      gateway.hear(asked.running + asked.held === 0 ? [] : [demand({ held, running: placed, arrivals })]);
      await bed.time.sleep(load.stop.signal, bed.time.nowMs() + 1_000);
    }
  };
  void talking();
  const replicas = () => statusOf(bed).readyReplicas ?? 0;
  const till = (count: number) =>
    bed.time.runTill(
      () => replicas() === count && statusOf(bed).replicas === count,
      `${count} replicas serve`,
      HOUR_MS,
    );

  asked = { running: 4, held: 0 };
  await till(1);
  asked = { running: 20, held: 0 };
  await bed.time.runTill(() => replicas() >= 3, "it has grown", HOUR_MS);
  const grown = statusOf(bed).targetReplicas ?? 0;
  asked = { running: 2, held: 0 };
  await bed.time.runTill(() => (statusOf(bed).targetReplicas ?? 0) < grown, "it shrinks", HOUR_MS);
  await till(1);
  asked = { running: 0, held: 0 };
  const idleMs = bed.time.nowMs();
  await till(0);
  expect(bed.time.nowMs() - idleMs).toBeGreaterThanOrEqual(scaleLimits.idleMs);
  expect(statusOf(bed)).toMatchObject({ phase: "Stopped", cause: { code: "asleep" }, targetReplicas: 0 });

  await bed.time.runFor(60_000);
  const askedMs = bed.time.nowMs();
  asked = { running: 1, held: 0 };
  await bed.time.runTill(() => bed.groups.length === 1, "it wakes", HOUR_MS);
  expect(bed.time.nowMs() - askedMs).toBeLessThan(2_000);
  await till(1);
  // How many may be there the bed takes from `replicas`, which says nothing here.
  expect(bed.broken.filter((text) => /ordinal|rewritten|Error/.test(text))).toEqual([]);
});

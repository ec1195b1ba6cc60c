// What leaders report and what nodes say, in the hands of the groups' part, in virtual time: numbers in status, a rank that
// stands still, a node that nobody hears, and nodes that are avoided, also by the next controller.
import { beforeAll, expect, onTestFinished, test } from "vitest";
import { parseModelDeployment, parseReplicaGroup, parseShardPlan } from "../../../../controller/api/parse.ts";
import { fieldsOf } from "../../../../controller/kube/api/fields.ts";
import { modelDeployments, nodes, replicaGroups, shardPlans } from "../../../../controller/kube/api/resources.ts";
import { groupsPart } from "../../../../controller/kube/groups/groups-part.ts";
import { parseTemplate } from "../../../../controller/kube/groups/worker-template.ts";
import { LoadSamples } from "../../../../controller/kube/owners/load-samples.ts";
import { measuredPart } from "../../../../controller/kube/owners/plan-measured.ts";
import { runController } from "../../../../controller/kube/run-controller.ts";
import { ReportsBoard } from "../../../../controller/kube/workers/reports-board.ts";
import { readModel } from "../../../../controller/model/model.ts";
import { answerFor } from "../../../../controller/reconcile/deployment/planning.ts";
import type { ModelSpec } from "../../../../proto/gen/muster/v1/plan.ts";
import { GroupReport, ModelDemand } from "../../../../proto/gen/muster/v1/report.ts";
import { WorkerPhase } from "../../../../proto/gen/muster/v1/worker.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { SimPods } from "../../../sim/pods.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import type { SimWorker } from "../../../sim/workers.ts";
import { node } from "../objects.ts";

const NS = "serving";
const SOURCE = "builtin://nano-maverick";
const never = new AbortController().signal;
const SPEC = {
  model: { source: SOURCE },
  gpu: { count: 4, topology: { nodes: 2 } },
  parallelism: { tp: 4, ep: 2, etp: 2 },
  slo: { concurrency: 8 },
  rollout: { drainTimeout: "5s" },
};

let model: ModelSpec;
beforeAll(async () => {
  model = await readModel(SOURCE, { headersOnly: true });
});

class Bed {
  readonly time = new VirtualClock();
  readonly server = new SimApiServer(this.time);
  readonly random = randomOf(5);
  readonly sim = new SimPods({ server: this.server, time: this.time, random: this.random });
  /** When the group's status was written. */
  readonly writtenMs: number[] = [];
  /** What was heard: of the leader that leads. */
  board = new ReportsBoard(() => this.time.nowMs());
  loads = new LoadSamples({ clock: this.time, board: this.board });
  #identities = 0;

  static async begin(count = 4): Promise<Bed> {
    const bed = new Bed();
    for (let index = 0; index < count; index++) {
      const wanted = node(`gpu-${index}`, { gpus: 2 });
      const made = await bed.server.create(nodes, wanted, never);
      await bed.server.replaceStatus(nodes, { ...made, status: wanted.status }, never);
    }
    bed.server.onChange(({ resource }) => {
      if (resource.kind === "ReplicaGroup") bed.writtenMs.push(bed.time.nowMs());
    });
    const object = { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment", spec: SPEC };
    await bed.server.create(modelDeployments, { ...object, metadata: { name: "chat", namespace: NS } }, never);
    return bed;
  }

  run(): () => Promise<void> {
    const stop = new AbortController();
    this.#identities += 1;
    this.board = new ReportsBoard(() => this.time.nowMs());
    const { time: clock, random, board } = this;
    const loads = new LoadSamples({ clock, board });
    this.loads = loads;
    void loads.run(stop.signal);
    const part = groupsPart({
      clock,
      random,
      template: parseTemplate("drainSeconds: 5", "worker@sha256:0"),
      read: async () => model,
      linksOf: (onNews) => {
        this.sim.onNews = onNews;
        return this.sim;
      },
      reports: { board, address: "muster-leader:7441" },
    });
    const done = runController(
      {
        api: this.server,
        clock,
        random,
        planner: async (ask) => answerFor(model, ask),
        workerImage: "worker@sha256:0",
        identity: `controller-${this.#identities}`,
        lease: { namespace: NS, name: "muster-controller" },
        parts: [part, measuredPart({ board, loads, clock, random })],
      },
      stop.signal,
    );
    done.catch(() => {}); // ends are awaited
    const end = async () => {
      stop.abort();
      await this.time.finish(done);
    };
    onTestFinished(end);
    return end;
  }

  get group() {
    const parsed = parseReplicaGroup(this.server.objects(replicaGroups)[0]);
    if (parsed.kind === "refused") throw new Error(`${parsed.fault.field}: ${parsed.fault.detail}`);
    return { name: parsed.value.metadata.name, ...parsed.value.status };
  }

  async serves(incarnation: number): Promise<void> {
    const isSo = () => this.group.phase === "Serving" && this.group.incarnation === incarnation;
    await this.time.runTill(
      () => this.server.objects(replicaGroups).length > 0 && isSo(),
      `incarnation ${incarnation} serves`,
    );
  }

  worker(index: number): SimWorker {
    const found = this.sim.workers.find(
      ({ description }) =>
        description.worker === index && description.incarnation === BigInt(this.group.incarnation ?? 0),
    );
    if (found === undefined) throw new Error(`worker ${index} does not run`);
    return found;
  }

  /** The leader speaks: of all of its ranks, or nothing of its own. */
  say(step: bigint, { pending = true, tokens = 0, behind = [] as number[] } = {}): void {
    const report = GroupReport.fromPartial({
      phase: WorkerPhase.SERVING,
      pending,
      rankEpochs: [0, 1, 2, 3].map((rank) => (behind.includes(rank) ? step - 1n : step)),
      stats: { running: 1, tokensGenerated: BigInt(tokens) },
    });
    const owner = { kind: "ModelDeployment", name: "chat" };
    const incarnation = BigInt(this.group.incarnation ?? 0);
    this.board.hear({ group: `${NS}/${this.group.name}`, incarnation, owner }, report);
  }

  async ended(restarts: number): Promise<string> {
    await this.time.runTill(() => (this.group.restarts ?? 0) === restarts, `incarnation ${restarts} has ended`);
    return this.group.record?.failures.at(-1)?.detail ?? "";
  }
}

test("tokens per second and the step come into status at most every 10 s; a change of phase does not wait", async () => {
  const bed = await Bed.begin();
  bed.run();
  await bed.serves(1);
  await bed.time.runFor(30_000);
  const from = bed.writtenMs.length;
  const gateway = bed.loads.open();
  for (let second = 1; second <= 60; second++) {
    bed.say(BigInt(second), { tokens: second * 50 });
    const asked = { namespace: NS, deployment: "chat", running: 1, arrivals: BigInt(second) };
    gateway.hear([ModelDemand.fromPartial({ ...asked, ttftMs: second < 5 ? 9_000 : 80, itlMs: 20 + (second % 3) })]);
    await bed.time.runFor(1_000);
  }
  const written = bed.writtenMs.slice(from);
  expect(written.length).toBeGreaterThanOrEqual(4);
  expect(written.length).toBeLessThanOrEqual(7);
  for (const [index, atMs] of written.entries())
    if (index > 0) expect(atMs - (written[index - 1] ?? 0)).toBeGreaterThanOrEqual(10_000);
  expect(bed.group).toMatchObject({ tokensPerSecond: 50, throughput: "50", phase: "Serving" });
  expect(bed.group.step).toBeGreaterThan(40);
  const parsed = parseModelDeployment(bed.server.objects(modelDeployments)[0]);
  expect(parsed.kind === "ok" && parsed.value.status).toMatchObject({ tokensPerSecond: 50, throughput: "50" });
  const [plan] = bed.server.objects(shardPlans);
  const measured = {
    tokensPerSecond: 50,
    concurrency: 1,
    ttftMs: 80,
    itlMs: 22,
    latencyConcurrency: 1,
    at: expect.any(String),
  };
  expect(parseShardPlan(plan)).toMatchObject({ kind: "ok", value: { status: { measured } } });
  const crashedMs = bed.time.nowMs();
  bed.sim.crash(bed.worker(1));
  await bed.time.runTill(() => bed.group.phase !== "Serving", "the end is said");
  expect(bed.time.nowMs() - crashedMs).toBeLessThan(2_000);
  expect(bed.group).not.toHaveProperty("tokensPerSecond");
  expect(bed.group).not.toHaveProperty("step");
});

test("a follower that stands still is named within 5 s, its node is remembered, and a fenced incarnation serves", async () => {
  const bed = await Bed.begin();
  bed.run();
  await bed.serves(1);
  const victim = bed.worker(1);
  for (let step = 1n; step <= 3n; step++) {
    bed.say(step);
    await bed.time.runFor(1_000);
  }
  bed.sim.fallSilent(victim, 600_000);
  const stoppedMs = bed.time.nowMs();
  const talk = new AbortController();
  const repeat = async () => {
    for (; !talk.signal.aborted; await bed.time.sleep(talk.signal, bed.time.nowMs() + 1_000)) bed.say(3n);
  };
  const repeated = repeat();
  const detail = await bed.ended(1);
  expect(bed.time.nowMs() - stoppedMs).toBeLessThan(5_000);
  expect(detail).toMatch(new RegExp(`^rank 2 on node ${victim.node} has not finished step 4 for \\d\\.\\d s$`));
  expect(bed.group.record?.failedNodes).toEqual([{ node: victim.node, times: 1 }]);
  talk.abort();
  await repeated;
  await bed.serves(2);
  expect(bed.sim.violations).toEqual([]);
});

test("a leader that stands still is named by its silence while work was pending; without pending work it has its old bound", async () => {
  const bed = await Bed.begin();
  bed.run();
  await bed.serves(1);
  const first = bed.worker(0);
  bed.say(7n);
  bed.sim.fallSilent(first, 600_000);
  let stoppedMs = bed.time.nowMs();
  expect(await bed.ended(1)).toMatch(new RegExp(`^rank 0 on node ${first.node} has not finished step 8`));
  expect(bed.time.nowMs() - stoppedMs).toBeLessThan(5_000);
  await bed.serves(2);
  bed.say(3n, { pending: false });
  bed.sim.fallSilent(bed.worker(0), 600_000);
  stoppedMs = bed.time.nowMs();
  expect(await bed.ended(2)).toContain("worker 0 has not answered for");
  expect(bed.time.nowMs() - stoppedMs).toBeGreaterThan(10_000);
});

test("P7: a node that is not Ready, or a worker that is silent, is no death; both are one at once", async () => {
  const bed = await Bed.begin();
  bed.run();
  await bed.serves(1);
  const { node: name } = bed.worker(1);
  const turn = async (status: string) => {
    const object = bed.server.objects(nodes).find(({ metadata }) => metadata.name === name);
    if (object === undefined) throw new Error(`no node ${name}`);
    const conditions = [{ type: "Ready", status, message: "Kubelet stopped posting node status." }];
    await bed.server.replaceStatus(nodes, { ...object, status: { ...fieldsOf(object.status), conditions } }, never);
  };
  await turn("Unknown");
  await bed.time.runFor(60_000);
  expect(bed.group).toMatchObject({ incarnation: 1, restarts: 0, phase: "Serving" });
  await turn("True");
  bed.sim.fallSilent(bed.worker(1), 8_000);
  await bed.time.runFor(30_000);
  expect(bed.group).toMatchObject({ incarnation: 1, restarts: 0, phase: "Serving" });

  await bed.sim.killNode(name);
  const deadMs = bed.time.nowMs();
  const detail = await bed.ended(1);
  expect(bed.time.nowMs() - deadMs).toBeLessThan(4_000);
  expect(detail).toContain(`node ${name} does not report (Kubelet stopped posting node status.)`);
  await bed.serves(2);
  expect(bed.group.placement?.map((seat) => seat.node)).not.toContain(name);
});

test("a node that failed the group twice is avoided, also by a controller that takes over between", async () => {
  const bed = await Bed.begin(3);
  const end = bed.run();
  await bed.serves(1);
  const { node: bad } = bed.worker(1);
  const fail = async (restarts: number) => {
    const victim = bed.sim.workers.find((each) => each.node === bad);
    if (victim === undefined) throw new Error(`nothing runs on ${bad}`);
    bed.say(BigInt(restarts));
    bed.sim.fallSilent(victim, 600_000);
    await bed.ended(restarts);
    await bed.serves(restarts + 1);
  };
  await fail(1);
  expect(bed.group.placement?.map((seat) => seat.node)).toContain(bad);
  await end();
  bed.run();
  await bed.time.runFor(30_000);
  expect(bed.group).toMatchObject({ incarnation: 2, restarts: 1 });
  await fail(2);
  expect(bed.group.record?.failedNodes).toEqual([{ node: bad, times: 2 }]);
  expect(bed.group.placement?.map((seat) => seat.node)).not.toContain(bad);
});

// The whole controller over simulated nodes: from a ModelDeployment to workers that serve, through everything between. Workers
// are in memory; the plan is the real one of a model that comes with the checkout.
import { beforeAll, expect, onTestFinished, test } from "vitest";
import { LABELS } from "../../../../controller/api/meta.ts";
import { parseModelDeployment, parseReplicaGroup } from "../../../../controller/api/parse.ts";
import type { KubeApi, KubeObject } from "../../../../controller/kube/api/client.ts";
import { fieldsOf } from "../../../../controller/kube/api/fields.ts";
import { modelDeployments, nodes, pods, replicaGroups, shardPlans } from "../../../../controller/kube/api/resources.ts";
import { type GroupsOptions, groupsPart } from "../../../../controller/kube/groups/groups-part.ts";
import { parseTemplate } from "../../../../controller/kube/groups/worker-template.ts";
import { runController } from "../../../../controller/kube/run-controller.ts";
import { readModel } from "../../../../controller/model/model.ts";
import { answerFor } from "../../../../controller/reconcile/deployment/planning.ts";
import { FaultError, transient } from "../../../../proto/fault.ts";
import type { ModelSpec } from "../../../../proto/gen/muster/v1/plan.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { calm, FaultyApi } from "../../../sim/faults.ts";
import { SimPods } from "../../../sim/pods.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { node } from "../objects.ts";

const NS = "serving";
const SOURCE = "builtin://nano-maverick";
const IMAGE = "muster/worker@sha256:0";
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

type Controller = { stop: AbortController; done: Promise<void>; failures: string[] };

class Whole {
  readonly time = new VirtualClock();
  readonly server = new SimApiServer(this.time);
  readonly random = randomOf(7);
  readonly sim = new SimPods({ server: this.server, time: this.time, random: this.random });
  #identities = 0;

  static async begin(): Promise<Whole> {
    const bed = new Whole();
    for (const name of ["gpu-0", "gpu-1"]) {
      const wanted = node(name, { gpus: 2 });
      const made = await bed.server.create(nodes, wanted, never);
      await bed.server.replaceStatus(nodes, { ...made, status: wanted.status }, never);
    }
    const object = { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment", spec: SPEC };
    await bed.server.create(modelDeployments, { ...object, metadata: { name: "chat", namespace: NS } }, never);
    return bed;
  }

  run(options: Partial<GroupsOptions> = {}, api: KubeApi = this.server): Controller {
    const stop = new AbortController();
    const failures: string[] = [];
    const part = groupsPart({
      clock: this.time,
      random: this.random,
      template: parseTemplate("drainSeconds: 5", IMAGE),
      read: async () => model,
      linksOf: (onNews) => {
        this.sim.onNews = onNews;
        return this.sim;
      },
      onFailure: (group, detail) => failures.push(`${group}: ${detail}`),
      ...options,
    });
    this.#identities += 1;
    const done = runController(
      {
        api,
        clock: this.time,
        random: this.random,
        planner: async (ask) => answerFor(model, ask),
        workerImage: IMAGE,
        identity: `controller-${this.#identities}`,
        lease: { namespace: NS, name: "muster-controller" },
        onFailure: (key, error) => failures.push(`${key}: ${String(error)}`),
        parts: [part],
      },
      stop.signal,
    );
    done.catch(() => {}); // ends are awaited
    onTestFinished(async () => {
      stop.abort();
      await this.time.finish(done);
    });
    return { stop, done, failures };
  }

  async end({ stop, done }: Controller): Promise<void> {
    stop.abort();
    await this.time.finish(done);
  }

  get deployment() {
    const parsed = parseModelDeployment(this.server.objects(modelDeployments)[0]);
    if (parsed.kind === "refused") throw new Error(parsed.fault.detail);
    return parsed.value.status ?? {};
  }

  get groups() {
    return this.server.objects(replicaGroups).map((object) => {
      const parsed = parseReplicaGroup(object);
      if (parsed.kind === "refused") throw new Error(`${parsed.fault.field}: ${parsed.fault.detail}`);
      return parsed.value;
    });
  }

  get pods(): readonly KubeObject[] {
    return this.server.objects(pods);
  }

  async serves(incarnation = 1): Promise<void> {
    const isSo = () => {
      const [group] = this.groups;
      return this.deployment.phase === "Serving" && group?.status?.incarnation === incarnation;
    };
    await this.time.runTill(isSo, `incarnation ${incarnation} serves`);
  }
}

test("kubelets bring certificates where all of them can: one older one under GPUs, and the pods of the next group go without", async () => {
  const bed = await Whole.begin();
  const signer = "muster.dev/muster-system";
  const template = { ...parseTemplate("drainSeconds: 5", IMAGE), caConfigMap: "muster-ca", signer };
  const isAsked = () => bed.pods.map((pod) => JSON.stringify(pod.spec).includes(`"signerName":"${signer}"`));
  const kubeletsOf = async (...versions: string[]) => {
    for (const [index, kubeletVersion] of versions.entries()) {
      const found = await bed.server.get(nodes, `gpu-${index}`, undefined, never);
      if (found === undefined) throw new Error(`no node gpu-${index}`);
      const status = { ...fieldsOf(found.status), nodeInfo: { kubeletVersion } };
      await bed.server.replaceStatus(nodes, { ...found, status }, never);
    }
  };
  await kubeletsOf("v1.37.2", "v1.36.4");
  bed.run({ template });
  await bed.serves();
  expect(isAsked()).toEqual([false, false]);
  await kubeletsOf("v1.37.2", "v1.37.0");
  for (const { metadata } of bed.pods)
    await bed.server.delete(pods, metadata.name, NS, { gracePeriodSeconds: 0 }, never);
  await bed.serves(2);
  expect(isAsked()).toEqual([true, true]);
});

test("a ModelDeployment comes to Serving over pods of two nodes, and says where and how", async () => {
  const bed = await Whole.begin();
  const { failures } = bed.run();
  await bed.serves();
  expect(bed.deployment).toMatchObject({
    readyReplicas: 1,
    conditions: expect.arrayContaining([expect.objectContaining({ type: "Serving", status: "True" })]),
  });
  const [group] = bed.groups;
  expect(group?.status).toMatchObject({
    phase: "Serving",
    ready: "4/4",
    readyRanks: 4,
    restarts: 0,
    incarnation: 1,
    record: { begun: true, incarnation: 1 },
    conditions: expect.arrayContaining([expect.objectContaining({ type: "Serving", status: "True" })]),
  });
  const placement = group?.status?.placement ?? [];
  expect(placement.map(({ node: at }) => at).toSorted()).toEqual(["gpu-0", "gpu-1"]);
  expect(placement.map(({ firstRank, ranks }) => [firstRank, ranks])).toEqual([
    [0, 2],
    [2, 2],
  ]);
  const [leader] = bed.pods.filter(({ metadata }) => metadata.labels?.[LABELS.worker] === "0");
  expect(leader?.metadata.name).toBe(placement[0]?.pod);
  expect(group?.status?.leader).toBe(`${Object(leader?.status).podIP}:7440`);
  expect(group?.status?.endpoints).toEqual([{ worker: 0, address: group?.status?.leader }]);
  expect(Object(leader?.spec).containers[0].image).toBe(IMAGE);
  expect([...failures, ...bed.sim.violations]).toEqual([]);
});

test("at rest nothing of ours is written", async () => {
  const bed = await Whole.begin();
  bed.run();
  await bed.serves();
  await bed.time.runFor(60_000);
  const written: string[] = [];
  bed.server.onChange(({ resource, object }) => {
    if (resource.kind !== "Lease") written.push(`${resource.kind} ${object.metadata.name}`);
  });
  await bed.time.runFor(600_000);
  expect(written).toEqual([]);
});

test("with a server that fails, breaks off and loses answers, it comes to Serving all the same", async () => {
  const happened = new Set<string>();
  for (let seed = 1; seed <= 10; seed++) {
    const bed = await Whole.begin();
    const chances = { refuse: 0.1, unreachable: 0.05, loseReply: 0.1, watchBreak: 0.02 };
    const plan = { ...calm, ...chances, untilMs: bed.time.nowMs() + 120_000 };
    const api = new FaultyApi(bed.server, { time: bed.time, random: randomOf(seed), plan });
    const controller = bed.run({}, api);
    await bed.time.runFor(300_000);
    expect(bed.groups[0]?.status).toMatchObject({ phase: "Serving", ready: "4/4" });
    expect(bed.sim.violations).toEqual([]);
    await bed.end(controller);
    for (const fault of api.happened.keys()) happened.add(fault);
  }
  expect([...happened].toSorted()).toEqual(["loseReply", "refuse", "unreachable", "watchBreak"]);
});

test("a worker that dies ends its incarnation; the next serves, and is told of", async () => {
  const bed = await Whole.begin();
  bed.run();
  await bed.serves();
  const [victim] = bed.sim.workers;
  if (victim === undefined) throw new Error("no worker runs");
  bed.sim.crash(victim);
  await bed.serves(2);
  expect(bed.groups[0]?.status).toMatchObject({ restarts: 1, ready: "4/4", record: { begun: true } });
  expect(bed.sim.workers.map(({ description }) => description.incarnation)).toEqual([2n, 2n]);
  expect(bed.sim.violations).toEqual([]);
});

test("a controller that takes over changes nothing of what serves", async () => {
  const bed = await Whole.begin();
  const first = bed.run();
  await bed.serves();
  const before = bed.pods.map(({ metadata }) => metadata.uid);
  await bed.time.runFor(60_000);
  await bed.end(first);
  const written: string[] = [];
  bed.server.onChange(({ resource, object }) => {
    if (resource.kind !== "Lease") written.push(`${resource.kind} ${JSON.stringify(object.status)}`);
  });
  const slowly = async (): Promise<ModelSpec> => {
    await bed.time.sleep(never, bed.time.nowMs() + 5_000);
    return model;
  };
  const { failures } = bed.run({ read: slowly });
  await bed.time.runFor(120_000);
  expect(written).toEqual([]);
  expect(bed.pods.map(({ metadata }) => metadata.uid)).toEqual(before);
  expect(bed.groups[0]?.status).toMatchObject({ phase: "Serving", incarnation: 1, restarts: 0 });
  expect(failures).toEqual([]);
});

test("a source that cannot be read is said and tried again; one that became another model starts nothing", async () => {
  const bed = await Whole.begin();
  let answer: ModelSpec | undefined = { ...model, digest: "f".repeat(64) };
  const first = bed.run({
    read: async () => {
      if (answer === undefined) throw new FaultError(transient("down", "the disk does not answer"));
      return answer;
    },
  });
  const isSaid = (code: string) => () => bed.groups[0]?.status?.cause?.code === code;
  await bed.time.runTill(isSaid("model-changed"), "the other model is refused");
  expect(bed.groups[0]?.status).toMatchObject({ phase: "Infeasible" });
  answer = undefined;
  await bed.time.runTill(isSaid("source-unreadable"), "the failure is said");
  expect(bed.pods).toEqual([]);
  answer = model;
  await bed.serves();
  // Taken over while the source is away: what serves is left alone, its leader stays known.
  answer = undefined;
  await bed.end(first);
  bed.run({ read: () => Promise.reject(new Error("gone")) });
  await bed.time.runTill(() => bed.groups[0]?.status?.phase === "Degraded", "it says that it cannot look");
  expect(bed.groups[0]?.status?.leader).toBeDefined();
  expect(bed.deployment.readyReplicas).toBe(1);
  expect(bed.sim.workers.length).toBe(2);
});

test("scaled to zero the group drains, is Stopped only when nothing of it runs, and goes", async () => {
  const bed = await Whole.begin();
  bed.run();
  await bed.serves();
  const early: string[] = [];
  bed.server.onChange(({ resource, after, before }) => {
    if (resource.kind !== "ReplicaGroup") return;
    if (after === undefined && bed.sim.workers.length > 0)
      early.push(`${before?.metadata.name} went before its workers`);
  });
  await bed.server.patch(modelDeployments, "chat", NS, { spec: { replicas: 0 } }, { type: "merge" }, never);
  await bed.time.runTill(() => bed.groups.length === 0, "the group has gone");
  expect(early).toEqual([]);
  expect(bed.pods).toEqual([]);
  await bed.time.runTill(() => bed.deployment.phase === "Stopped", "it says so");
  await bed.server.patch(modelDeployments, "chat", NS, { spec: { replicas: 1 } }, { type: "merge" }, never);
  await bed.serves();
});

test("deleted, nothing of it is left", async () => {
  const bed = await Whole.begin();
  bed.run();
  await bed.serves();
  await bed.server.delete(modelDeployments, "chat", NS, { propagationPolicy: "Background" }, never);
  const left = () => [modelDeployments, replicaGroups, shardPlans, pods].flatMap((kind) => bed.server.objects(kind));
  await bed.time.runTill(() => left().length === 0, "all has gone");
  await bed.time.runFor(60_000);
  expect(left()).toEqual([]);
  expect(bed.sim.workers).toEqual([]);
});

// Fields whose effect shows only over time: under load, while something is replaced, where two want the same GPU, and in what
// workers are told. The whole controller over simulated nodes. And the check that no field of either kind is left out.
import { beforeAll, describe, expect, onTestFinished, test } from "vitest";
import { draftPoolSpec } from "../../../../controller/api/draft-pool.ts";
import { modelDeploymentSpec } from "../../../../controller/api/model-deployment.ts";
import { toStructural } from "../../../../controller/api/structural.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { fieldsOf } from "../../../../controller/kube/api/fields.ts";
import { draftPools, modelDeployments, nodes, pods, replicaGroups } from "../../../../controller/kube/api/resources.ts";
import type { ExpertLinks } from "../../../../controller/kube/experts/expert-link.ts";
import { groupsPart } from "../../../../controller/kube/groups/groups-part.ts";
import { parseTemplate } from "../../../../controller/kube/groups/worker-template.ts";
import { runController } from "../../../../controller/kube/run-controller.ts";
import type { WorkerLinks } from "../../../../controller/kube/workers/worker-link.ts";
import { readModel } from "../../../../controller/model/model.ts";
import type { LoadSample } from "../../../../controller/reconcile/autoscale.ts";
import { answerFor } from "../../../../controller/reconcile/deployment/planning.ts";
import type { ModelSpec } from "../../../../proto/gen/muster/v1/plan.ts";
import type { LoadRequest } from "../../../../proto/gen/muster/v1/worker.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { SimPods } from "../../../sim/pods.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { fieldPaths, valuesAt } from "../../api/leaves.ts";
import { DRAFT, IN_SIM, NANO, ON_SERVER, POOL_FIXED, poolEffect, type Spec } from "../field-effects.ts";
import { node, pod } from "../objects.ts";

const NS = "serving";
const IMAGE = "worker@sha256:0";
const never = new AbortController().signal;
const models = new Map<string, ModelSpec>();
beforeAll(async () => {
  for (const source of [NANO, DRAFT]) models.set(source, await readModel(source, { headersOnly: true }));
});

function modelOf(source: string): ModelSpec {
  const model = models.get(source);
  if (model === undefined) throw new Error(`no model ${source}`);
  return model;
}

test("every field of a ModelDeployment and of a DraftPool has an effect that is looked at", () => {
  const fields = fieldPaths(toStructural(modelDeploymentSpec));
  expect([...Object.keys(ON_SERVER), ...IN_SIM].toSorted()).toEqual(fields.toSorted());
  const without = fieldPaths(toStructural(draftPoolSpec)).filter((path) => poolEffect(path) === undefined);
  expect(without.filter((path) => !POOL_FIXED.includes(path))).toEqual([]);
});

type Replaced = { made: string; others: (string | undefined)[] };

class Bed {
  readonly time = new VirtualClock();
  readonly server = new SimApiServer(this.time);
  readonly random = randomOf(3);
  readonly sim = new SimPods({ server: this.server, time: this.time, random: this.random });
  /** Of each Load by owner, as its worker got it. */
  readonly loads: { group: string; request: LoadRequest }[] = [];
  /** At the birth of each group: what its siblings were to do. */
  readonly born: Replaced[] = [];
  history: LoadSample[] = [];
  expertsAsked = 0;

  static async begin(gpus: readonly number[]): Promise<Bed> {
    const bed = new Bed();
    for (const [index, count] of gpus.entries()) {
      const wanted = node(`gpu-${index}`, { gpus: count });
      const made = await bed.server.create(nodes, wanted, never);
      await bed.server.replaceStatus(nodes, { ...made, status: wanted.status }, never);
    }
    bed.server.onChange(({ resource, before, after }) => {
      if (resource.kind !== "ReplicaGroup" || before !== undefined || after === undefined) return;
      const others = bed.groups.filter(({ metadata }) => metadata.name !== after.metadata.name);
      bed.born.push({ made: after.metadata.name, others: others.map(({ spec }) => String(fieldsOf(spec).state)) });
    });
    return bed;
  }

  run(): void {
    const stop = new AbortController();
    const { time: clock, random, sim } = this;
    const links: WorkerLinks = {
      describe: (target, signal) => sim.describe(target, signal),
      load: async (target, request, signal) => {
        this.loads.push({ group: target.name.group, request });
        await sim.load(target, request, signal);
      },
      forget: () => sim.forget(),
    };
    const experts: ExpertLinks = {
      expertLoad: async () => {
        this.expertsAsked += 1;
        return { layers: [], map: undefined };
      },
      stageExperts: () => Promise.reject(new Error("nothing was counted")),
      switchExperts: () => Promise.reject(new Error("nothing was staged")),
    };
    const part = groupsPart({
      clock,
      random,
      template: parseTemplate("drainSeconds: 5", IMAGE),
      broker: { url: "nats://broker:4222", token: "t" },
      read: async (source: string) => modelOf(source),
      linksOf: (onNews) => {
        sim.onNews = onNews;
        return links;
      },
      experts: { links: experts },
    });
    const done = runController(
      {
        api: this.server,
        clock,
        random,
        planner: async (ask) => answerFor(modelOf(ask.question.source.url), ask),
        workerImage: IMAGE,
        identity: "one",
        lease: { namespace: NS, name: "muster-controller" },
        loadOf: () => this.history,
        parts: [part],
      },
      stop.signal,
    );
    done.catch(() => {}); // ends are awaited
    onTestFinished(async () => {
      stop.abort();
      await this.time.finish(done);
    });
  }

  async make(name: string, spec: Spec, resource = modelDeployments): Promise<void> {
    const { kind } = resource;
    const object = { apiVersion: "muster.dev/v1alpha1", kind, metadata: { name, namespace: NS }, spec };
    await this.server.create(resource, object, never);
  }

  get groups(): readonly KubeObject[] {
    return this.server.objects(replicaGroups);
  }

  groupsOf(owner: string): KubeObject[] {
    return this.groups.filter(({ spec }) => valuesAt(spec, "owner.name")[0] === owner);
  }

  isServing(owner: string): boolean {
    const found = this.groupsOf(owner);
    return found.length > 0 && found.every(({ status }) => fieldsOf(status).phase === "Serving");
  }

  async serves(owner: string): Promise<void> {
    await this.time.runTill(() => this.isServing(owner), `${owner} serves`);
  }

  loadOf(owner: string): LoadRequest {
    const names = this.groupsOf(owner).map(({ metadata }) => `${NS}/${metadata.name}`);
    const found = this.loads.findLast(({ group }) => names.includes(group));
    if (found === undefined) throw new Error(`${owner} was not loaded`);
    return found.request;
  }
}

const nano = (more: Spec = {}): Spec => ({ model: { source: NANO }, gpu: { count: 1 }, ...more });

describe("under load", () => {
  /** Replicas that are wanted after a while of this load. */
  async function wantedUnder(autoscale: Spec, load: Partial<LoadSample>): Promise<unknown> {
    const bed = await Bed.begin([8]);
    await bed.make("chat", nano({ autoscale }));
    bed.run();
    await bed.serves("chat");
    for (let second = 0; second < 180; second += 5) {
      const serving = bed.groupsOf("chat").filter(({ status }) => fieldsOf(status).phase === "Serving").length;
      const calm = { queue: 0, running: 8, arrivals: 1, tokensPerSecond: 100, ttftMs: 50, itlMs: 5 };
      bed.history = [...bed.history, { ...calm, ...load, atMs: bed.time.nowMs(), serving }];
      await bed.time.runFor(5_000);
    }
    const [object] = bed.server.objects(modelDeployments);
    return fieldsOf(object?.status).targetReplicas;
  }
  const busy = { queue: 400, running: 16, arrivals: 100 };

  test("autoscale.max bounds the replicas", async () => {
    const targets = { queue: 1 };
    expect(await wantedUnder({ max: 2, targets }, busy)).toBe(2);
    expect(await wantedUnder({ max: 3, targets }, busy)).toBe(3);
  });

  test.each<[string, Spec, Spec, Partial<LoadSample>]>([
    ["queue", { queue: 1000 }, { queue: 1 }, { queue: 3, running: 2 }],
    ["ttftMs", { queue: 1000, ttftMs: 5_000 }, { queue: 1000, ttftMs: 100 }, { running: 11, ttftMs: 2_000 }],
    ["itlMs", { queue: 1000, itlMs: 1_000 }, { queue: 1000, itlMs: 10 }, { running: 11, itlMs: 200 }],
  ])("autoscale.targets.%s: what is kept asks for no more, what is missed does", async (_, kept, missed, load) => {
    expect(await wantedUnder({ max: 4, targets: kept }, load)).toBe(1);
    expect(await wantedUnder({ max: 4, targets: missed }, load)).toBeGreaterThan(1);
  });
});

test("rollout.kind: surge makes the new group beside the old one, inPlace when that has been told to end", async () => {
  const othersOf = async (kind: string): Promise<unknown> => {
    const bed = await Bed.begin([2]);
    await bed.make("chat", nano({ rollout: { kind, drainTimeout: "5s" } }));
    bed.run();
    await bed.serves("chat");
    const patch = { spec: { podPatch: { labels: { a: "b" } } } };
    await bed.server.patch(modelDeployments, "chat", NS, patch, { type: "merge" }, never);
    await bed.time.runTill(() => bed.born.length === 2, "another group is made");
    return bed.born[1]?.others;
  };
  expect(await othersOf("surge")).toEqual(["Serving"]);
  expect(await othersOf("inPlace")).not.toContain("Serving");
});

test("priority: who waits for the same GPU gets it by priority, then by age", async () => {
  const firstOf = async (priority: number): Promise<string> => {
    const bed = await Bed.begin([1]);
    const taken = pod("foreign", { gpus: 1 });
    const { uid: _uid, resourceVersion: _version, ...metadata } = taken.metadata;
    const spec = { ...fieldsOf(taken.spec), nodeName: "gpu-0" };
    const namespace = metadata.namespace ?? NS;
    await bed.server.create(pods, { ...taken, metadata: { ...metadata, namespace }, spec }, never);
    bed.run();
    await bed.make("older", nano());
    const isWaiting = (owner: string) => () =>
      bed.groupsOf(owner).some(({ status }) => fieldsOf(status).phase === "CapacityShort");
    await bed.time.runTill(isWaiting("older"), "the older one waits");
    await bed.make("younger", nano({ priority }));
    await bed.time.runTill(isWaiting("younger"), "the younger one waits");
    await bed.time.runFor(10_000);
    await bed.server.delete(pods, metadata.name, namespace, { gracePeriodSeconds: 0 }, never);
    const owners = ["older", "younger"];
    await bed.time.runTill(() => owners.some((owner) => bed.isServing(owner)), "one of them serves");
    return owners.filter((owner) => bed.isServing(owner)).join();
  };
  expect(await firstOf(0)).toBe("older");
  expect(await firstOf(1)).toBe("younger");
});

test("experts.balancing: leaders are asked what their experts serve, or left alone", async () => {
  const askedWith = async (balancing: string): Promise<number> => {
    const bed = await Bed.begin([2]);
    await bed.make("chat", { ...nano({ parallelism: { tp: 2, ep: 2 }, experts: { balancing } }), gpu: { count: 2 } });
    bed.run();
    await bed.serves("chat");
    await bed.time.runFor(120_000);
    return bed.expertsAsked;
  };
  expect(await askedWith("none")).toBe(0);
  expect(await askedWith("measured")).toBeGreaterThan(1);
});

describe("what workers are told", () => {
  async function loaded(spec: Spec): Promise<LoadRequest> {
    const bed = await Bed.begin([2]);
    await bed.make("drafts", { model: { source: DRAFT } }, draftPools);
    bed.run();
    await bed.serves("drafts");
    await bed.make("chat", nano(spec));
    await bed.serves("chat");
    expect(bed.loadOf("drafts").draft).toMatchObject({ pool: `${NS}_drafts` });
    return bed.loadOf("chat");
  }

  test("slo.concurrency: rows of a step, slots, and how many run", async () => {
    const few = await loaded({ slo: { concurrency: 8 } });
    const many = await loaded({ slo: { concurrency: 80 } });
    expect([few.limits?.runningMax, many.limits?.runningMax]).toEqual([8, 80]);
    expect([few.engine?.rowsMax, many.engine?.rowsMax]).toEqual([64, 80]);
    expect([few.engine?.slotsMax, many.engine?.slotsMax]).toEqual([18, 162]);
  });

  test("speculation.draftPool: with whom a leader speculates", async () => {
    expect((await loaded({})).speculation).toBeUndefined();
    const { speculation } = await loaded({ speculation: { draftPool: "drafts" } });
    expect(speculation).toMatchObject({ enabled: true, pool: `${NS}_drafts`, natsUrl: "nats://broker:4222" });
  });
});

// Experts of groups in the hands of the groups' part, in virtual time: who is asked and who is not, and what a move leaves in
// status, events and metrics, beside what others write there. Workers are in memory; what they count is the test's.
import { beforeAll, expect, onTestFinished, test } from "vitest";
import { parseReplicaGroup, parseShardPlan } from "../../../../controller/api/parse.ts";
import { EXPERT_MAPS_MAX } from "../../../../controller/api/shard-plan.ts";
import {
  events,
  modelDeployments,
  nodes,
  replicaGroups,
  shardPlans,
} from "../../../../controller/kube/api/resources.ts";
import type { ExpertLinks } from "../../../../controller/kube/experts/expert-link.ts";
import { mergedMaps } from "../../../../controller/kube/experts/group-experts.ts";
import { groupsPart } from "../../../../controller/kube/groups/groups-part.ts";
import { parseTemplate } from "../../../../controller/kube/groups/worker-template.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { runController } from "../../../../controller/kube/run-controller.ts";
import type { WorkerTarget } from "../../../../controller/kube/workers/worker-link.ts";
import { readModel } from "../../../../controller/model/model.ts";
import { answerFor } from "../../../../controller/reconcile/deployment/planning.ts";
import type { ExpertLoadResponse, SwitchExpertsResponse } from "../../../../proto/gen/muster/v1/experts.ts";
import type { ExpertMap, ModelSpec } from "../../../../proto/gen/muster/v1/plan.ts";
import type { StageExpertsRequest } from "../../../../proto/gen/muster/v1/worker.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { SimPods } from "../../../sim/pods.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { node } from "../objects.ts";

const NS = "serving";
const SOURCE = "builtin://nano-maverick";
const IMAGE = "worker@sha256:0";
const LOOK_MS = 30_000;
const BLOCKS = [1, 3];
const SKEWED = [40_000, 30_000, 20_000, 10_000, 1_000, 1_000, 1_000, 1_000];
const never = new AbortController().signal;
const MEASURED = {
  model: { source: SOURCE },
  gpu: { count: 2, topology: { nodes: 2 } },
  parallelism: { tp: 2, ep: 2 },
  experts: { balancing: "measured", redundant: 2 },
  rollout: { drainTimeout: "5s" },
};

let model: ModelSpec;
beforeAll(async () => {
  model = await readModel(SOURCE, { headersOnly: true });
});

type Engine = { incarnation: bigint; map: ExpertMap | undefined; counts: bigint[] };

/** The engines of each group, one incarnation after the other: counters and map begin anew with each. */
class Engines implements ExpertLinks {
  readonly asked: WorkerTarget[] = [];
  readonly staged: { target: WorkerTarget; request: StageExpertsRequest }[] = [];
  failing: Error | undefined;
  readonly #sim: SimPods;
  readonly #engines = new Map<string, Engine>();

  constructor(sim: SimPods) {
    this.#sim = sim;
  }

  /** By all groups, or by that one. */
  serve(tokens: readonly number[], group?: string): void {
    for (const [name, engine] of this.#engines)
      if (group === undefined || name === `${NS}/${group}`)
        engine.counts = tokens.map((count, expert) => (engine.counts[expert] ?? 0n) + BigInt(count));
  }

  #engineOf({ name: { group, incarnation } }: WorkerTarget): Engine {
    const known = this.#engines.get(group);
    if (known?.incarnation === incarnation) return known;
    const begun = { incarnation, map: undefined, counts: new Array<bigint>(8).fill(0n) };
    this.#engines.set(group, begun);
    return begun;
  }

  async expertLoad(leader: WorkerTarget): Promise<ExpertLoadResponse> {
    this.asked.push(leader);
    const { counts, map } = this.#engineOf(leader);
    return { layers: BLOCKS.map((block) => ({ block, tokens: [...counts] })), map };
  }

  async stageExperts(target: WorkerTarget, request: StageExpertsRequest): Promise<void> {
    if (this.failing !== undefined) throw this.failing;
    this.staged.push({ target, request });
  }

  /** Each worker has its new numerics with its own next step. */
  async switchExperts(leader: WorkerTarget, version: number): Promise<SwitchExpertsResponse> {
    const own = this.staged.filter(({ target }) => target.name.group === leader.name.group);
    this.#engineOf(leader).map = own.findLast(({ request }) => request.map?.version === version)?.request.map;
    const numericsId = `sim-x${version.toString(16).padStart(12, "0")}`;
    const uids = new Set(own.map(({ target }) => target.uid));
    for (const { uid, description } of this.#sim.workers)
      if (uids.has(uid) && description.incarnation === leader.name.incarnation) description.numericsId = numericsId;
    return { numericsId };
  }
}

class Bed {
  readonly time = new VirtualClock();
  readonly server = new SimApiServer(this.time);
  readonly random = randomOf(9);
  readonly sim = new SimPods({ server: this.server, time: this.time, random: this.random });
  readonly engines = new Engines(this.sim);
  readonly metrics = new KubeMetrics();

  static async begin(spec: object): Promise<Bed> {
    const bed = new Bed();
    for (const name of ["gpu-0", "gpu-1", "gpu-2", "gpu-3", "gpu-4"]) {
      const wanted = node(name, { gpus: 1 });
      const made = await bed.server.create(nodes, wanted, never);
      await bed.server.replaceStatus(nodes, { ...made, status: wanted.status }, never);
    }
    const object = { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment", spec };
    await bed.server.create(modelDeployments, { ...object, metadata: { name: "chat", namespace: NS } }, never);
    bed.#run();
    await bed.serves(1);
    return bed;
  }

  #run(): void {
    const stop = new AbortController();
    const { time: clock, random, sim, engines, metrics } = this;
    const part = groupsPart({
      clock,
      random,
      template: parseTemplate("drainSeconds: 5", IMAGE),
      read: async () => model,
      linksOf: (onNews) => {
        sim.onNews = onNews;
        return sim;
      },
      experts: { lookMs: LOOK_MS, links: engines },
      metrics,
    });
    const planner = async (ask: Parameters<typeof answerFor>[1]) => answerFor(model, ask);
    const lease = { namespace: NS, name: "muster-controller" };
    const options = { api: this.server, clock, random, planner, workerImage: IMAGE, identity: "one", lease };
    const done = runController({ ...options, parts: [part] }, stop.signal);
    done.catch(() => {}); // ends are awaited
    onTestFinished(async () => {
      stop.abort();
      await this.time.finish(done);
    });
  }

  get groups() {
    return this.server.objects(replicaGroups).map((object) => {
      const parsed = parseReplicaGroup(object);
      if (parsed.kind === "refused") throw new Error(parsed.fault.detail);
      return { name: object.metadata.name, ...parsed.value.status };
    });
  }

  get group() {
    const [first] = this.groups;
    if (first === undefined) throw new Error("no group");
    return first;
  }

  /** What the plan shows of its groups: name, incarnation, version. */
  get maps() {
    return (this.plan.expertMaps ?? []).map(({ group, incarnation, version }) => [group, incarnation, version]);
  }

  async edit(spec: object): Promise<void> {
    const [object] = this.server.objects(modelDeployments);
    if (object === undefined) throw new Error("no deployment");
    await this.server.replace(modelDeployments, { ...object, spec }, never);
  }

  get planObject() {
    const [object] = this.server.objects(shardPlans);
    if (object === undefined) throw new Error("no plan");
    return object;
  }

  get plan() {
    const parsed = parseShardPlan(this.planObject);
    if (parsed.kind === "refused") throw new Error(parsed.fault.detail);
    return parsed.value.status ?? {};
  }

  get told() {
    return this.server
      .objects(events)
      .filter(({ action }) => action === "MoveExperts")
      .map(({ type, reason, note }) => ({ type, reason, note }));
  }

  async serves(incarnation: number): Promise<void> {
    const isSo = () =>
      this.server.objects(replicaGroups).length > 0 &&
      this.group.phase === "Serving" &&
      this.group.incarnation === incarnation;
    await this.time.runTill(isSo, `incarnation ${incarnation} serves`);
  }

  async moved(version: number): Promise<void> {
    await this.time.runTill(() => this.map?.version === version, `map ${version} is said`, 4 * LOOK_MS);
  }

  /** Of the only group. */
  get map() {
    const [map, ...others] = this.plan.expertMaps ?? [];
    expect(others).toEqual([]);
    return map;
  }
}

test("experts are moved by load; status, event, numerics id and metrics say so, and what others have measured stays", async () => {
  const bed = await Bed.begin(MEASURED);
  await bed.moved(0);
  const measured = { at: "2026-01-01T00:00:00Z", tokensPerSecond: 5 };
  await bed.server.replaceStatus(
    shardPlans,
    { ...bed.planObject, status: { ...Object(bed.planObject.status), measured } },
    never,
  );
  const { digest } = bed.map ?? {};
  bed.engines.serve(SKEWED);
  await bed.moved(1);
  expect(bed.plan.measured).toEqual(measured);
  expect(bed.map?.digest).toMatch(/^[0-9a-f]{12}$/);
  expect(bed.map?.digest).not.toBe(digest);
  expect(bed.engines.staged.map(({ target: { name } }) => name.worker)).toEqual([0, 1]);
  const addresses = bed.sim.workers.map(({ uid, address }) => `${uid} ${address}:7440`);
  expect(bed.engines.staged.map(({ target: { uid, address } }) => `${uid} ${address}`).toSorted()).toEqual(
    addresses.toSorted(),
  );
  await bed.time.runTill(() => bed.group.numericsId === "sim-x000000000001", "the numerics id is said");
  await bed.time.runFor(LOOK_MS);
  expect(bed.told).toEqual([
    {
      type: "Normal",
      reason: "ExpertsMoved",
      note: expect.stringMatching(/^map 1: 2 copies in each layer: imbalance /),
    },
  ]);
  expect(bed.metrics.total("muster_expert_moves_total", { outcome: "moved" })).toBe(1);
  const imbalances = bed.metrics.samples().filter(({ name }) => name === "muster_expert_imbalance");
  const [before = 0, after = 0] = imbalances.map(({ value }) => value);
  expect(before).toBeGreaterThan(after);
  expect(after).toBeGreaterThanOrEqual(1);
  expect(bed.group).toMatchObject({ incarnation: 1, restarts: 0 });
});

test("a new incarnation begins with the plan's map, and moves anew", async () => {
  const bed = await Bed.begin(MEASURED);
  await bed.moved(0);
  bed.engines.serve(SKEWED);
  await bed.moved(1);
  const [victim] = bed.sim.workers;
  if (victim === undefined) throw new Error("nobody works");
  bed.sim.crash(victim);
  await bed.serves(2);
  await bed.moved(0);
  bed.engines.serve(SKEWED);
  await bed.moved(1);
  expect(bed.engines.staged.map(({ request: { incarnation } }) => incarnation)).toEqual([1n, 1n, 2n, 2n]);
});

test("X2, X3: each of two groups has its own map and entry; one that restarts begins anew, one that goes takes its entry along", async () => {
  const bed = await Bed.begin({ ...MEASURED, replicas: 2 });
  await bed.time.runTill(() => bed.maps.length === 2, "both are shown", 4 * LOOK_MS);
  const [one = "", other = ""] = bed.groups.map(({ name }) => name).toSorted();
  expect(bed.maps).toEqual([
    [one, 1, 0],
    [other, 1, 0],
  ]);
  const since = bed.plan.expertMaps?.[1]?.since;
  bed.engines.serve(SKEWED, one);
  await bed.time.runTill(() => bed.maps[0]?.[2] === 1, "the first has moved", 4 * LOOK_MS);
  await bed.time.runFor(2 * LOOK_MS);
  expect(bed.maps).toEqual([
    [one, 1, 1],
    [other, 1, 0],
  ]);
  expect(bed.plan.expertMaps?.[1]?.since).toBe(since);
  expect(new Set(bed.engines.staged.map(({ target }) => target.name.group))).toEqual(new Set([`${NS}/${one}`]));

  const victim = bed.sim.workers.find(({ group }) => group === `${NS}/${other}`);
  if (victim === undefined) throw new Error("nobody works");
  bed.sim.crash(victim);
  const restarted = () => bed.groups.find(({ name }) => name === other);
  await bed.time.runTill(() => restarted()?.incarnation === 2 && restarted()?.phase === "Serving", "it serves again");
  await bed.time.runTill(() => bed.maps[1]?.[1] === 2, "its next incarnation is shown", 4 * LOOK_MS);
  expect(bed.maps).toEqual([
    [one, 1, 1],
    [other, 2, 0],
  ]);
  expect(bed.plan.expertMaps?.[0]?.digest).not.toBe(bed.plan.expertMaps?.[1]?.digest);

  await bed.edit({ ...MEASURED, replicas: 1 });
  await bed.time.runTill(() => bed.groups.length === 1 && bed.maps.length === 1, "one has gone", 4 * LOOK_MS);
  expect(bed.maps).toEqual([[bed.group.name, bed.group.incarnation, bed.group.name === one ? 1 : 0]]);
});

test("X3: a plan of very many groups shows the maps that changed last, by name, and keeps what says the same", () => {
  const entry = (index: number, atMs: number) => ({
    group: `chat-${String(index).padStart(4, "0")}`,
    incarnation: 1,
    version: 0,
    digest: "ab",
    since: new Date(atMs).toISOString(),
  });
  const before = Array.from({ length: EXPERT_MAPS_MAX }, (_, index) => entry(index, 1_000 * index));
  const same = { ...entry(7, 900_000_000) };
  const next = { ...entry(9, 900_000_000), version: 1 };
  const fresh = entry(EXPERT_MAPS_MAX, 900_000_000);
  const merged = mergedMaps(before, new Map([same, next, fresh].map((each) => [each.group, each])), () => true);
  expect(merged).toEqual([...before.slice(1, 9), next, ...before.slice(10), fresh]);
  expect(mergedMaps(merged, new Map(), (group) => group === fresh.group)).toEqual([fresh]);
});

test("what fails is said, and nobody switches", async () => {
  const bed = await Bed.begin(MEASURED);
  await bed.moved(0);
  bed.engines.failing = new Error("file 3: is 10 bytes long");
  bed.engines.serve(SKEWED);
  await bed.time.runTill(() => bed.told.length > 0, "the failure is said", 4 * LOOK_MS);
  expect(bed.told).toEqual([
    { type: "Warning", reason: "ExpertsStay", note: "experts stay where they are: file 3: is 10 bytes long" },
  ]);
  expect(bed.metrics.total("muster_expert_moves_total", { outcome: "failed" })).toBeGreaterThan(0);
  expect(bed.map?.version).toBe(0);
  bed.engines.failing = undefined;
  bed.engines.serve(SKEWED);
  await bed.moved(1);
});

test.each([
  ["whose owner does not ask for it", { ...MEASURED, experts: {} }],
  [
    "with all experts on every rank",
    { ...MEASURED, parallelism: { tp: 2, ep: 1 }, experts: { balancing: "measured" } },
  ],
])("a group %s is never asked", async (_, spec) => {
  const bed = await Bed.begin(spec);
  await bed.time.runFor(4 * LOOK_MS);
  expect(bed.engines.asked).toEqual([]);
  expect(bed.plan.expertMaps).toBeUndefined();
});

test("balancing that is switched off and on again while it serves is followed", async () => {
  const bed = await Bed.begin({ ...MEASURED, experts: { balancing: "measured" } });
  await bed.time.runTill(() => bed.engines.asked.length > 0, "it is asked");
  const edit = (balancing: string) => bed.edit({ ...MEASURED, experts: { balancing } });
  await edit("none");
  await bed.time.runFor(LOOK_MS);
  const asked = bed.engines.asked.length;
  await bed.time.runFor(4 * LOOK_MS);
  expect(bed.engines.asked.length).toBe(asked);
  await edit("measured");
  await bed.time.runTill(() => bed.engines.asked.length > asked, "it is asked again");
  expect(bed.server.objects(shardPlans)).toHaveLength(1);
});

import { describe, expect, test } from "vitest";
import { events, leases } from "../../../../controller/kube/api/resources.ts";
import type { LoadSample } from "../../../../controller/reconcile/autoscale.ts";
import { CrashingApi } from "../crashing-api.ts";
import {
  Bed,
  converged,
  deployment,
  draftPools,
  HOUR_MS,
  modelDeployments,
  NS,
  never,
  planner,
  pool,
  replicaGroups,
  shardPlans,
  statusOf,
} from "./deployment-bed.ts";

async function serving(spec: Record<string, unknown>, options: { seed?: number; nodes?: number; gpus?: number } = {}) {
  const bed = new Bed({ seed: options.seed ?? 1 });
  await bed.begin({ nodes: options.nodes ?? 4, gpus: options.gpus ?? 8 });
  const running = bed.run(bed.server);
  await bed.server.create(modelDeployments, deployment("chat", spec), never);
  await converged(bed);
  return { bed, running };
}

const planNames = (bed: Bed) => bed.server.objects(shardPlans).map(({ metadata }) => metadata.name);
const groupNames = (bed: Bed) => bed.groups.map(({ metadata }) => metadata.name).toSorted();
const reasonsOf = (bed: Bed) => bed.server.objects(events).map((event) => String(event.reason));

describe("one owner", () => {
  test("becomes a plan and groups that serve; columns, conditions and events say so, each once", async () => {
    const { bed, running } = await serving({ replicas: 2 });
    await bed.time.runFor(60_000);
    const status = statusOf(bed);
    expect(status).toMatchObject({ plan: "tp4·2x", ready: "8/8", phase: "Serving", throughput: "201", replicas: 2 });
    expect(status.selector).toBe("muster.dev/deployment=chat");
    expect(status.conditions?.map(({ type, status: is }) => `${type}=${is}`)).toEqual([
      "Planned=True",
      "Placed=True",
      "Loaded=True",
      "Serving=True",
      "Degraded=False",
    ]);
    const [group] = bed.server.objects(replicaGroups);
    expect(group?.metadata.ownerReferences).toMatchObject([
      { kind: "ModelDeployment", name: "chat", controller: true },
    ]);
    const told = reasonsOf(bed);
    expect(told.filter((reason) => reason === "Planned")).toHaveLength(1);
    expect(told.filter((reason) => reason === "Serving")).toHaveLength(1);
    expect(running.failures).toEqual([]);
    expect(bed.broken).toEqual([]);
  });

  test("at rest nothing is written: an hour of looks makes no version", async () => {
    const { bed } = await serving({ replicas: 2 });
    await bed.time.runFor(30_000);
    const before = bed.log.length;
    await bed.time.runFor(HOUR_MS / 2);
    expect(bed.log.slice(before).filter((line) => !line.includes("leases/"))).toEqual([]);
  });

  test("scaling makes and drains groups, newest first, and plans nothing; zero and back too", async () => {
    const { bed } = await serving({ replicas: 3 });
    const [plan] = planNames(bed);
    const hash = plan?.slice(5, 10);
    await bed.edit("chat", { replicas: 1 });
    await converged(bed);
    expect(groupNames(bed)).toEqual([`chat-${hash}-0`]);
    await bed.edit("chat", { replicas: 0 });
    await converged(bed);
    expect(statusOf(bed)).toMatchObject({ phase: "Stopped", cause: { code: "scaled-to-zero" }, ready: "0/0" });
    await bed.edit("chat", { replicas: 2 });
    await converged(bed);
    expect(groupNames(bed)).toEqual([`chat-${hash}-3`, `chat-${hash}-4`]);
    expect(planNames(bed)).toEqual([plan]);
    expect(bed.broken).toEqual([]);
  });

  test("another source rolls over; taking it back finds the stored plan again", async () => {
    const { bed } = await serving({ replicas: 2 });
    const [first] = planNames(bed);
    await bed.edit("chat", { model: { source: "builtin://two" } });
    await converged(bed);
    const { planName } = statusOf(bed);
    expect(planName).not.toBe(first);
    await bed.edit("chat", { model: { source: "builtin://one" } });
    await converged(bed);
    expect(statusOf(bed).planName).toBe(first);
    expect(planNames(bed).toSorted()).toEqual([first, planName].toSorted());
    await bed.time.runFor(5_000);
    expect(reasonsOf(bed).filter((reason) => reason === "RolloutDone")).toHaveLength(2);
    expect(bed.broken).toEqual([]);
  });

  test("an edit of pods alone takes the stored cut over as it is, whatever the planner would say now", async () => {
    const { bed } = await serving({ replicas: 1 });
    const [before] = bed.server.objects(shardPlans);
    await bed.edit("chat", { podPatch: { labels: { team: "search" } } });
    await bed.time.runTill(() => planNames(bed).length === 2, "another plan is stored");
    await converged(bed);
    const after = bed.server.objects(shardPlans).find(({ metadata }) => metadata.name !== before?.metadata.name);
    const cutOf = (spec: unknown) => ({ ...Object(spec), podTemplateDigest: "", image: "" });
    expect(cutOf(after?.spec)).toEqual(cutOf(before?.spec));
    expect(bed.broken).toEqual([]);
  });

  test("a surge without devices waits and says how many; inPlace then goes through", async () => {
    const { bed } = await serving({ replicas: 2 }, { nodes: 1 });
    await bed.edit("chat", { model: { source: "builtin://two" } });
    await bed.time.runTill(() => statusOf(bed).updated !== undefined, "the rollout is said");
    await bed.time.runFor(120_000);
    const { notices, updated, phase } = statusOf(bed);
    expect(phase).toBe("Serving");
    expect(updated).toBe("0 of 2 replaced, short");
    const [need] = notices?.filter(({ field }) => field === "spec.rollout") ?? [];
    expect(need?.message).toMatch(
      /^the new plan needs 4 more GPUs beside the old one; with rollout.kind: inPlace it runs at 50% capacity/,
    );
    await bed.edit("chat", { rollout: { kind: "inPlace" } });
    await converged(bed);
    expect(bed.broken).toEqual([]);
  });

  test("a cordoned node: another group serves before its own drains; it is said, and nothing is left there", async () => {
    const { bed } = await serving({ replicas: 2 }, { nodes: 3, gpus: 4 });
    const nodesOf = () => bed.groups.flatMap(({ status }) => status?.placement?.map(({ node }) => node) ?? []);
    const [left = ""] = nodesOf();
    await bed.cordon(left);
    await bed.time.runTill(() => statusOf(bed).cause?.code === "node-leaving", "it is said");
    expect(statusOf(bed).cause?.message).toMatch(
      new RegExp(`^node ${left} is cordoned: (another replica|chat-\\w+-2) comes in place of chat-\\w+-0`),
    );
    await bed.time.runTill(() => bed.groups.length === 2 && !nodesOf().includes(left), "the node is free");
    await converged(bed);
    await bed.time.runFor(5_000);
    expect(statusOf(bed)).toMatchObject({ phase: "Serving", cause: { code: "serving" }, ready: "8/8" });
    expect(reasonsOf(bed).filter((reason) => reason === "Serving").length).toBeGreaterThan(0);
    expect(bed.broken).toEqual([]);
  });

  test("a cordoned node without another place: its group stays, what is missing is said, room or uncordon mends it", async () => {
    const { bed } = await serving({ replicas: 1, rollout: { kind: "inPlace" } }, { nodes: 1, gpus: 4 });
    await bed.cordon("gpu-0");
    await bed.time.runTill(() => statusOf(bed).phase === "Degraded", "it is said");
    const { cause, readyReplicas, conditions } = statusOf(bed);
    expect(cause?.code).toBe("no-replacement");
    expect(cause?.message).toMatch(
      /^node gpu-0 is cordoned and another replica needs 4 more GPUs: chat-\w+-0 serves there/,
    );
    expect(readyReplicas).toBe(1);
    expect(conditions?.find(({ type }) => type === "Degraded")).toMatchObject({ reason: "NoReplacement" });
    await bed.cordon("gpu-0", false);
    await bed.time.runTill(() => statusOf(bed).phase === "Serving", "it is open again");
    expect(groupNames(bed)).toHaveLength(1);
    await bed.cordon("gpu-0");
    await bed.time.runTill(() => statusOf(bed).phase === "Degraded", "it is said again");
    await bed.addNode("gpu-9", 4);
    await bed.time.runTill(
      () => bed.groups.every(({ status }) => status?.placement?.[0]?.node === "gpu-9"),
      "all is on the new node",
      HOUR_MS,
    );
    await converged(bed);
    expect(bed.broken).toEqual([]);
  });

  test("what cannot be is Infeasible with reason and remedy; what serves goes on; nodes that come mend it", async () => {
    const { bed } = await serving({ replicas: 1 }, { nodes: 1, gpus: 4 });
    const before = groupNames(bed);
    await bed.edit("chat", { gpu: { count: 3 } });
    await bed.time.runTill(() => statusOf(bed).phase === "Infeasible", "it is refused");
    const { cause, conditions } = statusOf(bed);
    expect(cause?.message).toMatch(/What would do: ranks \d fits\..*1 replicas of the plan before go on serving/);
    expect(conditions?.find(({ type }) => type === "Planned")).toMatchObject({ status: "False", reason: "Infeasible" });
    expect(conditions?.find(({ type }) => type === "Serving")).toMatchObject({ status: "True" });
    expect(groupNames(bed)).toEqual(before);
    await bed.edit("chat", { gpu: { count: 8 } });
    await bed.time.runTill(() => statusOf(bed).cause?.message.includes("there are 4") ?? false, "eight are too many");
    await bed.addNode("gpu-9");
    await converged(bed);
    expect(statusOf(bed)).toMatchObject({ plan: "tp8·1x" });
    expect(bed.broken).toEqual([]);
  });

  test("a source that does not answer is asked again with back-off, and said", async () => {
    const bed = new Bed({ seed: 3 });
    await bed.begin();
    let asked = 0;
    bed.run(bed.server, {
      planner: async () => {
        asked += 1;
        return { kind: "failed", detail: "builtin://away does not answer" };
      },
    });
    await bed.server.create(modelDeployments, deployment("chat", { model: { source: "builtin://away" } }), never);
    await bed.time.runFor(600_000);
    expect(statusOf(bed)).toMatchObject({ phase: "Scheduling", cause: { code: "source-unreadable" } });
    expect(asked).toBeGreaterThan(3);
    expect(asked).toBeLessThan(15);
  });

  test("a plan of its name that is another's is not taken: it is said, and waited for", async () => {
    const { bed: before } = await serving({ replicas: 1 });
    const [plan] = before.server.objects(shardPlans);
    if (plan === undefined) throw new Error("no plan was stored");
    const bed = new Bed({ seed: 4 });
    await bed.begin();
    const { name, namespace } = plan.metadata;
    await bed.server.create(shardPlans, { ...plan, metadata: { name, ...(namespace ? { namespace } : {}) } }, never);
    bed.run(bed.server);
    await bed.server.create(modelDeployments, deployment("chat"), never);
    const said = () => statusOf(bed).notices?.map(({ message }) => message) ?? [];
    await bed.time.runTill(() => said().some((message) => message.includes("belongs to another owner")), "it is said");
    expect(bed.groups).toEqual([]);
    await bed.server.delete(shardPlans, name, NS, {}, never);
    await converged(bed);
    await bed.time.runFor(30_000);
    expect(said()).toEqual([]);
    expect(bed.broken).toEqual([]);
  });

  test("deleting it leaves nothing behind", async () => {
    const { bed } = await serving({ replicas: 2 });
    await bed.server.delete(modelDeployments, "chat", NS, {}, never);
    await bed.time.runFor(30_000);
    expect([...bed.server.objects(replicaGroups), ...bed.server.objects(shardPlans)]).toEqual([]);
    expect(bed.broken).toEqual([]);
  });
});

describe("autoscale", () => {
  test("measured load decides the replicas within bounds, and status says the target", async () => {
    const bed = new Bed({ seed: 7 });
    await bed.begin();
    let running = 2;
    const history: LoadSample[] = [];
    bed.run(bed.server, {
      loadOf: () => {
        const serving = bed.groups.filter(({ status }) => status?.phase === "Serving").length;
        const atMs = bed.time.nowMs();
        history.push({ atMs, serving, queue: 0, running, arrivals: 1, tokensPerSecond: 10, ttftMs: 50, itlMs: 5 });
        return [...history];
      },
    });
    const autoscale = { min: 1, max: 3, targets: { queue: 4 } };
    await bed.server.create(modelDeployments, deployment("chat", { autoscale, replicas: 1 }), never);
    await bed.time.runTill(() => statusOf(bed).readyReplicas === 1, "one serves");
    expect(statusOf(bed).targetReplicas).toBe(1);
    running = 60;
    await bed.time.runTill(() => statusOf(bed).readyReplicas === 3, "three serve", HOUR_MS);
    expect(statusOf(bed)).toMatchObject({ targetReplicas: 3, plan: "tp4·3x", phase: "Serving" });
    expect(bed.server.objects(shardPlans)).toHaveLength(1);
    running = 1;
    await bed.time.runTill(() => bed.groups.length === 1, "one is left", HOUR_MS);
    expect(reasonsOf(bed).filter((reason) => reason === "Scaled").length).toBeGreaterThanOrEqual(3);
  });
});

describe("a better plan", () => {
  test("is only suggested; the annotation takes it", async () => {
    const { bed, running } = await serving({ replicas: 1, gpu: { count: 4 } });
    const [stored] = bed.server.objects(shardPlans);
    running.stop.abort();
    await bed.time.finish(running.done);
    // A newer controller, whose planner finds twice as much.
    bed.run(bed.server, {
      workerImage: "worker@sha256:1",
      planner: async (ask, signal) => {
        const answer = await planner(ask, signal);
        if (answer.kind !== "feasible") return answer;
        const { prediction } = answer.spec;
        const faster = { ...prediction, tokensPerSecond: prediction.tokensPerSecond * 2 };
        return { ...answer, spec: { ...answer.spec, revision: "b".repeat(32), prediction: faster } };
      },
    });
    const suggestion = () => statusOf(bed).conditions?.find(({ type }) => type === "BetterPlan");
    await bed.time.runTill(() => suggestion()?.status === "True", "it is suggested");
    expect(suggestion()?.message).toContain("100% more tokens per second");
    const [group] = groupNames(bed);
    await bed.time.runFor(HOUR_MS);
    expect(groupNames(bed)).toEqual([group]);
    expect(bed.server.objects(shardPlans)).toEqual([stored]);
    const annotations = { "muster.dev/replan": "b".repeat(12) };
    await bed.server.patch(modelDeployments, "chat", NS, { metadata: { annotations } }, { type: "merge" }, never);
    await bed.time.runTill(
      () => planNames(bed).length === 2 && bed.isConverged("chat"),
      "the better plan serves",
      HOUR_MS,
    );
    expect(groupNames(bed)).not.toEqual([group]);
    expect(bed.broken).toEqual([]);
  });
});

describe("what it has measured of itself", () => {
  test("restarts and writes nothing; the next revision is predicted with it", async () => {
    const { bed, running } = await serving({ replicas: 1 });
    running.stop.abort();
    await bed.time.finish(running.done);
    const asked: (number | undefined)[] = [];
    bed.run(bed.server, {
      planner: (ask, signal) => {
        asked.push(ask.calibration);
        return planner(ask, signal);
      },
    });
    await bed.time.runTill(() => asked.length > 0, "it is asked whether there is a better plan", HOUR_MS);
    expect(asked).toEqual([undefined]);
    const [plan] = bed.server.objects(shardPlans);
    if (plan === undefined) throw new Error("no plan");
    const measured = { at: "2026-01-01T00:00:00Z", tokensPerSecond: 5, concurrency: 16, calibration: 0.35 };
    await bed.server.replaceStatus(shardPlans, { ...plan, status: { measured } }, never);
    const [stored] = bed.server.objects(shardPlans);
    const before = groupNames(bed);
    await bed.time.runFor(2 * HOUR_MS);
    expect(asked.slice(1)).toEqual(asked.slice(1).map(() => 0.35));
    expect(asked.length).toBeLessThanOrEqual(4);
    expect(groupNames(bed)).toEqual(before);
    expect(bed.server.objects(shardPlans)).toEqual([stored]);
    expect(statusOf(bed).conditions?.map(({ type }) => type)).not.toContain("BetterPlan");

    asked.length = 0;
    await bed.edit("chat", { slo: { concurrency: 8 } });
    await bed.time.runTill(() => planNames(bed).length === 2 && bed.isConverged("chat"), "the next serves", HOUR_MS);
    expect(asked[0]).toBe(0.35);
    const next = bed.server.objects(shardPlans).find(({ metadata }) => metadata.name !== plan.metadata.name);
    expect(next?.spec).toMatchObject({ prediction: { calibration: 0.35 } });
    expect(bed.broken).toEqual([]);
  });
});

describe("drafts", () => {
  test("a pool of the same vocabulary is paired, one of another refused with the reason", async () => {
    const bed = new Bed({ seed: 5 });
    await bed.begin();
    bed.run(bed.server);
    await bed.server.create(draftPools, pool("drafts"), never);
    await bed.server.create(draftPools, pool("foreign", "builtin://other"), never);
    await bed.server.create(modelDeployments, deployment("chat", { speculation: { draftPool: "drafts" } }), never);
    await converged(bed);
    await bed.time.runTill(() => statusOf(bed).speculation?.active === true, "drafts are paired");
    expect(bed.groups.find(({ spec }) => spec.owner.name === "chat")?.metadata.annotations).toMatchObject({
      "muster.dev/draft-pool": "drafts",
    });
    await bed.time.runFor(20_000);
    expect(bed.of(draftPools, "drafts")?.status).toMatchObject({
      vocabulary: "0000000000000007",
      targets: ["chat"],
      ready: "1/1",
      phase: "Serving",
    });
    await bed.edit("chat", { speculation: { draftPool: "foreign" } });
    await converged(bed);
    await bed.time.runFor(20_000);
    const { speculation, notices } = statusOf(bed);
    expect(speculation).toMatchObject({ active: false, pool: "foreign" });
    expect(notices).toMatchObject([{ field: "spec.speculation.draftPool", kind: "Refused" }]);
    expect(speculation?.detail).toContain("0000000000000009");
    expect(bed.of(draftPools, "foreign")?.status).toMatchObject({ targets: [] });
    expect(bed.groups.find(({ spec }) => spec.owner.name === "chat")?.metadata.annotations).toBeUndefined();
    expect(bed.broken).toEqual([]);
  });
});

describe("leading", () => {
  test("of two one acts; when it loses the lease everything of it stops, the other goes on", async () => {
    const bed = new Bed({ seed: 31 });
    await bed.begin();
    const leads: string[] = [];
    const first = new CrashingApi(bed.server, Number.POSITIVE_INFINITY, () => {});
    const second = new CrashingApi(bed.server, Number.POSITIVE_INFINITY, () => {});
    const one = bed.run(first, { onLead: (is) => leads.push(`one ${is}`) });
    await bed.time.runFor(3_000);
    const two = bed.run(second, { onLead: (is) => leads.push(`two ${is}`) });
    await bed.server.create(modelDeployments, deployment("chat", { replicas: 1 }), never);
    await converged(bed);
    expect(second.writes).toEqual([]);
    // Somebody takes the lease away: the holder finds out at its next renewal.
    const lease = bed.of(leases, "muster-controller");
    const spec = { holderIdentity: "a stranger", leaseDurationSeconds: 15, leaseTransitions: 9 };
    await bed.server.patch(leases, "muster-controller", NS, { spec }, { type: "merge" }, never);
    expect(lease).toBeDefined();
    await bed.time.runFor(3_000);
    expect(leads).toEqual(["one true", "one false"]);
    const written = first.writes.length;
    await bed.edit("chat", { replicas: 2 });
    await bed.time.runFor(5_000);
    expect(first.writes.length + second.writes.length).toBe(written);
    await converged(bed);
    expect(leads[2]).toMatch(/true$/);
    for (const running of [one, two]) running.stop.abort();
    expect(bed.broken).toEqual([]);
  });
});

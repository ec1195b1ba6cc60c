// What stands beside the pods of a group, on the simulated server: written once, mended when edited, gone with what it is for.
import { describe, expect, test } from "vitest";
import { LABELS } from "../../../../controller/api/meta.ts";
import { KubeError, type KubeObject } from "../../../../controller/kube/api/client.ts";
import { podDisruptionBudgets, podGroups, replicaGroups, services } from "../../../../controller/kube/api/resources.ts";
import { type BesideStores, GroupBeside } from "../../../../controller/kube/groups/group-beside.ts";
import { besideOf } from "../../../../controller/kube/groups/group-objects.ts";
import { Reflector } from "../../../../controller/kube/watch/reflector.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { Phase } from "../../../../proto/gen/muster/v1/control.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { Bed } from "./group-bed.ts";

const NS = "serving";
const { signal: never } = new AbortController();

async function begin(admit?: (object: KubeObject) => void) {
  const time = new VirtualClock();
  const server = new SimApiServer(time, admit === undefined ? {} : { admit });
  const spec = { owner: { kind: "ModelDeployment", name: "chat" }, plan: "chat-p", ordinal: 0, state: "Serving" };
  const metadata = { name: "chat-abcde-0", namespace: NS };
  const object = { apiVersion: "muster.dev/v1alpha1", kind: "ReplicaGroup", metadata, spec };
  const group = await server.create(replicaGroups, object, never);
  const stores = { services: new Store(), budgets: new Store(), podGroups: new Store() };
  const kinds = [
    { resource: services, store: stores.services },
    { resource: podDisruptionBudgets, store: stores.budgets },
    { resource: podGroups, store: stores.podGroups },
  ];
  for (const kind of kinds) void new Reflector({ api: server, clock: time, random: () => 0.5, ...kind }).run(never);
  await time.runFor(10);
  const wanted = (incarnation: bigint) => {
    const who = { group, owner: { kind: "ModelDeployment", name: "chat" } as const, planName: "chat-p" };
    return besideOf(who, { incarnation, workers: 2, port: 7070, pods: { hasPodGroup: true } });
  };
  const made = (of: BesideStores = stores) => new GroupBeside({ api: server, stores: of, nowMs: () => time.nowMs() });
  return { time, server, group, stores, wanted, made };
}

const specOf = (server: SimApiServer, resource: typeof services) => Object(server.objects(resource)[0]?.spec);

describe("GroupBeside", () => {
  test("B2: all is written once; neither a second look nor another process writes it again", async () => {
    const { time, server, group, wanted, made } = await begin();
    expect(await made().keep(wanted(1n), never)).toBe(true);
    for (const resource of [services, podDisruptionBudgets, podGroups]) {
      const [object] = server.objects(resource);
      expect(object?.metadata.ownerReferences).toMatchObject([{ uid: group.metadata.uid, controller: true }]);
    }
    expect(specOf(server, services)).toMatchObject({ clusterIP: "None", publishNotReadyAddresses: true });
    expect(specOf(server, podDisruptionBudgets)).toMatchObject({ minAvailable: 2 });
    await time.runFor(10);
    const { version } = server;
    let patches = 0;
    const { patch } = server;
    server.patch = (...args) => {
      patches += 1;
      return patch.apply(server, args);
    };
    const beside = made();
    expect(await beside.keep(wanted(1n), never)).toBe(true);
    expect(await beside.keep(wanted(1n), never)).toBe(true);
    expect([patches, server.version]).toEqual([0, version]);
  });

  test("B2: what is edited or deleted is as it was at the next look; what others add stays", async () => {
    const { time, server, wanted, made } = await begin();
    const beside = made();
    await beside.keep(wanted(1n), never);
    const edit = (resource: typeof services, change: unknown) =>
      server.patch(resource, "chat-abcde-0", NS, change, { type: "merge" }, never);
    await edit(services, { metadata: { labels: { team: "search" } }, spec: { selector: { app: "else" } } });
    await edit(podDisruptionBudgets, { spec: { minAvailable: 1 } });
    await time.runFor(10);
    await beside.keep(wanted(1n), never);
    expect(specOf(server, services).selector).toMatchObject({ [LABELS.group]: "chat-abcde-0" });
    expect(server.objects(services)[0]?.metadata.labels).toMatchObject({ team: "search" });
    expect(specOf(server, podDisruptionBudgets)).toMatchObject({ minAvailable: 2 });
    await server.delete(podDisruptionBudgets, "chat-abcde-0", NS, {}, never);
    await time.runFor(10);
    await made().keep(wanted(1n), never);
    expect(specOf(server, podDisruptionBudgets)).toMatchObject({ minAvailable: 2 });
  });

  test("B3: each incarnation has a PodGroup of its own; those of older ones go, also those another process made", async () => {
    const { time, server, group, wanted, made } = await begin();
    await made().keep(wanted(1n), never);
    await time.runFor(10);
    const next = made();
    await next.keep(wanted(2n), never);
    expect(server.objects(podGroups)).toHaveLength(2);
    expect(await next.sweep(group.metadata.uid ?? "", 2n, never)).toBe(true);
    expect(server.objects(podGroups).map(({ metadata }) => metadata.name)).toEqual(["chat-abcde-0-2"]);
  });

  test("what the server refuses is said with the object's name, and since when", async () => {
    let isRefused = true;
    const { time, wanted, made } = await begin((object) => {
      if (isRefused && object.kind === "PodDisruptionBudget")
        throw new KubeError(403, "Forbidden", "you may not patch poddisruptionbudgets");
    });
    const beside = made();
    const sinceMs = time.nowMs();
    expect(await beside.keep(wanted(1n), never)).toBe(false);
    await time.runFor(5_000);
    expect(await beside.keep(wanted(1n), never)).toBe(false);
    expect(beside.trouble?.sinceMs).toBe(sinceMs);
    expect(beside.trouble?.text).toContain("PodDisruptionBudget chat-abcde-0 is not written: you may not patch");
    isRefused = false;
    expect(await beside.keep(wanted(1n), never)).toBe(true);
    expect(beside.trouble).toBeUndefined();
  });

  test("a scheduler that cannot place the PodGroup is heard", async () => {
    const { time, server, group, wanted, made } = await begin();
    const beside = made();
    await beside.keep(wanted(1n), never);
    const uid = group.metadata.uid ?? "";
    expect(beside.unscheduled(uid, 1n)).toBeUndefined();
    const [object] = server.objects(podGroups);
    if (object === undefined) throw new Error("it is there");
    const said = { type: "PodGroupInitiallyScheduled", status: "False", reason: "Unschedulable" };
    const lastTransitionTime = "2026-11-25T21:03:21Z";
    const conditions = [{ ...said, message: "minCount (2) cannot be satisfied", lastTransitionTime }];
    await server.replaceStatus(podGroups, { ...object, status: { conditions } }, never);
    await time.runFor(10);
    expect(beside.unscheduled(uid, 1n)).toEqual({
      text: "PodGroup chat-abcde-0-1 is not scheduled: minCount (2) cannot be satisfied",
      sinceMs: Date.parse(lastTransitionTime),
    });
    expect(beside.unscheduled(uid, 2n)).toBeUndefined();
  });
});

describe("a group on a server with PodGroups", () => {
  test("its pods join the one of their incarnation, which goes with it", async () => {
    const bed = await Bed.create({ seed: 5, nodes: { n1: 1, n2: 1 }, groups: { a: 2 }, hasPodGroups: true });
    bed.start();
    await bed.time.runTill(() => bed.isServing("a"), "a serves", 60_000);
    const joined = () => bed.podsOf("a").map(({ spec }) => Object(spec).schedulingGroup?.podGroupName);
    const names = () => bed.server.objects(podGroups).map(({ metadata }) => metadata.name);
    expect([joined(), names()]).toEqual([["a-1", "a-1"], ["a-1"]]);
    const [worker] = bed.sim.workers;
    if (worker === undefined) throw new Error("it runs");
    bed.sim.crash(worker);
    const isNext = () => bed.isServing("a") && bed.recordOf("a").incarnation === 2n;
    await bed.time.runTill(isNext, "the next one serves", 60_000);
    expect([joined(), names()]).toEqual([["a-2", "a-2"], ["a-2"]]);
    bed.setGoal("a", { kind: "stop", graceMs: 1_000 });
    await bed.time.runTill(() => bed.told.get("a")?.phase === Phase.STOPPED, "it has stopped", 60_000);
    await bed.time.runTill(() => names().length === 0, "no PodGroup is left", 60_000);
    expect(bed.expectNothingWrong()).toEqual([]);
  });
});

// What gateways are told, from objects as a cluster has them.
import { expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { servedModelsOf } from "../../../../controller/kube/served/served-entries.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { Phase } from "../../../../proto/gen/muster/v1/control.ts";
import { deployment, group, NS, plan } from "./served-objects.ts";

function told(...objects: KubeObject[]) {
  const storeOf = (kind: string) => {
    const store = new Store();
    store.replace(
      objects.filter((object) => object.kind === kind),
      "1",
    );
    return store;
  };
  const [deployments, plans, groups] = ["ModelDeployment", "ShardPlan", "ReplicaGroup"].map(storeOf);
  if (!deployments || !plans || !groups) throw new Error("three kinds make three stores");
  return servedModelsOf({ deployments, plans, groups });
}

const since = "2026-11-02T10:00:05Z";
const serving = (leader = "10.244.0.7:7440") => ({
  phase: "Serving",
  leader,
  cause: { code: "serving", message: "", since },
  incarnation: 3,
  restarts: 2,
  numericsId: "cpu-avx512",
  readyRanks: 4,
  ranks: 4,
});

test("a replica that serves: everything that a gateway needs, from group, plan and deployment", () => {
  const [entry, ...others] = told(
    deployment("chat", {}, { planName: "chat-p1" }),
    plan("chat-p1", { revision: "abc", contextTokens: 4096 }),
    group("chat-g0", serving()),
  );
  expect(others).toEqual([]);
  const { model } = plan("x").spec as { model: { family: string; vocabSize: number; hasChatTemplate: boolean } };
  expect(entry).toMatchObject({
    name: "chat",
    aliases: [`${NS}/chat`],
    namespace: NS,
    deployment: "chat",
    replica: "chat-g0",
    revision: "abc",
    contextTokens: 4096,
    family: model.family,
    vocabSize: model.vocabSize,
    hasChatTemplate: model.hasChatTemplate,
    numericsId: "cpu-avx512",
    incarnation: 3n,
    leaderAddress: "10.244.0.7:7440",
    phase: Phase.SERVING,
    sinceUnixMs: BigInt(Date.parse(since)),
    readyRanks: 4,
    world: 4,
    restarts: 2,
    draining: false,
    createdUnixS: BigInt(Date.parse("2026-11-02T10:00:00Z") / 1000),
  });
});

test("a replica that starts has its phase, cause and bytes, and no leader", () => {
  const cause = { code: "loading", message: "1.2 GB of 9.0 GB", since };
  const [entry] = told(
    deployment("chat"),
    group("chat-g0", { phase: "Loading", cause, bytesLoaded: 12, bytesTotal: 90 }),
  );
  expect(entry).toMatchObject({
    phase: Phase.LOADING,
    cause: "1.2 GB of 9.0 GB",
    bytesLoaded: 12n,
    bytesTotal: 90n,
    leaderAddress: "",
    revision: "",
  });
  expect(told(deployment("chat"), group("chat-g0"))[0]).toMatchObject({ phase: Phase.SCHEDULING, replica: "chat-g0" });
});

test("E1: a deployment without a replica says its own phase and cause, and what its plan says of the model", () => {
  const cause = { code: "asleep", message: "nothing is asked for", since };
  const asleep = deployment(
    "chat",
    { autoscale: { min: 0, max: 2 } },
    { phase: "Stopped", cause, planName: "chat-p1" },
  );
  const [entry] = told(asleep, plan("chat-p1", { revision: "abc" }));
  expect(entry).toMatchObject({ replica: "", phase: Phase.STOPPED, cause: "nothing is asked for", revision: "abc" });
  expect(entry?.deployment).toBe("chat");
  expect(told(deployment("new"))[0]).toMatchObject({ replica: "", phase: Phase.SCHEDULING, cause: "", revision: "" });
});

test("E3: nobody is told of demand for what a person has scaled to zero, or is being deleted", () => {
  expect(told(deployment("chat", { replicas: 0 }))[0]?.deployment).toBe("");
  expect(told(deployment("chat", { replicas: 0, autoscale: { min: 0, max: 1 } }))[0]?.deployment).toBe("chat");
  const leaving = deployment("chat");
  const gone = { ...leaving, metadata: { ...leaving.metadata, deletionTimestamp: "2026-11-02T11:00:00Z" } };
  expect(told(gone)).toEqual([]);
  expect(told(gone, group("chat-g0", serving())).map((one) => [one.replica, one.deployment])).toEqual([
    ["chat-g0", ""],
  ]);
});

test("E2: the wanted revision comes first, what drains last; only draining ones leave the deployment's own entry", () => {
  const objects = [
    group("chat-g0", serving("a:1"), { plan: "chat-p0", ordinal: 0 }),
    group("chat-g1", serving("b:1"), { plan: "chat-p0", ordinal: 1, state: "Draining" }),
    group("chat-g2", serving("c:1"), { plan: "chat-p1", ordinal: 2, isLeaving: true }),
    group("chat-g3", serving("d:1"), { plan: "chat-p1", ordinal: 3 }),
  ];
  const all = told(deployment("chat", {}, { planName: "chat-p1" }), ...objects);
  expect(all.map(({ replica, draining }) => [replica, draining])).toEqual([
    ["chat-g3", false],
    ["chat-g0", false],
    ["chat-g1", true],
    ["chat-g2", true],
  ]);
  const going = told(deployment("chat"), ...objects.slice(1, 3));
  expect(going.map(({ replica }) => replica)).toEqual(["", "chat-g1", "chat-g2"]);
});

test("replicas of a DraftPool are nobody's model; namespaces keep apart; a group outlives its deployment's object", () => {
  const all = told(
    deployment("chat"),
    deployment("chat", {}, {}, "other"),
    group("chat-d0", serving(), { kind: "DraftPool" }),
    group("orphan-g0", serving(), { owner: "orphan" }),
  );
  expect(all.map(({ aliases, replica }) => [aliases[0], replica])).toEqual([
    [`${NS}/chat`, ""],
    ["other/chat", ""],
    [`${NS}/orphan`, "orphan-g0"],
  ]);
});

test("a plan that this gateway cannot read costs figures, not the replica: its revision is in the group's record", () => {
  const record = { incarnation: 3, revision: "abc", begun: true, failures: [], restarts: 0 };
  const unreadable = { ...plan("chat-p1"), spec: { of: "a newer controller" } };
  const [entry] = told(deployment("chat"), unreadable, group("chat-g0", { ...serving(), record }));
  expect(entry).toMatchObject({ revision: "abc", contextTokens: 0, leaderAddress: "10.244.0.7:7440" });
});

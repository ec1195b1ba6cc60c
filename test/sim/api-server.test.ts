import { describe, expect, test } from "vitest";
import { isConflict, KubeError } from "../../controller/kube/api/client.ts";
import { configMaps, leases, modelDeployments, nodes, pods } from "../../controller/kube/api/resources.ts";
import { isRecord } from "../../controller/kube/api/wire.ts";
import type { SimApiServer } from "./api-server.ts";
import { begin, deploymentOf, failureOf, mapOf, NS, podOf, signal } from "./beds.ts";

describe("objects", () => {
  test("a new one has uid, version, time and generation 1; its status is the server's to begin", async () => {
    const { server } = begin();
    const pod = await server.create(pods, podOf("a", { status: { phase: "Running" } }), signal);
    expect(pod.metadata).toMatchObject({ name: "a", generation: 1, creationTimestamp: "2026-01-01T00:00:00Z" });
    expect(pod.status).toEqual({ phase: "Pending" });
    expect(await server.get(pods, "a", NS, signal)).toBe(pod);
    expect(await server.get(pods, "b", NS, signal)).toBeUndefined();
    expect((await failureOf(server.create(pods, podOf("a"), signal))).reason).toBe("AlreadyExists");
  });

  test("O2: what is handed out cannot be changed, what is handed in is copied", async () => {
    const { server } = begin();
    const labels: Record<string, string> = { app: "x" };
    const pod = await server.create(pods, podOf("a", {}, labels), signal);
    labels.app = "y";
    expect(pod.metadata.labels).toEqual({ app: "x" });
    expect(() => Object.assign(pod.metadata, { name: "z" })).toThrow(TypeError);
  });

  test("a stale version is 409, no version overwrites, the same again makes no version (S2)", async () => {
    const { server } = begin();
    const first = await server.create(configMaps, mapOf("c", { a: "1" }), signal);
    const second = await server.replace(configMaps, { ...first, data: { a: "2" } }, signal);
    expect(isConflict(await failureOf(server.replace(configMaps, { ...first, data: { a: "3" } }, signal)))).toBe(true);
    const same = await server.replace(configMaps, { ...second, data: { a: "2" } }, signal);
    expect(same.metadata.resourceVersion).toBe(second.metadata.resourceVersion);
    const last = await server.replace(configMaps, mapOf("c", { a: "4" }), signal);
    expect(last.data).toEqual({ a: "4" });
    expect(last.metadata.uid).toBe(first.metadata.uid);
  });

  test("status and spec are written apart; only the spec counts generations", async () => {
    const { server } = begin();
    const made = await server.create(modelDeployments, deploymentOf({ replicas: 1 }), signal);
    const told = await server.replaceStatus(
      modelDeployments,
      { ...made, spec: { replicas: 9 }, status: { ready: 1 } },
      signal,
    );
    expect(told).toMatchObject({ spec: { replicas: 1 }, status: { ready: 1 }, metadata: { generation: 1 } });
    const scaled = await server.replace(
      modelDeployments,
      { ...told, spec: { replicas: 2 }, status: { ready: 7 } },
      signal,
    );
    expect(scaled).toMatchObject({ spec: { replicas: 2 }, status: { ready: 1 }, metadata: { generation: 2 } });
    const noStatus = server.replaceStatus(
      leases,
      { ...mapOf("l", {}), apiVersion: "coordination.k8s.io/v1", kind: "Lease" },
      signal,
    );
    expect((await failureOf(noStatus)).code).toBe(404);
  });

  test("a kind that is not served is 404, a wrong kind 400, a bad name 422", async () => {
    const { server } = begin({ kinds: [] });
    expect((await failureOf(server.get(pods, "a", NS, signal))).code).toBe(404);
    expect(await server.serves(pods, signal)).toBe(false);
    const whole = begin().server;
    expect((await failureOf(whole.create(nodes, podOf("a"), signal))).code).toBe(400);
    expect((await failureOf(whole.create(pods, podOf("A_b"), signal))).code).toBe(422);
  });

  test("dry run answers and stores nothing; admit may refuse", async () => {
    const { server } = begin({
      admit: (object) => {
        if (object.metadata.name === "no") throw new KubeError(422, "Invalid", "spec: no");
      },
    });
    expect((await server.create(pods, podOf("a"), signal, { dryRun: true })).metadata.name).toBe("a");
    expect(server.objects(pods)).toEqual([]);
    expect((await failureOf(server.create(pods, podOf("no"), signal, { dryRun: true }))).message).toContain("spec: no");
  });
});

describe("patches", () => {
  test("JSON patch: a failing test is 422 and changes nothing, a stale version 409", async () => {
    const { server } = begin();
    const map = await server.create(configMaps, mapOf("c", { a: "1" }), signal);
    const json = (body: unknown) => server.patch(configMaps, "c", NS, body, { type: "json" }, signal);
    const bad = [
      { op: "replace", path: "/data/a", value: "2" },
      { op: "test", path: "/metadata/resourceVersion", value: "1" },
    ];
    expect((await failureOf(json(bad))).code).toBe(422);
    expect(server.objects(configMaps)).toEqual([map]);
    expect((await failureOf(json([{ op: "replace", path: "/metadata/resourceVersion", value: "1" }]))).code).toBe(409);
    const good = [
      { op: "test", path: "/metadata/resourceVersion", value: map.metadata.resourceVersion },
      { op: "add", path: "/metadata/labels", value: { "a/b": "x" } },
      { op: "remove", path: "/metadata/labels/a~1b" },
      { op: "add", path: "/data/list", value: ["p"] },
      { op: "add", path: "/data/list/-", value: "q" },
      { op: "move", from: "/data/a", path: "/data/z" },
    ];
    expect((await json(good)).data).toEqual({ list: ["p", "q"], z: "1" });
  });

  test("merge patch: null takes away, lists are replaced", async () => {
    const { server } = begin();
    await server.create(configMaps, mapOf("c", { a: "1", b: ["x", "y"], c: { d: 1, e: 2 } }), signal);
    const body = { data: { a: null, b: ["z"], c: { d: null } } };
    const patched = await server.patch(configMaps, "c", NS, body, { type: "merge" }, signal);
    expect(patched.data).toEqual({ b: ["z"], c: { e: 2 } });
  });

  test("a pod's spec may not change, but for gates that go, affinity while gated, and being bound once", async () => {
    const { server } = begin();
    const gated = { containers: [{ name: "w" }], schedulingGates: [{ name: "muster.dev/gang" }] };
    await server.create(pods, podOf("a", { spec: gated }), signal);
    const merge = (spec: unknown) => server.patch(pods, "a", NS, { spec }, { type: "merge" }, signal);
    expect((await failureOf(merge({ containers: [] }))).code).toBe(422);
    expect((await failureOf(merge({ nodeName: "n1" }))).message).toContain("gated");
    expect((await failureOf(merge({ schedulingGates: [{ name: "x" }] }))).code).toBe(422);
    await merge({ affinity: { nodeAffinity: {} }, schedulingGates: null });
    expect((await failureOf(merge({ affinity: null }))).code).toBe(422);
    await merge({ nodeName: "n1" });
    expect((await failureOf(merge({ nodeName: "n2" }))).message).toContain("bound");
  });
});

describe("apply", () => {
  const apply = (server: SimApiServer, spec: unknown, fieldManager = "muster", force = false) =>
    server.patch(modelDeployments, "m", NS, deploymentOf(spec), { type: "apply", fieldManager, force }, signal);

  test("F1, F3: what an applier leaves out goes, the same again changes nothing", async () => {
    const { server } = begin();
    const first = await apply(server, { a: 1, b: { c: 2 } });
    expect((await apply(server, { a: 1, b: { c: 2 } })).metadata.resourceVersion).toBe(first.metadata.resourceVersion);
    expect((await apply(server, { a: 1 })).spec).toEqual({ a: 1 });
  });

  test("F2: fields of others conflict by name; force takes them; equal values are shared", async () => {
    const { server } = begin();
    await apply(server, { a: 1, b: 2 }, "helm");
    await apply(server, { a: 1 });
    const error = await failureOf(apply(server, { a: 1, b: 3 }));
    expect(isConflict(error) && error.message).toContain('conflict with "helm": .spec.b');
    expect((await apply(server, { b: 3 }, "muster", true)).spec).toEqual({ a: 1, b: 3 });
    expect((await apply(server, {}, "helm")).spec).toEqual({ b: 3 });
  });

  test("F4: a plain write takes the field it changes", async () => {
    const { server } = begin();
    await apply(server, { a: 1, b: 2 });
    await server.patch(
      modelDeployments,
      "m",
      NS,
      { spec: { a: 5 } },
      { type: "merge", fieldManager: "kubectl" },
      signal,
    );
    expect((await failureOf(apply(server, { a: 1, b: 2 }))).message).toContain("kubectl (update)");
    expect((await apply(server, { b: 2 })).spec).toEqual({ a: 5, b: 2 });
  });

  test("list items are owned by their key", async () => {
    const { server } = begin();
    const applyPod = (env: unknown, manager: string) => {
      const pod = podOf("a", { spec: { containers: [{ name: "w", env }] } });
      return server.patch(
        pods,
        "a",
        NS,
        pod,
        { type: "apply", fieldManager: manager, force: false, dryRun: true },
        signal,
      );
    };
    await server.patch(
      pods,
      "a",
      NS,
      podOf("a", { spec: { containers: [{ name: "w", env: [{ name: "A", value: "1" }] }] } }),
      { type: "apply", fieldManager: "one" },
      signal,
    );
    const error = await failureOf(applyPod([{ name: "A", value: "2" }], "two"));
    expect(error.message).toContain(".spec.containers.[name=w].env.[name=A].value");
  });

  test("the status is applied apart and its owner is another", async () => {
    const { server } = begin();
    await apply(server, { a: 1 });
    const body = { ...deploymentOf({ a: 9 }), status: { conditions: [{ type: "Serving", status: "True" }] } };
    const options = { type: "apply", fieldManager: "muster", subresource: "status" } as const;
    const told = await server.patch(modelDeployments, "m", NS, body, options, signal);
    expect(told).toMatchObject({ spec: { a: 1 }, status: { conditions: [{ type: "Serving" }] } });
    expect((await apply(server, { a: 1 })).status).toEqual(told.status);
  });
});

describe("ends", () => {
  test("a bound pod is given its grace, then whoever runs it takes it away", async () => {
    const { server } = begin();
    await server.create(pods, podOf("a"), signal);
    await server.patch(pods, "a", NS, { spec: { nodeName: "n" } }, { type: "merge" }, signal);
    await server.delete(pods, "a", NS, {}, signal);
    const [pod] = server.objects(pods);
    expect(pod?.metadata).toMatchObject({ deletionTimestamp: "2026-01-01T00:00:30Z", deletionGracePeriodSeconds: 30 });
    await server.delete(pods, "a", NS, { gracePeriodSeconds: 0 }, signal);
    expect(server.objects(pods)).toEqual([]);
    expect(await server.delete(pods, "a", NS, {}, signal)).toBe(false);
  });

  test("preconditions: another uid or version is 409", async () => {
    const { server } = begin();
    const pod = await server.create(pods, podOf("a"), signal);
    expect((await failureOf(server.delete(pods, "a", NS, { preconditions: { uid: "x" } }, signal))).code).toBe(409);
    const { uid, resourceVersion } = pod.metadata;
    const preconditions = { ...(uid ? { uid } : {}), ...(resourceVersion ? { resourceVersion } : {}) };
    expect(await server.delete(pods, "a", NS, { preconditions }, signal)).toBe(true);
  });

  test("finalizers hold an object until the last is gone", async () => {
    const { server } = begin();
    await server.create(configMaps, mapOf("c", {}, { finalizers: ["muster.dev/x"] }), signal);
    await server.delete(configMaps, "c", NS, {}, signal);
    expect(server.objects(configMaps)).toHaveLength(1);
    await server.patch(configMaps, "c", NS, { metadata: { finalizers: null } }, { type: "merge" }, signal);
    expect(server.objects(configMaps)).toEqual([]);
  });

  async function family(server: SimApiServer) {
    const owner = await server.create(modelDeployments, deploymentOf({}), signal);
    const ownerReferences = [
      {
        apiVersion: owner.apiVersion,
        kind: owner.kind,
        name: "m",
        uid: owner.metadata.uid ?? "",
        blockOwnerDeletion: true,
      },
    ];
    const child = await server.create(configMaps, mapOf("child", {}, { ownerReferences }), signal);
    const grandchild = mapOf(
      "grandchild",
      {},
      {
        ownerReferences: [{ apiVersion: "v1", kind: "ConfigMap", name: "child", uid: child.metadata.uid ?? "" }],
      },
    );
    await server.create(configMaps, grandchild, signal);
  }

  test("G1: what nobody owns any more goes, down the line, and what never had a living owner too", async () => {
    const { server, time } = begin();
    await family(server);
    const stray = [{ apiVersion: "v1", kind: "ConfigMap", name: "x", uid: "gone" }];
    await server.create(configMaps, mapOf("stray", {}, { ownerReferences: stray }), signal);
    await time.runFor(1_000);
    expect(server.objects(configMaps).map(({ metadata }) => metadata.name)).toEqual(["child", "grandchild"]);
    await server.delete(modelDeployments, "m", NS, {}, signal);
    expect(server.objects(modelDeployments)).toEqual([]);
    await time.runFor(1_000);
    expect(server.objects(configMaps)).toEqual([]);
  });

  test("G2: in the foreground the owner goes last; orphans stay", async () => {
    const { server, time } = begin();
    await family(server);
    const order: string[] = [];
    server.onChange(({ after, object }) => {
      if (after === undefined) order.push(object.metadata.name);
    });
    await server.delete(modelDeployments, "m", NS, { propagationPolicy: "Foreground" }, signal);
    expect(server.objects(modelDeployments)).toHaveLength(1);
    await time.runFor(2_000);
    expect(order.slice(-1)).toEqual(["m"]);
    expect(order.sort()).toEqual(["child", "grandchild", "m"]);

    const other = begin();
    await family(other.server);
    await other.server.delete(modelDeployments, "m", NS, { propagationPolicy: "Orphan" }, signal);
    await other.time.runFor(2_000);
    expect(other.server.objects(modelDeployments)).toEqual([]);
    expect(other.server.objects(configMaps).map(({ metadata }) => metadata.ownerReferences ?? [])).toMatchObject([
      [],
      [{}],
    ]);
  });

  test("a new object of an old name is another: its uid says so", async () => {
    const { server } = begin();
    const one = await server.create(pods, podOf("a"), signal);
    await server.delete(pods, "a", NS, {}, signal);
    const two = await server.create(pods, podOf("a"), signal);
    expect(two.metadata.uid).not.toBe(one.metadata.uid);
    expect(isRecord(two.spec)).toBe(true);
  });
});

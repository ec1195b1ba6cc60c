// The simulated API server against the real one: the same operations through the same client, the answers compared. And the
// client's own parts (reflector, lease, events, rotation of sockets) against the real one.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { applyOwned, FIELD_MANAGER, ownerReferenceTo, patchSeen } from "../../../../controller/kube/api/apply.ts";
import { type KubeApi, KubeError, type KubeObject, type WatchLine } from "../../../../controller/kube/api/client.ts";
import { systemClock } from "../../../../controller/kube/api/clock.ts";
import { Connections } from "../../../../controller/kube/api/connections.ts";
import { kubeconfigCredentials } from "../../../../controller/kube/api/credentials.ts";
import { HttpKubeApi } from "../../../../controller/kube/api/http-api.ts";
import { configMaps, events, leases, namespaces, podGroups, pods } from "../../../../controller/kube/api/resources.ts";
import { isRecord, objectOf } from "../../../../controller/kube/api/wire.ts";
import { LeaderElector } from "../../../../controller/kube/lease/lease.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { EventRecorder } from "../../../../controller/kube/status/events.ts";
import { Reflector } from "../../../../controller/kube/watch/reflector.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { BUILD_TIMEOUT_MS, whyNoControlPlane } from "../../../cluster/controlplane/binary.ts";
import { type ControlPlane, startControlPlane } from "../../../cluster/controlplane/start.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { realTime } from "../../../sim/virtual-time.ts";
import { until } from "../../../until.ts";
import { mapOf, NS } from "../beds.ts";

const { signal } = new AbortController();
const START_MS_MAX = 60_000;
const why = whyNoControlPlane();
const title = (name: string) => (why === undefined ? name : `${name} (skipped: ${why})`);
if (why !== undefined) process.stdout.write(`tests against a real API server are skipped: ${why}\n`);

const podOf = (name: string, spec: Record<string, unknown> = {}): KubeObject => ({
  apiVersion: "v1",
  kind: "Pod",
  metadata: { name, namespace: NS },
  spec: { containers: [{ name: "w", image: "none" }], schedulingGates: [{ name: "muster.dev/gang" }], ...spec },
});

/** What both servers must agree on: the code and reason of a failure, or what `look` takes from the answer. */
async function outcome(
  call: Promise<unknown>,
  look: (answer: KubeObject) => unknown = ({ data }) => data,
): Promise<unknown> {
  try {
    const answer = await call;
    return isRecord(answer) && "metadata" in answer ? look(objectOf(answer, configMaps)) : answer;
  } catch (error) {
    if (!(error instanceof KubeError)) throw error;
    return `${error.code} ${error.reason}`;
  }
}

/** The script: each line is one thing that the controller relies on. */
async function play(api: KubeApi): Promise<Record<string, unknown>> {
  const seen: Record<string, unknown> = {};
  const merge = (body: unknown, fieldManager = "kubectl") =>
    api.patch(configMaps, "c", NS, body, { type: "merge", fieldManager }, signal);
  const apply = (data: Record<string, string>, fieldManager: string, force = false) =>
    api.patch(configMaps, "s", NS, mapOf("s", data), { type: "apply", fieldManager, force }, signal);

  const made = await api.create(configMaps, mapOf("c", { a: "1" }), signal);
  seen.createAgain = await outcome(api.create(configMaps, mapOf("c"), signal));
  seen.createVersioned = await outcome(
    api.create(configMaps, { ...made, metadata: { ...made.metadata, name: "v" } }, signal),
  );
  seen.badName = await outcome(api.create(configMaps, mapOf("A_b"), signal));
  seen.absent = await outcome(api.get(configMaps, "none", NS, signal));
  seen.absentPatch = await outcome(api.patch(configMaps, "none", NS, {}, { type: "merge" }, signal));
  const next = await api.replace(configMaps, { ...made, data: { a: "2" } }, signal);
  seen.stale = await outcome(api.replace(configMaps, { ...made, data: { a: "3" } }, signal));
  seen.otherUid = await outcome(
    api.replace(
      configMaps,
      { ...next, metadata: { ...next.metadata, uid: "00000000-0000-4000-8000-00000000ffff" } },
      signal,
    ),
  );
  const same = await api.replace(configMaps, next, signal);
  seen.sameVersion = same.metadata.resourceVersion === next.metadata.resourceVersion;
  seen.merged = await outcome(merge({ data: { a: null, b: "x" } }));
  const json = (operations: unknown) => api.patch(configMaps, "c", NS, operations, { type: "json" }, signal);
  seen.jsonTest = await outcome(json([{ op: "test", path: "/data/b", value: "no" }]));
  seen.jsonVersionTest = await outcome(json([{ op: "test", path: "/metadata/resourceVersion", value: "1" }]));
  seen.jsonVersion = await outcome(json([{ op: "replace", path: "/metadata/resourceVersion", value: "1" }]));
  seen.patchSeenStale = await outcome(patchSeen(api, configMaps, made, { operations: [], signal }));
  seen.mergeStale = await outcome(merge({ metadata: { resourceVersion: "1" }, data: { z: "1" } }));

  seen.applied = await outcome(apply({ a: "1", b: "2" }, "helm"));
  seen.applyEqual = await outcome(apply({ a: "1" }, FIELD_MANAGER));
  seen.applyConflict = await outcome(apply({ a: "1", b: "9" }, FIELD_MANAGER));
  seen.applyForced = await outcome(apply({ a: "1", b: "9" }, FIELD_MANAGER, true));
  seen.applyLess = await outcome(apply({ a: "1" }, FIELD_MANAGER));
  seen.applyOthersLess = await outcome(apply({}, "helm"));
  seen.applyNoManager = await outcome(api.patch(configMaps, "s", NS, mapOf("s"), { type: "apply" }, signal));
  seen.applyDry = await outcome(applyOwned(api, configMaps, mapOf("dry", { a: "1" }), { signal, dryRun: true }));
  seen.dryIsAbsent = await outcome(api.get(configMaps, "dry", NS, signal));

  const wrongUid = { preconditions: { uid: "00000000-0000-4000-8000-00000000ffff" } };
  seen.deleteOther = await outcome(api.delete(configMaps, "c", NS, wrongUid, signal));
  seen.deleted = await outcome(api.delete(configMaps, "c", NS, {}, signal));
  seen.deletedAgain = await outcome(api.delete(configMaps, "c", NS, {}, signal));
  seen.noStatus = await outcome(api.replaceStatus(configMaps, mapOf("s"), signal));
  seen.notServed = await outcome(api.get({ ...pods, plural: "nothings" }, "x", NS, signal));
  return seen;
}

async function playPods(api: KubeApi): Promise<Record<string, unknown>> {
  const seen: Record<string, unknown> = {};
  const facts = ({ metadata, status }: KubeObject) => [
    metadata.generation,
    isRecord(status) ? status.phase : undefined,
  ];
  const merge = (spec: unknown) => api.patch(pods, "p", NS, { spec }, { type: "merge" }, signal);
  seen.created = await outcome(api.create(pods, podOf("p"), signal), facts);
  const pod = await api.get(pods, "p", NS, signal);
  if (pod === undefined) throw new Error("the pod is there");
  seen.status = await outcome(
    api.replaceStatus(
      pods,
      { ...pod, spec: {}, status: { ...(isRecord(pod.status) ? pod.status : {}), phase: "Running" } },
      signal,
    ),
    facts,
  );
  seen.gateAdded = await outcome(merge({ schedulingGates: [{ name: "muster.dev/gang" }, { name: "x.dev/y" }] }), facts);
  seen.imageless = await outcome(merge({ hostname: "other" }), facts);
  seen.boundWhileGated = await outcome(merge({ nodeName: "n1" }), facts);
  const affinity = {
    nodeAffinity: {
      requiredDuringSchedulingIgnoredDuringExecution: {
        nodeSelectorTerms: [{ matchFields: [{ key: "metadata.name", operator: "In", values: ["n1"] }] }],
      },
    },
  };
  const live = await api.get(pods, "p", NS, signal);
  if (live === undefined) throw new Error("the pod is there");
  const open = [
    { op: "remove", path: "/spec/schedulingGates" },
    { op: "add", path: "/spec/affinity", value: affinity },
  ] as const;
  seen.opened = await outcome(patchSeen(api, pods, live, { operations: open, signal }), (answer) => {
    const spec = isRecord(answer.spec) ? answer.spec : {};
    return [answer.metadata.generation, spec.schedulingGates ?? "none", spec.affinity];
  });
  seen.affinityUngated = await outcome(merge({ affinity: null }), facts);
  seen.deleted = await outcome(api.delete(pods, "p", NS, {}, signal));
  seen.goneAtOnce = await outcome(api.get(pods, "p", NS, signal));
  return seen;
}

async function playWatch(api: KubeApi): Promise<unknown[]> {
  const { resourceVersion } = await api.list(configMaps, { namespace: NS }, signal);
  for (const name of ["w1", "w2", "w3"])
    await api.create(configMaps, mapOf(name, {}, { app: name === "w2" ? "no" : "yes" }), signal);
  const label = (name: string, app: string) =>
    api.patch(configMaps, name, NS, { metadata: { labels: { app } } }, { type: "merge" }, signal);
  await label("w2", "yes");
  await label("w1", "no");
  await api.delete(configMaps, "w3", NS, {}, signal);
  const lines: unknown[] = [];
  const options = { namespace: NS, labelSelector: "app=yes", resourceVersion, timeoutSeconds: 2 };
  for await (const line of api.watch(configMaps, options, signal))
    if ("object" in line) lines.push(`${line.type} ${line.object.metadata.name}`);
  const first = await api.list(configMaps, { namespace: NS, limit: 1 }, signal);
  const second = await api.list(configMaps, { namespace: NS, limit: 100, continue: first.continue }, signal);
  const paged = [...first.items, ...second.items].filter(({ metadata }) => metadata.name.startsWith("w"));
  lines.push(
    paged.map(({ kind, apiVersion, metadata }) => `${apiVersion} ${kind} ${metadata.name}`),
    first.continue !== "",
    second.continue,
  );
  return lines;
}

describe.skipIf(why !== undefined)(title("a real API server"), () => {
  let plane: ControlPlane;
  let connections: Connections;
  let api: HttpKubeApi;
  const sim = new SimApiServer(realTime);

  beforeAll(async () => {
    plane = await startControlPlane({
      dir: mkdtempSync(join(tmpdir(), "muster-kube-")),
      featureGates: { GenericWorkload: true },
    });
    connections = new Connections(kubeconfigCredentials({ path: plane.kubeconfig }));
    api = new HttpKubeApi({ connections });
    await api.create(namespaces, { apiVersion: "v1", kind: "Namespace", metadata: { name: NS } }, signal);
    await until(async () => {
      const accounts = { ...pods, plural: "serviceaccounts", kind: "ServiceAccount" };
      return (await api.get(accounts, "default", NS, signal)) !== undefined;
    }, "the service account of the namespace exists");
  }, BUILD_TIMEOUT_MS + START_MS_MAX);
  afterAll(async () => {
    await connections?.close();
    await plane?.stop();
  });

  test("objects, versions, patches and applies: the simulated one answers the same", async () => {
    expect(await play(sim)).toEqual(await play(api));
  });

  test("pods: the simulated one answers the same", async () => {
    expect(await playPods(sim)).toEqual(await playPods(api));
  });

  test("watches of a selection and pages: the simulated one answers the same", async () => {
    expect(await playWatch(sim)).toEqual(await playWatch(api));
  });

  test("what is served is found out", async () => {
    expect(await api.serves(podGroups, signal)).toBe(true);
    expect(await api.serves({ ...podGroups, version: "v7" }, signal)).toBe(false);
    expect(await api.serves({ ...podGroups, plural: "crowds" }, signal)).toBe(false);
  });

  test("a lease, its times and an event are as the server wants them", async () => {
    const stop = new AbortController();
    const one = { api, clock: systemClock, random: Math.random, namespace: NS, name: "muster" };
    const ended = new LeaderElector({ ...one, identity: "a" }).lead(async (term) => {
      expect(term.isHeld()).toBe(true);
      const recorder = new EventRecorder({ ...one, controller: "muster.dev/controller", instance: "a" });
      const running = recorder.run(stop.signal);
      const lease = await api.get(leases, "muster", NS, signal);
      if (lease === undefined) throw new Error("the lease is there");
      recorder.record(lease, { type: "Normal", reason: "Led", action: "Lead", note: "once" });
      await until(
        async () => (await api.list(events, { namespace: NS }, signal)).items.some(({ note }) => note === "once"),
        "the event is there",
      );
      stop.abort();
      await running;
    }, signal);
    expect(await ended).toBe("done");
    const lease = await api.get(leases, "muster", NS, signal);
    expect(lease?.spec).toMatchObject({ leaseTransitions: 0, leaseDurationSeconds: 1 });
  });

  test("an owner that goes takes what it owns with it", async () => {
    const owner = await api.create(configMaps, mapOf("owner"), signal);
    const child = mapOf("child");
    await applyOwned(
      api,
      configMaps,
      { ...child, metadata: { ...child.metadata, ownerReferences: [ownerReferenceTo(owner)] } },
      { signal },
    );
    await api.delete(configMaps, "owner", NS, {}, signal);
    await until(async () => (await api.get(configMaps, "child", NS, signal)) === undefined, "the child has gone");
  });

  test("a reflector goes on over a killed API server", async () => {
    const store = new Store();
    const metrics = new KubeMetrics();
    const stop = new AbortController();
    const reflector = new Reflector({
      api,
      resource: configMaps,
      namespace: NS,
      store,
      clock: systemClock,
      random: Math.random,
      limits: { pageSize: 2, backoff: { baseMs: 100, maxMs: 1_000 } },
      metrics,
    });
    const running = reflector.run(stop.signal);
    await store.synced(signal);
    await plane.killApiServer();
    await until(() => reflector.trouble !== undefined, "the loss is noticed");
    await plane.restartApiServer();
    await until(
      async () => {
        const made = await api.create(configMaps, mapOf("after"), signal).catch((error: unknown) => error);
        return !(made instanceof KubeError) || made.reason === "AlreadyExists";
      },
      "it can be written to again",
      60_000,
    );
    await until(() => store.get(`${NS}/after`) !== undefined, "what came after is seen", 60_000);
    const truth = await api.list(configMaps, { namespace: NS }, signal);
    expect([...store.all()].map(({ metadata }) => metadata.name).sort()).toEqual(
      truth.items.map(({ metadata }) => metadata.name).sort(),
    );
    expect(metrics.total("muster_kube_lists_total")).toBe(1);
    stop.abort();
    await running;
  }, 120_000);

  test("a watch from a version that is yet to come is silent, on both: the reflector must not take that for peace", async () => {
    const look = async (server: KubeApi): Promise<WatchLine[]> => {
      const lines: WatchLine[] = [];
      const options = { resourceVersion: "999999999", timeoutSeconds: 3 };
      for await (const line of server.watch(configMaps, options, signal)) lines.push(line);
      return lines;
    };
    expect(await look(api)).toEqual([]);
    expect(await look(sim)).toEqual([]);
  });
});

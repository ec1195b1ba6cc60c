// The command itself, as a process, against the simulated API server behind a real socket: planning happens in its thread.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { afterEach, expect, test } from "vitest";
import { parseModelDeployment, parseShardPlan } from "../../../controller/api/parse.ts";
import * as kinds from "../../../controller/kube/api/resources.ts";
import { SimApiServer } from "../../sim/api-server.ts";
import { SimHttpServer } from "../../sim/http-server.ts";
import { realTime } from "../../sim/virtual-time.ts";

const { signal } = new AbortController();
const RESOURCES = Object.values(kinds).filter((kind) => typeof kind !== "string");
const MODULE = new URL("../../../controller/cli/controller.ts", import.meta.url).href;
const SCRIPT = `const { controllerCommand } = await import(${JSON.stringify(MODULE)}); await controllerCommand().parseAsync();`;
const KINDS = new URL("../../../controller/kube/api/resources.ts", import.meta.url).href;
/** More than a controller has under way at a time. */
const CALLS_HELD = 64;
const GPU_NODE = {
  apiVersion: "v1",
  kind: "Node",
  metadata: { name: "gpu-1", labels: { "nvidia.com/gpu.product": "NVIDIA-H200" } },
};
const GPU_STATUS = {
  allocatable: { "nvidia.com/gpu": "8" },
  conditions: [{ type: "Ready", status: "True" }],
};

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const clean of cleanups.splice(0).toReversed()) await clean();
});

async function begin(
  resources: readonly (typeof RESOURCES)[number][],
  flags: readonly string[] = [],
  { script = SCRIPT, intercept = () => false }: { script?: string; intercept?: (url: string) => boolean } = {},
) {
  const api = new SimApiServer(realTime);
  const http = await SimHttpServer.listen(api, { resources, intercept: ({ url = "" }) => intercept(url) });
  cleanups.push(() => http.close());
  const folder = await mkdtemp(join(tmpdir(), "muster-controller-"));
  cleanups.push(() => rm(folder, { recursive: true, force: true }));
  const kubeconfig = join(folder, "config.json");
  const config = {
    apiVersion: "v1",
    kind: "Config",
    clusters: [{ name: "sim", cluster: { server: http.url } }],
    users: [{ name: "me", user: { token: "t" } }],
    contexts: [{ name: "sim", context: { cluster: "sim", user: "me", namespace: "serving" } }],
    "current-context": "sim",
  };
  await writeFile(kubeconfig, JSON.stringify(config));
  const args = [
    "--input-type=module",
    "-e",
    script,
    "--",
    "--kubeconfig",
    kubeconfig,
    "--worker-image",
    "worker@sha256:0",
    ...flags,
  ];
  const child = spawn(process.execPath, args, { stdio: ["ignore", "ignore", "pipe"] });
  cleanups.push(() => child.kill("SIGKILL"));
  return { api, child };
}

async function endOf(child: ChildProcess): Promise<{ code: unknown; stderr: string }> {
  const said = child.stderr === null ? Promise.resolve("") : text(child.stderr);
  const [code] = await once(child, "exit");
  return { code, stderr: await said };
}

async function till<T>(look: () => T | undefined): Promise<T> {
  for (let tries = 0; tries < 600; tries++) {
    const found = look();
    if (found !== undefined) return found;
    await new Promise((done) => setTimeout(done, 50));
  }
  throw new Error("waited 30 s in vain");
}

test("plans a real model in its thread, makes the groups, and gives the lease back when asked to end", async () => {
  const { api, child } = await begin(RESOURCES, ["--lease-seconds", "6"]);
  const node = await api.create(kinds.nodes, GPU_NODE, signal);
  await api.replaceStatus(kinds.nodes, { ...node, status: GPU_STATUS }, signal);
  const metadata = { name: "chat", namespace: "serving" };
  const spec = {
    model: { source: "builtin://nano-maverick" },
    gpu: { count: 4 },
    parallelism: { tp: 4, ep: 2, etp: 2 },
  };
  const wish = { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment", metadata, spec };
  const ended = endOf(child);
  await api.create(kinds.modelDeployments, wish, signal);
  const group = await till(() => api.objects(kinds.replicaGroups)[0]);
  expect(api.objects(kinds.leases)[0]?.spec).toMatchObject({ leaseDurationSeconds: 6 });
  const [stored] = api.objects(kinds.shardPlans);
  const plan = parseShardPlan(stored);
  expect(plan).toMatchObject({
    kind: "ok",
    value: {
      spec: { cut: { tp: 4, ep: 2, etp: 2 }, image: "worker@sha256:0", model: { source: "builtin://nano-maverick" } },
    },
  });
  expect(group.spec).toMatchObject({ plan: stored?.metadata.name, ordinal: 0, state: "Serving" });
  const status = await till(() => {
    const parsed = parseModelDeployment(api.objects(kinds.modelDeployments)[0]);
    return parsed.kind === "ok" && parsed.value.status?.replicas === 1 ? parsed.value.status : undefined;
  });
  expect(status).toMatchObject({ plan: "tp4·ep2·1x", ready: "0/4", phase: "Scheduling", observedGeneration: 1 });
  child.kill("SIGTERM");
  const { code, stderr } = await ended;
  expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
  expect(api.objects(kinds.leases)[0]?.spec).toMatchObject({ holderIdentity: "" });
});

test("a source that is not there is the cause, with its field, and a cluster without the chart is said", async () => {
  const { api, child } = await begin(RESOURCES);
  const node = await api.create(kinds.nodes, GPU_NODE, signal);
  await api.replaceStatus(kinds.nodes, { ...node, status: GPU_STATUS }, signal);
  const metadata = { name: "chat", namespace: "serving" };
  const spec = { model: { source: "builtin://nobody" } };
  await api.create(
    kinds.modelDeployments,
    { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment", metadata, spec },
    signal,
  );
  const cause = await till(() => {
    const parsed = parseModelDeployment(api.objects(kinds.modelDeployments)[0]);
    return parsed.kind === "ok" && parsed.value.status?.phase === "Infeasible" ? parsed.value.status.cause : undefined;
  });
  expect(cause.message).toMatch(/^spec\.model\.source: .*nobody/);
  child.kill("SIGTERM");
  const bare = await begin([kinds.pods, kinds.leases]);
  const { code, stderr } = await endOf(bare.child);
  expect(code).toBe(2);
  expect(stderr).toContain("the cluster does not serve ModelDeployment (muster.dev/v1alpha1)");
});

test("leads on while its own calls fill the line and are not answered: the Lease has another", async () => {
  let held = 0;
  const script = `const { controllerCommand } = await import(${JSON.stringify(MODULE)});
    const { configMaps } = await import(${JSON.stringify(KINDS)});
    await controllerCommand(() => [async ({ api, term: { signal } }) => {
      const calls = Array.from({ length: ${CALLS_HELD} }, (_, at) => api.get(configMaps, "c" + at, "serving", signal));
      await Promise.allSettled(calls);
    }]).parseAsync();`;
  const intercept = (url: string) => {
    const isHeld = url.includes("/configmaps/");
    if (isHeld) held += 1;
    return isHeld;
  };
  const { api, child } = await begin(RESOURCES, ["--lease-seconds", "3"], { script, intercept });
  let said = "";
  child.stderr?.on("data", (chunk: Buffer) => {
    said += chunk;
  });
  const renewals = new Set<string>();
  api.onChange(({ resource, after }) => {
    if (resource.plural === "leases" && held > 0) renewals.add(after?.metadata.resourceVersion ?? "");
  });
  // Without a renewal a term ends after 2 s; they are 0.4 s apart.
  await till(() => (renewals.size >= 12 || said.includes("leads no more") ? true : undefined));
  expect(said).toContain('"isLeading":true');
  expect(said).not.toContain("leads no more");
  expect(held).toBeLessThan(CALLS_HELD); // the line is full
});

test("a lease that any pause would end is refused", async () => {
  const { child } = await begin(RESOURCES, ["--lease-seconds", "2"]);
  const { code, stderr } = await endOf(child);
  expect(code).not.toBe(0);
  expect(stderr).toContain('--lease-seconds: "2": write whole seconds, 3 to 86400');
});

test("T of a gang is a flag: what is out of bounds is refused, what is not reaches those who keep the ledger", async () => {
  const { child: refused } = await begin(RESOURCES, ["--gang-timeout", "5"]);
  const { code, stderr } = await endOf(refused);
  expect(code).not.toBe(0);
  expect(stderr).toContain('--gang-timeout: "5": write whole seconds, 10 to 3600');
  const telling = SCRIPT.replace(
    "controllerCommand()",
    "controllerCommand(({ gangLimits }) => { process.stderr.write('T is ' + gangLimits.wholeMs + ' ms'); process.exit(); })",
  );
  const { child: taken } = await begin(RESOURCES, ["--gang-timeout", "45"], { script: telling });
  expect((await endOf(taken)).stderr).toContain("T is 45000 ms");
});

// `muster plan -f` as a process, against the simulated API server behind a real socket: what it says, supposes and refuses. That
// the controller binds the same nodes is test/cluster/kubelet/plan.test.ts.
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { stringify } from "yaml";
import { z } from "zod";
import * as kinds from "../../../controller/kube/api/resources.ts";
import { SimApiServer } from "../../sim/api-server.ts";
import { SimHttpServer } from "../../sim/http-server.ts";
import { realTime } from "../../sim/virtual-time.ts";
import { node, pod } from "../kube/objects.ts";
import { muster } from "./run.ts";

vi.setConfig({ testTimeout: 120_000 }); // each call is a process of its own
const { signal } = new AbortController();
const RESOURCES = Object.values(kinds).filter((kind) => typeof kind !== "string");
const Answer = z.looseObject({
  owners: z.array(
    z.looseObject({
      outcome: z.string(),
      places: z
        .array(
          z.looseObject({
            isNew: z.boolean(),
            workers: z.array(z.looseObject({ node: z.string(), devices: z.number() })),
          }),
        )
        .default([]),
      waiting: z.array(z.looseObject({ code: z.string(), text: z.string() })).default([]),
    }),
  ),
  elsewhere: z.array(z.unknown()),
});

let api: SimApiServer;
let http: SimHttpServer;
let folder = "";
let kubeconfig = "";

beforeAll(async () => {
  api = new SimApiServer(realTime);
  http = await SimHttpServer.listen(api, { resources: RESOURCES });
  folder = await mkdtemp(join(tmpdir(), "muster-plan-"));
  kubeconfig = join(folder, "config.json");
  const config = {
    apiVersion: "v1",
    kind: "Config",
    clusters: [{ name: "sim", cluster: { server: http.url } }],
    users: [{ name: "me", user: { token: "t" } }],
    contexts: [{ name: "sim", context: { cluster: "sim", user: "me", namespace: "serving" } }],
    "current-context": "sim",
  };
  await writeFile(kubeconfig, JSON.stringify(config));
  for (const [name, gpus] of [
    ["gpu-1", 2],
    ["gpu-2", 4],
    ["gpu-3", 4],
  ] as const) {
    const made = node(name, { gpus });
    const stored = await api.create(kinds.nodes, { ...made, status: undefined }, signal);
    await api.replaceStatus(kinds.nodes, { ...stored, status: made.status }, signal);
  }
  const held = pod("trainer", { gpus: 2, node: "gpu-3", namespace: "other" });
  const { uid: _, resourceVersion: __, ...metadata } = held.metadata;
  await api.create(kinds.pods, { ...held, metadata }, signal);
});
afterAll(async () => {
  await http.close();
  await rm(folder, { recursive: true, force: true });
});

const mdep = (name: string, spec: Record<string, unknown> = {}) => ({
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name },
  spec: { model: { source: "builtin://nano-maverick" }, gpu: { count: 4, topology: { nodes: 2 } }, ...spec },
});

async function plan(documents: readonly unknown[], ...flags: string[]) {
  const file = join(folder, "mdep.yaml");
  await writeFile(file, documents.map((document) => stringify(document)).join("---\n"));
  return await muster("plan", "-f", file, "--kubeconfig", kubeconfig, ...flags);
}

async function planned(documents: readonly unknown[], ...flags: string[]) {
  const { code, out, err } = await plan(documents, "--json", ...flags);
  expect(err).toBe("");
  const answer = Answer.parse(JSON.parse(out));
  const nodes = answer.owners.map(({ places }) => places.map(({ workers }) => workers.map((each) => each.node)));
  return { code, answer, nodes };
}

test("says the nodes that are bound, with the cut, the ledger and the reasons; others' GPUs are taken", async () => {
  const { code, out, err } = await plan([mdep("nano")]);
  expect({ code, err }).toEqual({ code: 0, err: "" });
  expect(out).toMatch(/^ModelDeployment serving\/nano$/m);
  expect(out).toMatch(/^CUT +RANKS +NODES/m);
  expect(out).toMatch(/bytes of rank \d, the fullest/);
  expect(out).toMatch(/^ {2}(chosen|limit) +/m);
  // The trainer holds 2 of gpu-3: the two nodes that are left with 2 are filled, and gpu-2 stays whole.
  expect(out).toMatch(/worker 0 -> gpu-1: 2 GPUs \(ranks 0-1\)\n {4}worker 1 -> gpu-3: 2 GPUs \(ranks 2-3\)/);
  expect(out).toMatch(/^fits: tp4.*1x, 1 of 1 replicas have places$/m);
});

test("documents are planned in order, each on what the ones before it leave; nothing is written", async () => {
  const before = api.objects(kinds.pods).length;
  const { code, nodes, answer } = await planned([mdep("one"), mdep("two", { gpu: { count: 4 } }), mdep("three")]);
  expect(nodes).toEqual([[["gpu-1", "gpu-3"]], [["gpu-2"]], []]);
  expect(answer.owners.map(({ outcome }) => outcome)).toEqual(["fits", "fits", "short"]);
  expect(answer.owners[2]?.waiting[0]?.text).toMatch(/2 nodes with 2 free GPUs each are needed/);
  expect(code).toBe(3);
  expect(api.objects(kinds.pods)).toHaveLength(before);
  for (const kind of [kinds.modelDeployments, kinds.shardPlans, kinds.replicaGroups, kinds.leases])
    expect(api.objects(kind)).toEqual([]);
});

test("--what-if: nodes and GPUs come and go, several together", async () => {
  const nodesWith = async (...changes: string[]) => {
    const flags = changes.flatMap((change) => ["--what-if", change]);
    const { nodes, answer } = await planned([mdep("nano")], ...flags);
    return answer.owners[0]?.outcome === "fits" ? nodes[0]?.[0] : answer.owners[0]?.outcome;
  };
  expect(await nodesWith("nodes-=gpu-1")).toEqual(["gpu-3", "gpu-2"]);
  expect(await nodesWith("nodes-=gpu-1,gpu-2")).toBe("infeasible");
  expect(await nodesWith("nodes-=gpu-1,gpu-2", "nodes+=1xH200x2")).toEqual(["gpu-3", "new-1"]);
  expect(await nodesWith("nodes-=gpu-2,gpu-3", "nodes+=1xlike:gpu-1")).toEqual(["gpu-1", "new-1"]);
  expect(await nodesWith("gpus-=gpu-1:1")).toEqual(["gpu-3", "gpu-2"]);
  expect(await nodesWith("gpus-=gpu-2:3", "gpus+=gpu-1:6", "nodes-=gpu-3")).toBe("infeasible");
});

test("a wrong token is named, and a wrong call exits with 2", async () => {
  for (const [change, token] of [
    ["nodes-=gpu-9", '"gpu-9"'],
    ["nodes+=4xB300x8", '"B300"'],
    ["nodes+=many", '"many"'],
    ["gpus-=gpu-1", '"gpu-1"'],
    ["gpus-=gpu-1:7", '"gpu-1" offers 2 GPUs, not 7'],
    ["delete=nobody", '"serving/nobody"'],
    ["reboot=gpu-1", '"reboot=gpu-1"'],
  ] as const) {
    const { code, out, err } = await plan([mdep("nano")], "--what-if", change);
    expect({ code, out }, change).toEqual({ code: 2, out: "" });
    expect(err).toContain(token);
  }
  const both = await muster("plan", "builtin://nano-maverick", "-f", "x.yaml");
  expect(both).toMatchObject({ code: 2, out: "" });
  const alone = await plan([mdep("nano")], "--gpus", "8xH200");
  expect(alone).toMatchObject({ code: 2, out: "" });
  expect(alone.err).toContain("--gpus");
});

test("a field that is wrong is named with its document; so is a kind that cannot be planned", async () => {
  const wrong = await plan([mdep("nano"), mdep("other", { gpu: { count: "many" } })]);
  expect(wrong).toMatchObject({ code: 2, out: "" });
  expect(wrong.err).toContain("document 2: spec.gpu.count");
  const foreign = await plan([{ apiVersion: "v1", kind: "Pod", metadata: { name: "p" } }]);
  expect(foreign.err).toMatch(/kind.*"Pod"/);
  const nobody = await plan([mdep("nano", { model: { source: "builtin://nobody" } })]);
  expect(nobody.code).toBe(2);
  expect(nobody.out).toMatch(/refused: spec\.model\.source: .*nobody/);
});

test("what can never fit says what would do", async () => {
  const { code, out } = await plan([mdep("nano", { gpu: { count: 3 } })]);
  expect(code).toBe(3);
  expect(out).toContain("nothing fits");
  expect(out).toMatch(/remedy +\w+: /);
});

test("--help has the grammar; a cluster that does not answer exits with 1", async () => {
  const help = await muster("plan", "--help");
  for (const word of ["nodes-=", "nodes+=", "gpus-=", "delete=", "--kubeconfig", "--what-if"])
    expect(help.out).toContain(word);
  const away = join(folder, "away.json");
  const config = { clusters: [{ name: "a", cluster: { server: "http://127.0.0.1:1" } }] };
  const contexts = [{ name: "a", context: { cluster: "a", user: "a" } }];
  await writeFile(
    away,
    JSON.stringify({ ...config, kind: "Config", users: [{ name: "a", user: {} }], contexts, "current-context": "a" }),
  );
  const file = join(folder, "away.yaml");
  await writeFile(file, stringify(mdep("nano")));
  const said = await muster("plan", "-f", file, "--kubeconfig", away);
  expect(said).toMatchObject({ code: 1, out: "" });
  expect(said.err).toMatch(/cannot be listed/);
});

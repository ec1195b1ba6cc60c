// Question: what does a large cluster cost the controller? Time to plan and place every replica of all deployments, the longest
//   reconciles, calls to the API server for each object, memory of the process; and how long the planner needs for the largest
//   model on all GPUs.
// Method: `muster controller` as a process of its own against an API server, filled before with nodes of 8 GPUs and pods of
//   others. Deployments come at once; half of their replicas take one node, half two. The clock runs from the first write to the
//   last pod that is bound. Percentiles are upper ends of the buckets of the controller's own histogram, calls are its own count
//   (watches and tries again included); memory is the peak that the kernel counts. Planning is timed in this process, headers
//   read before. CPU times do not depend on what else the machine does; the others do, and `load_before` says how much that was.
// Server: `memory` is the one of test/sim behind a real socket, and binds pods itself. `real` is etcd (which does not sync its
//   files), kube-apiserver with its own limits and kube-scheduler as released, on the same cores; pods are bound by that
//   scheduler, and the controller is a service account under priority and fairness. No controller manager: cluster-real.ts.
// Correctness, in the same run, read from the server: no node has more GPUs bound than it has, and every gang is whole. The
//   memory of the controller is below RSS_MB_MAX. The row is written first; then the bench fails.
// Not measured: the network, workers, with `memory` also a real API server and its etcd (the one in memory answers faster).
//   PODS ARE FAKE: they are bound, and nothing runs in them.
// Appends one row to test/bench/results/cluster.csv.
//
//   npm run bench -- cluster [--server memory|real] [--nodes 5000] [--strangers 100000] [--deployments 200]
//       [--minutes 12, with real 30]
import { type ChildProcess, spawn } from "node:child_process";
import { openSync } from "node:fs";
import { createServer } from "node:net";
import { cpus, loadavg } from "node:os";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import {
  modelDeployments,
  nodes as nodeKind,
  pods as podKind,
  replicaGroups,
  shardPlans,
} from "../../controller/kube/api/resources.ts";
import { type GangPod, gangKey, gangPod } from "../../controller/kube/gangs/gang-pods.ts";
import { nodeFacts } from "../../controller/kube/inventory/node-facts.ts";
import { podFacts } from "../../controller/kube/inventory/pod-facts.ts";
import { GPUS_EACH, NS } from "./cluster-objects.ts";
import { behemothOnAll } from "./cluster-plan.ts";
import { RealWorld } from "./cluster-real.ts";
import { SimWorld, type World } from "./cluster-world.ts";
import { cpuSeconds, memoryMb } from "./process-cost.ts";
import { appendRow, commit, median } from "./row.ts";

const RESULTS = join(import.meta.dirname, "results/cluster.csv");
const PROGRAM = join(import.meta.dirname, "../../controller/cli/muster.mjs");
const HEADER =
  "date,commit,cpu,cores,load_before,api_server,pods,nodes,strangers,deployments,groups,gpus_placed,gpus_wanted,place_s,reconcile_p99_s,reconciles,calls,calls_per_object,rss_peak_mb,rss_end_mb,plan_behemoth_ms,plan_behemoth_cpu_ms,controller_cpu_s,calls_429";
const ROUNDS = 5;
const SAY_MS = 10_000;
/** 1 GB, in the unit of the row (1,048,576 bytes). */
const RSS_MB_MAX = 953;

type Size = { nodes: number; strangers: number; deployments: number; minutes: number; server: "memory" | "real" };

function sizeOf(): Size {
  const { values } = parseArgs({
    options: {
      nodes: { type: "string" },
      strangers: { type: "string" },
      deployments: { type: "string" },
      minutes: { type: "string" },
      server: { type: "string", default: "memory" },
    },
  });
  const count = (name: "nodes" | "strangers" | "deployments" | "minutes", otherwise: number, most: number): number => {
    const value = Number(values[name] ?? otherwise);
    if (Number.isInteger(value) && value >= 1 && value <= most) return value;
    console.error(`bench cluster: --${name} is ${values[name]}; whole numbers from 1 to ${most} are possible`);
    process.exit(2);
  };
  const { server } = values;
  if (server !== "memory" && server !== "real") {
    console.error(`bench cluster: --server is ${server}; memory and real are possible`);
    process.exit(2);
  }
  const nodes = count("nodes", 5_000, 20_000);
  const deployments = count("deployments", Math.max(2, Math.round(nodes / 25)), nodes);
  const minutes = count("minutes", server === "real" ? 30 : 12, 120);
  return { nodes, deployments, strangers: count("strangers", nodes * 20, 400_000), minutes, server };
}

/** As many replicas as the nodes hold, of 8 GPUs each: on one node, or on two. */
function wishes({ nodes, deployments }: Size) {
  let left = nodes;
  return Array.from({ length: deployments }, (_, index) => {
    const replicas = Math.round(left / (deployments - index));
    left -= replicas;
    const gpu = { count: GPUS_EACH, topology: { nodes: 1 + (index % 2) } };
    const spec = { model: { source: "builtin://nano-maverick" }, gpu, parallelism: { tp: GPUS_EACH }, replicas };
    return { name: `m${String(index).padStart(4, "0")}`, spec, gpus: replicas * GPUS_EACH };
  });
}

async function freePort(): Promise<number> {
  const probe = createServer();
  await new Promise<void>((done) => probe.listen(0, "127.0.0.1", done));
  const address = probe.address();
  await new Promise((done) => probe.close(done));
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}

type Counted = { p99: number; turns: number; calls: number; refused: number };

/** What the controller says of itself. `p99`: upper end of the bucket in which 99 of 100 turns of deployments end; `refused`: by 429. */
async function counted(world: World, port: number): Promise<Counted> {
  const text = await world.answerOf(port, "/metrics");
  const series = (name: string) =>
    [...text.matchAll(new RegExp(`^${name}\\{([^}]*)\\} (\\d+)`, "gm"))].map(([, labels = "", value]) => ({
      labels: new Map([...labels.matchAll(/(\w+)="([^"]*)"/g)].map(([, label = "", is = ""]) => [label, is])),
      value: Number(value),
    }));
  const buckets = series("muster_reconcile_seconds_bucket").filter(
    ({ labels }) => labels.get("queue") === "deployments",
  );
  const turns = buckets.at(-1)?.value ?? 0;
  const within = buckets
    .find(({ value }) => value >= 0.99 * turns)
    ?.labels.get("le")
    ?.replace("+Inf", "Infinity");
  const calls = [...series("muster_kube_requests_total"), ...series("muster_kube_watches_total")];
  console.log(calls.map(({ labels, value }) => `${[...labels.values()].join(" ")}: ${value}`).join(", "));
  const sum = (some: typeof calls) => some.reduce((so, { value }) => so + value, 0);
  const terms = /^muster_leader_changes_total (\d+)/m.exec(text)?.[1];
  console.log(`terms of leading: ${terms}`);
  const refused = calls.filter(({ labels }) => labels.get("code") === "429");
  return { p99: Number(within), turns, calls: sum(calls), refused: sum(refused) };
}

/** What must not be: reads the truth. Answers how many objects the controller and its deployments have made. */
async function check(world: World, { strangers }: Size): Promise<{ groups: number; made: number }> {
  const held = new Map<string, number>();
  const gangs: GangPod[] = [];
  let made = -strangers;
  for await (const pod of world.objects(podKind)) {
    const { node, gpus } = podFacts(pod);
    held.set(node, (held.get(node) ?? 0) + gpus);
    gangs.push(...[gangPod(pod) ?? []].flat());
    made += 1;
  }
  for await (const node of world.objects(nodeKind)) {
    const { name, gpus } = nodeFacts(node);
    const bound = held.get(name) ?? 0;
    if (bound > gpus) throw new Error(`node ${name} has ${gpus} GPUs and pods for ${bound} are bound to it`);
  }
  const halves = [...Map.groupBy(gangs, gangKey)].filter(
    ([, gang]) =>
      gang.some(({ state }) => state === "bound") &&
      gang.some(({ state, written }) => state !== "bound" || written?.seats.length !== gang.length),
  );
  if (halves.length > 0) throw new Error(`${halves.length} gangs are halves, ${halves[0]?.[0]} for one`);
  const groups = await countOf(world.objects(replicaGroups));
  made += groups + (await countOf(world.objects(shardPlans))) + (await countOf(world.objects(modelDeployments)));
  return { groups, made };
}

async function countOf(objects: AsyncIterable<unknown>): Promise<number> {
  let count = 0;
  for await (const _ of objects) count += 1;
  return count;
}

async function plannings({ nodes }: Size): Promise<{ wallMs: number; cpuMs: number }> {
  const planOnce = await behemothOnAll(nodes, GPUS_EACH);
  const plans = Array.from({ length: ROUNDS }, planOnce);
  const wallMs = median(plans.map((each) => each.wallMs));
  const cpuMs = median(plans.map((each) => each.cpuMs));
  const gpus = nodes * GPUS_EACH;
  console.log(
    `planning the largest model on ${gpus} free GPUs: ${wallMs.toFixed(0)} ms, ${cpuMs.toFixed(0)} ms of CPU time`,
  );
  return { wallMs, cpuMs };
}

function startController(world: World, port: number): ChildProcess {
  const flags = ["--kubeconfig", world.kubeconfig, "--worker-image", "worker@sha256:0", "--http", `127.0.0.1:${port}`];
  const { command, args } = world.inside(process.execPath, [...process.execArgv, PROGRAM, "controller", ...flags]);
  const file = join(dirname(world.kubeconfig), "controller.log");
  console.log(`the controller writes to ${file}`);
  const log = openSync(file, "w");
  return spawn(command, args, { stdio: ["ignore", log, log] });
}

/** From the first deployment to the last pod that is bound, or to the end of what is given; in seconds. */
async function place(world: World, size: Size, child: ChildProcess): Promise<number> {
  const wanted = wishes(size);
  const gpusWanted = wanted.reduce((sum, { gpus }) => sum + gpus, 0);
  const begunMs = performance.now();
  const endMs = begunMs + size.minutes * 60_000;
  const object = { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment" };
  for (const { name, spec } of wanted)
    await world.create(modelDeployments, { ...object, metadata: { name, namespace: NS }, spec });
  let saidMs = begunMs;
  while (world.placedGpus < gpusWanted && performance.now() < endMs && child.exitCode === null) {
    await new Promise((done) => setTimeout(done, 100));
    if (performance.now() - saidMs < SAY_MS) continue;
    saidMs = performance.now();
    const seconds = ((saidMs - begunMs) / 1000).toFixed(0);
    const own = `${memoryMb(child.pid, "VmRSS")} MB, ${cpuSeconds(child.pid).toFixed(0)} s of CPU time`;
    console.log(`${seconds} s: ${world.placedGpus} of ${gpusWanted} GPUs, ${own}; ${world.costs()}`);
  }
  if (child.exitCode !== null) throw new Error(`the controller has ended with ${child.exitCode}; its log says why`);
  return (performance.now() - begunMs) / 1000;
}

async function measure(world: World, size: Size): Promise<void> {
  const [load = Number.NaN] = loadavg();
  const planning = await plannings(size);
  const begunMs = performance.now();
  await world.fill(size.nodes, size.strangers);
  console.log(`the cluster is filled after ${((performance.now() - begunMs) / 1000).toFixed(0)} s; ${world.costs()}`);
  const port = await freePort();
  const child = startController(world, port);
  try {
    const gpusWanted = wishes(size).reduce((sum, { gpus }) => sum + gpus, 0);
    const placeS = await place(world, size, child);
    const rssPeakMb = memoryMb(child.pid, "VmHWM");
    const own = [rssPeakMb, memoryMb(child.pid, "VmRSS")];
    const controllerCpuS = cpuSeconds(child.pid);
    const { p99, turns, calls, refused } = await counted(world, port);
    const { groups, made } = await check(world, size);
    const row = [
      ...[new Date().toISOString(), commit(), cpus()[0]?.model ?? "unknown", cpus().length, load.toFixed(2)],
      ...[world.title, "fake", size.nodes, size.strangers, size.deployments, groups, world.placedGpus, gpusWanted],
      ...[placeS.toFixed(1), p99, turns, calls, (calls / made).toFixed(2), ...own],
      ...[planning.wallMs.toFixed(0), planning.cpuMs.toFixed(0), controllerCpuS.toFixed(1), refused],
    ];
    console.log(`${HEADER}\n${row.join(",")}`);
    appendRow(RESULTS, HEADER, row);
    if (world.placedGpus < gpusWanted) throw new Error(`not all is placed after ${size.minutes} minutes`);
    if (rssPeakMb >= RSS_MB_MAX) throw new Error(`the controller has taken ${rssPeakMb} MB; ${RSS_MB_MAX} is too much`);
  } finally {
    child.kill("SIGTERM");
  }
}

const size = sizeOf();
const world = size.server === "real" ? await RealWorld.open() : await SimWorld.open();
try {
  await measure(world, size);
} finally {
  await world.close();
}

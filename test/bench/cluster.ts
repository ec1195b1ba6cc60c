// Question: what does a large cluster cost the controller? Time to plan and place every replica of all deployments, the longest
//   reconciles, calls to the API server for each object, memory of the process; and how long the planner needs for the largest
//   model on all GPUs.
// Method: `muster controller` as a process of its own against an API server in memory behind a real socket (test/sim), filled
//   before with nodes of 8 GPUs and pods of others. Deployments come at once; half of their replicas take one node, half two.
//   The clock runs from the first write to the last pod that is bound. Percentiles are upper ends of the buckets of the
//   controller's own histogram; memory is the peak that the kernel counts. Planning is timed in this process, headers read before.
//   CPU times do not depend on what else the machine does; the others do, and `load_before` says how much that was.
// Correctness, in the same run: no node has more GPUs bound than it has, and every gang is whole.
// Not measured: a real API server and its etcd (the one in memory answers faster, and shares the machine's cores), the network,
//   workers. PODS ARE FAKE: they are bound, and nothing runs in them.
// Appends one row to test/bench/results/cluster.csv.
//
//   npm run bench -- cluster [--nodes 5000] [--strangers 100000] [--deployments 200] [--minutes 12]
import { type ChildProcess, spawn } from "node:child_process";
import { openSync, readFileSync } from "node:fs";
import { createServer } from "node:net";
import { cpus, loadavg } from "node:os";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { gangKey, gangPod } from "../../controller/kube/gang-pods.ts";
import { nodeFacts } from "../../controller/kube/node-facts.ts";
import { podFacts } from "../../controller/kube/pod-facts.ts";
import {
  modelDeployments,
  nodes as nodeKind,
  pods as podKind,
  replicaGroups,
  shardPlans,
} from "../../controller/kube/resources.ts";
import { behemothOnAll } from "./cluster-plan.ts";
import { GPUS_EACH, kubeconfigFor, NS, World } from "./cluster-world.ts";
import { appendRow, commit, median } from "./row.ts";

const RESULTS = join(import.meta.dirname, "results/cluster.csv");
const PROGRAM = join(import.meta.dirname, "../../controller/cli/muster.mjs");
const HEADER =
  "date,commit,cpu,cores,load_before,api_server,pods,nodes,strangers,deployments,groups,gpus_placed,gpus_wanted,place_s,reconcile_p99_s,reconciles,calls,calls_per_object,rss_peak_mb,rss_end_mb,plan_behemoth_ms,plan_behemoth_cpu_ms,controller_cpu_s";
const ROUNDS = 5;
const SAY_MS = 10_000;
/** USER_HZ: the unit of /proc, the same on every Linux that Node runs on. */
const TICKS_PER_SECOND = 100;

type Size = { nodes: number; strangers: number; deployments: number; minutes: number };

function sizeOf(): Size {
  const { values } = parseArgs({
    options: {
      nodes: { type: "string" },
      strangers: { type: "string" },
      deployments: { type: "string" },
      minutes: { type: "string" },
    },
  });
  const count = (name: keyof typeof values, otherwise: number, most: number): number => {
    const value = Number(values[name] ?? otherwise);
    if (Number.isInteger(value) && value >= 1 && value <= most) return value;
    console.error(`bench cluster: --${name} is ${values[name]}; whole numbers from 1 to ${most} are possible`);
    process.exit(2);
  };
  const nodes = count("nodes", 5_000, 20_000);
  const deployments = count("deployments", Math.max(2, Math.round(nodes / 25)), nodes);
  return { nodes, deployments, strangers: count("strangers", nodes * 20, 400_000), minutes: count("minutes", 12, 120) };
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

/** In MB, of the kernel: VmHWM is the peak. */
function memoryOf({ pid }: ChildProcess, field: "VmHWM" | "VmRSS"): number {
  const text = readFileSync(`/proc/${pid}/status`, "utf8");
  return Math.round(Number(new RegExp(`${field}:\\s+(\\d+) kB`).exec(text)?.[1] ?? Number.NaN) / 1024);
}

/** In seconds, of all its threads. */
function cpuOf({ pid }: ChildProcess): number {
  const [, after = ""] = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ");
  const [user, system] = after.split(" ").slice(11, 13).map(Number);
  return ((user ?? Number.NaN) + (system ?? Number.NaN)) / TICKS_PER_SECOND;
}

/** Of the turns of deployments: upper end of the bucket in which the 99th of 100 lies, and how many there were. */
async function reconciles(port: number): Promise<{ p99: number; count: number }> {
  const text = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
  const buckets = [...text.matchAll(/^muster_reconcile_seconds_bucket\{([^}]*)\} (\d+)/gm)].flatMap(
    ([, labels = "", value]) => {
      const bound = /le="([^"]+)"/.exec(labels)?.[1];
      return bound === undefined || !labels.includes('queue="deployments"')
        ? []
        : [{ bound: bound === "+Inf" ? Number.POSITIVE_INFINITY : Number(bound), count: Number(value) }];
    },
  );
  const count = buckets.at(-1)?.count ?? 0;
  return { p99: buckets.find((bucket) => bucket.count >= 0.99 * count)?.bound ?? Number.NaN, count };
}

/** What must not be: reads the truth. */
function check(world: World): void {
  const pods = world.server.objects(podKind);
  const held = new Map<string, number>();
  for (const { node, gpus } of pods.map(podFacts)) held.set(node, (held.get(node) ?? 0) + gpus);
  const over = world.server
    .objects(nodeKind)
    .map(nodeFacts)
    .filter(({ name, gpus }) => (held.get(name) ?? 0) > gpus);
  if (over.length > 0)
    throw new Error(`${over.length} nodes have more GPUs bound than they have, ${over[0]?.name} for one`);
  const halves = [
    ...Map.groupBy(
      pods.flatMap((pod) => gangPod(pod) ?? []),
      gangKey,
    ),
  ].filter(
    ([, gang]) =>
      gang.some(({ state }) => state === "bound") &&
      gang.some(({ state, written }) => state !== "bound" || written?.seats.length !== gang.length),
  );
  if (halves.length > 0) throw new Error(`${halves.length} gangs are halves, ${halves[0]?.[0]} for one`);
}

async function run(size: Size): Promise<void> {
  const [load = Number.NaN] = loadavg();
  const planOnce = await behemothOnAll(size.nodes, GPUS_EACH);
  const plans = Array.from({ length: ROUNDS }, planOnce);
  const planMs = median(plans.map(({ wallMs }) => wallMs));
  const planCpuMs = median(plans.map(({ cpuMs }) => cpuMs));
  console.log(
    `planning the largest model on ${size.nodes * GPUS_EACH} free GPUs: ${planMs.toFixed(0)} ms, ${planCpuMs.toFixed(0)} ms of CPU time`,
  );
  const world = new World();
  await world.fill(size.nodes, size.strangers);
  const url = await world.listen();
  const port = await freePort();
  const kubeconfig = kubeconfigFor(url);
  const flags = ["--kubeconfig", kubeconfig, "--worker-image", "worker@sha256:0", "--http", `127.0.0.1:${port}`];
  const file = join(dirname(kubeconfig), "controller.log");
  console.log(`the controller writes to ${file}`);
  const log = openSync(file, "w");
  const child = spawn(process.execPath, [...process.execArgv, PROGRAM, "controller", ...flags], {
    stdio: ["ignore", log, log],
  });
  const wanted = wishes(size);
  const gpusWanted = wanted.reduce((sum, { gpus }) => sum + gpus, 0);
  const begunMs = performance.now();
  const endMs = begunMs + size.minutes * 60_000;
  const object = { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment" };
  const { signal } = new AbortController();
  try {
    for (const { name, spec } of wanted)
      await world.server.create(modelDeployments, { ...object, metadata: { name, namespace: NS }, spec }, signal);
    let saidMs = begunMs;
    while (world.placedGpus < gpusWanted && performance.now() < endMs && child.exitCode === null) {
      await new Promise((done) => setTimeout(done, 100));
      if (performance.now() - saidMs < SAY_MS) continue;
      saidMs = performance.now();
      console.log(
        `${((saidMs - begunMs) / 1000).toFixed(0)} s: ${world.placedGpus} of ${gpusWanted} GPUs, ${world.server.objects(replicaGroups).length} groups, ${memoryOf(child, "VmRSS")} MB, ${cpuOf(child).toFixed(0)} s of CPU time`,
      );
    }
    const placeS = (performance.now() - begunMs) / 1000;
    check(world);
    const { p99, count } = await reconciles(port);
    const groups = world.server.objects(replicaGroups).length;
    const made =
      groups +
      world.server.objects(shardPlans).length +
      world.server.objects(podKind).length -
      size.strangers +
      wanted.length;
    const calls = [...world.calls.values()].reduce((sum, each) => sum + each, 0);
    console.log([...world.calls].map(([name, times]) => `${name} ${times}`).join(", "));
    const figures = [
      size.nodes,
      size.strangers,
      wanted.length,
      groups,
      world.placedGpus,
      gpusWanted,
      placeS.toFixed(1),
      p99,
      count,
      calls,
      (calls / made).toFixed(2),
    ];
    const machine = [new Date().toISOString(), commit(), cpus()[0]?.model ?? "unknown", cpus().length, load.toFixed(2)];
    const row = [
      ...machine,
      "in memory",
      "fake",
      ...figures,
      memoryOf(child, "VmHWM"),
      memoryOf(child, "VmRSS"),
      planMs.toFixed(0),
      planCpuMs.toFixed(0),
      cpuOf(child).toFixed(1),
    ];
    console.log(`${HEADER}\n${row.join(",")}`);
    appendRow(RESULTS, HEADER, row);
    if (world.placedGpus < gpusWanted) process.exitCode = 1;
  } finally {
    child.kill("SIGTERM");
    await world.close();
  }
}

await run(sizeOf());

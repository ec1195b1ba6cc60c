// One seeded history of a whole cluster: people, tenants, nodes, networks and controllers do what they do for about a minute;
// then calm, and everything that is wished for must serve; then all is deleted, and nothing may be left. Everything follows
// from the seed.
import type { KubeApi } from "../../../controller/kube/client.ts";
import { modelDeployments } from "../../../controller/kube/resources.ts";
import { calm, type FaultPlan } from "../../sim/faults.ts";
import { wellBehaved } from "../../sim/pods.ts";
import { randomOf } from "../../sim/random.ts";
import { type Process, WholeBed } from "./whole-bed.ts";

/** Of virtual time, after the last fault: leases, back-offs of half a minute, a start that stalls. */
const SERVES_MS = 240_000;
const GONE_MS = 60_000;
const NAMES = ["a", "b"];

export type Played = { seed: number; broken: string[]; happened: Map<string, number>; bed: WholeBed };

type Hands = { bed: WholeBed; random: () => number; plan: () => FaultPlan; count: (what: string) => void };

export type ScheduleOptions = { between?: (api: KubeApi) => KubeApi };

export async function playSchedule(seed: number, options: ScheduleOptions = {}): Promise<Played> {
  const random = randomOf(seed * 7919 + 1);
  const happened = new Map<string, number>();
  const count = (what: string) => void happened.set(what, (happened.get(what) ?? 0) + 1);
  const nodes = 2 + Math.floor(random() * 2);
  const isSlow = random() < 0.15;
  const bed = await WholeBed.begin({
    seed,
    nodes,
    podFaults: podFaults(random),
    overdrawnMs: isSlow ? 15_000 : 0,
    slackMs: 30_000,
    ...options,
  });
  const untilMs = bed.time.nowMs() + 10_000 + random() * 15_000;
  const hands: Hands = { bed, random, count, plan: () => faultPlan(random, untilMs, isSlow) };
  for (let index = 0; index < 2; index++) begin(hands);
  await bed.apply("a", wish(random));
  try {
    while (bed.time.nowMs() < untilMs) {
      await bed.time.runFor(100 + random() * 2_500);
      await act(hands, nodes);
    }
    await comeToRest(hands, nodes);
    await bed.time.runTill(() => bed.isAsWished, "everything that is wished for serves", SERVES_MS);
    for (const name of NAMES) await bed.remove(name, random() < 0.5 ? "Background" : "Foreground");
    await bed.time.runTill(() => bed.left.length === 0, "nothing is left", GONE_MS);
    await bed.time.runFor(1_000);
    // A write that was long on its way may land after everybody has gone; the garbage collector takes it.
    await bed.time.runTill(() => bed.left.length === 0, "no orphan is left", GONE_MS);
  } catch (error) {
    bed.invariants.fail(
      `${error instanceof Error ? error.message : String(error)}\n${bed.saying}\n${bed.left.join(", ")}`,
    );
  }
  for (const { api } of bed.processes)
    for (const [fault, times] of api.happened) for (let at = 0; at < times; at++) count(fault);
  for (const fault of bed.sim.happened.keys()) count(fault);
  const { broken } = bed;
  bed.end();
  return { seed, broken, happened, bed };
}

function podFaults(random: () => number) {
  const chance = () => (random() < 0.5 ? 0 : random() * 0.1);
  return {
    ...wellBehaved,
    untilMs: Number.POSITIVE_INFINITY,
    crash: 0,
    vanish: 0,
    silence: chance(),
    slowImage: 0,
    withinMs: 10_000,
  };
}

function faultPlan(random: () => number, untilMs: number, isSlow: boolean): FaultPlan {
  const chance = (most: number) => (random() < 0.4 ? 0 : random() * most);
  return {
    ...calm,
    untilMs,
    latencyMs: [1, 2 + random() * 100],
    slow: isSlow ? 0.05 : 0,
    slowMs: [1_000, 12_000],
    refuse: chance(0.1),
    unreachable: chance(0.1),
    loseReply: chance(0.1),
    pageGone: chance(0.1),
    watchBreak: chance(0.05),
    watchGone: chance(0.03),
    watchDuplicate: chance(0.2),
    watchStall: 0,
    watchDelayMs: [0, random() * random() * 1_500],
  };
}

function begin({ bed, random, plan }: Hands): Process {
  return bed.start(plan(), { offsetMs: (random() - 0.5) * 2_000, rate: 0.97 + random() * 0.06 });
}

const SHAPES = [
  { gpu: { count: 1 } },
  { gpu: { count: 2 } },
  { gpu: { count: 2, topology: { nodes: 2 } }, parallelism: { tp: 2 } },
  { gpu: { count: 4, topology: { nodes: 2 } }, parallelism: { tp: 4 } },
];

/** `isLast`: of a kind for which two deployments have room. */
function wish(random: () => number, isLast = false): Record<string, unknown> {
  const pick = <T>(list: readonly T[]): T | undefined => list[Math.floor(random() * list.length)];
  return {
    model: { source: pick(["builtin://one", "builtin://two"]) },
    ...pick(SHAPES),
    replicas: isLast ? 1 : Math.floor(random() * 3),
    rollout: { kind: isLast || random() < 0.5 ? "inPlace" : "surge", drainTimeout: `${1 + Math.floor(random() * 4)}s` },
    priority: Math.floor(random() * 3),
  };
}

const DEEDS: Readonly<Record<string, (hands: Hands, node: string) => Promise<void> | void>> = {
  edit: ({ bed, random }) => bed.apply(random() < 0.7 ? "a" : "b", wish(random)),
  scale: async ({ bed, random }) => {
    const there = bed.server.objects(modelDeployments)[0];
    if (there !== undefined)
      await bed.apply(there.metadata.name, { ...Object(there.spec), replicas: Math.floor(random() * 3) });
  },
  delete: ({ bed, random }) => bed.remove(random() < 0.5 ? "a" : "b", random() < 0.5 ? "Background" : "Foreground"),
  tenant: ({ bed, random }) => bed.tenant(`tenant-${bed.server.version}`, 1 + Math.floor(random() * 4)),
  tenantsLeave: ({ bed }) => bed.tenantsLeave(),
  crash: ({ bed, random }) => {
    const worker = bed.sim.workers[Math.floor(random() * bed.sim.workers.length)];
    if (worker !== undefined) bed.sim.crash(worker);
  },
  vanish: ({ bed, random }) => {
    const worker = bed.sim.workers[Math.floor(random() * bed.sim.workers.length)];
    if (worker !== undefined) bed.sim.vanish(worker);
  },
  nodeDies: ({ bed, random }, node) => bed.sim.killNode(node, { isZombie: random() < 0.5 }),
  nodeComesBack: ({ bed }, node) => bed.sim.reviveNode(node),
  cordon: ({ bed, random }, node) => bed.cordon(node, random() < 0.5),
  leaderDies: (hands) => {
    const { leader } = hands.bed;
    if (leader === undefined) return;
    hands.bed.kill(leader);
    begin(hands);
  },
  leaderIsPaused: ({ bed, random }) => {
    if (bed.leader !== undefined) bed.pause(bed.leader, random() * 15_000);
  },
  standbyIsPaused: ({ bed, random }) => {
    const standby = bed.processes.find(({ ledSinceMs }) => ledSinceMs === undefined);
    if (standby !== undefined) bed.pause(standby, random() * 15_000);
  },
  compact: ({ bed }) => bed.server.compact(),
  dropWatches: ({ bed }) => bed.server.dropWatches(),
};
const NAMES_OF_DEEDS = Object.keys(DEEDS);

async function act(hands: Hands, nodes: number): Promise<void> {
  const { random, count } = hands;
  const name = NAMES_OF_DEEDS[Math.floor(random() * NAMES_OF_DEEDS.length)] ?? "";
  count(name);
  await DEEDS[name]?.(hands, `gpu-${Math.floor(random() * nodes)}`);
}

/** All nodes are there, nobody else wants anything, and what is wished for has room. */
async function comeToRest({ bed, random }: Hands, nodes: number): Promise<void> {
  for (let index = 0; index < nodes; index++) {
    await bed.sim.reviveNode(`gpu-${index}`);
    await bed.cordon(`gpu-${index}`, false);
  }
  await bed.tenantsLeave();
  for (const name of NAMES) if (name === "a" || random() < 0.5) await bed.apply(name, wish(random, true));
  const others = bed.server.objects(modelDeployments).filter(({ metadata }) => metadata.name !== "a");
  for (const { metadata } of others) await bed.apply(metadata.name, wish(random, true));
}

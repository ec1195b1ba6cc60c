// What happens to a simulated cluster, one deed at a time: what people, tenants, nodes, schedulers and machines of controllers
// do. Owns the deeds and their chances; when they happen is whole-schedule.ts.
import { modelDeployments } from "../../../../controller/kube/api/resources.ts";
import type { FaultPlan } from "../../../sim/faults.ts";
import type { Process, WholeBed } from "./whole-bed.ts";

export type Hands = {
  bed: WholeBed;
  random: () => number;
  /** Writes may be late in this history. */
  isLate: boolean;
  plan: () => FaultPlan;
  count: (what: string) => void;
};

const SHAPES = [
  { gpu: { count: 1 } },
  { gpu: { count: 2 } },
  { gpu: { count: 2, topology: { nodes: 2 } }, parallelism: { tp: 2 } },
  { gpu: { count: 4, topology: { nodes: 2 } }, parallelism: { tp: 4 } },
];

/** `isLast`: of a kind for which two deployments have room. */
export function wish(random: () => number, isLast = false): Record<string, unknown> {
  const pick = <T>(list: readonly T[]): T | undefined => list[Math.floor(random() * list.length)];
  return {
    model: { source: pick(["builtin://one", "builtin://two"]) },
    ...pick(SHAPES),
    replicas: isLast ? 1 : Math.floor(random() * 3),
    rollout: { kind: isLast || random() < 0.5 ? "inPlace" : "surge", drainTimeout: `${1 + Math.floor(random() * 4)}s` },
    priority: Math.floor(random() * 3),
  };
}

const WRITES_MAX = 6;

/** Until somewhere between two writes of what it does next: record, pods, gates, statuses. */
const someWrites = ({ random }: Hands): number => 1 + Math.floor(random() * WRITES_MAX);

function die(hands: Hands, process: Process): void {
  hands.count("dies");
  hands.bed.kill(process);
  begin(hands);
}

/** Half of them for longer than a Lease lives. */
function pause({ bed, random, count }: Hands, process: Process): void {
  count("isPaused");
  bed.pause(process, random() * 15_000);
}

export function begin({ bed, random, plan }: Hands): Process {
  return bed.start(plan(), { offsetMs: (random() - 0.5) * 2_000, rate: 0.97 + random() * 0.06 });
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
    if (leader !== undefined) die(hands, leader);
  },
  leaderDiesAtWrite: (hands) => {
    const { leader } = hands.bed;
    if (leader !== undefined) leader.atWrite = { left: someWrites(hands), run: () => die(hands, leader) };
  },
  leaderIsPaused: (hands) => {
    const { leader } = hands.bed;
    if (leader !== undefined) pause(hands, leader);
  },
  leaderIsPausedAtWrite: (hands) => {
    const { leader } = hands.bed;
    if (leader !== undefined) leader.atWrite = { left: someWrites(hands), run: () => pause(hands, leader) };
  },
  standbyIsPaused: (hands) => {
    const standby = hands.bed.processes.find(({ ledSinceMs }) => ledSinceMs === undefined);
    if (standby !== undefined) pause(hands, standby);
  },
  /** Gates that open late, and a rival who is worth more. */
  gatesAreLate: async ({ bed, random, isLate }) => {
    if (!isLate || bed.leader === undefined) return;
    bed.leader.api.latePodPatches = 1 + Math.floor(random() * 2);
    await bed.apply(random() < 0.5 ? "a" : "b", { ...wish(random), replicas: 2, priority: 3 });
  },
  schedulerForgets: ({ bed }) => {
    bed.sim.isNextHeld = true;
  },
  seatIsTaken: ({ bed }) => {
    bed.seatTaker = `taker-${bed.server.version}`;
  },
  compact: ({ bed }) => bed.server.compact(),
  dropWatches: ({ bed }) => bed.server.dropWatches(),
};
const NAMES_OF_DEEDS = Object.keys(DEEDS);

export async function act(hands: Hands, nodes: number): Promise<void> {
  const { random, count } = hands;
  const name = NAMES_OF_DEEDS[Math.floor(random() * NAMES_OF_DEEDS.length)] ?? "";
  count(name);
  await DEEDS[name]?.(hands, `gpu-${Math.floor(random() * nodes)}`);
}

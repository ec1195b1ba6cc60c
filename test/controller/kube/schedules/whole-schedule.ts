// One seeded history of a whole cluster: people, tenants, nodes, networks and controllers do what they do for about a minute;
// then calm, and everything that is wished for must serve; then all is deleted, and nothing may be left. Everything follows
// from the seed.
import type { KubeApi } from "../../../../controller/kube/api/client.ts";
import { modelDeployments } from "../../../../controller/kube/api/resources.ts";
import { calm, type FaultPlan } from "../../../sim/faults.ts";
import { wellBehaved } from "../../../sim/pods.ts";
import { randomOf } from "../../../sim/random.ts";
import { WholeBed } from "./whole-bed.ts";
import { act, begin, type Hands, wish } from "./whole-deeds.ts";

/** Of virtual time, after the last fault: leases, back-offs of half a minute, a start that stalls. */
const SERVES_MS = 240_000;
const GONE_MS = 60_000;
const NAMES = ["a", "b"];
/** How long a write is on its way at most. */
const LATE_MS = 6_000;
/** Until a leader that has just begun has given back what a late write of the one before has taken. */
const OVERDRAWN_MS = 15_000;
/** Beyond T: looks that fail, back-offs, and deletes that do. */
const SLACK_MS = 15_000;

export type Played = { seed: number; broken: string[]; happened: Map<string, number>; bed: WholeBed };

export type ScheduleOptions = { between?: (api: KubeApi) => KubeApi };

export async function playSchedule(seed: number, options: ScheduleOptions = {}): Promise<Played> {
  const random = randomOf(seed * 7919 + 1);
  const happened = new Map<string, number>();
  const count = (what: string) => void happened.set(what, (happened.get(what) ?? 0) + 1);
  const nodes = 2 + Math.floor(random() * 2);
  const isLate = random() < 0.3;
  const bed = await WholeBed.begin({
    seed,
    nodes,
    podFaults: podFaults(random),
    overdrawnMs: isLate ? OVERDRAWN_MS : 0,
    lateMs: LATE_MS,
    slackMs: SLACK_MS,
    ...options,
  });
  const untilMs = bed.time.nowMs() + 10_000 + random() * 15_000;
  const hands: Hands = { bed, random, count, isLate, plan: () => faultPlan(random, untilMs, isLate) };
  for (let index = 0; index < 2; index++) begin(hands);
  await bed.apply("a", wish(random));
  try {
    while (bed.time.nowMs() < untilMs) {
      await bed.time.runFor(100 + random() * 2_500);
      bed.invariants.look();
      await act(hands, nodes);
    }
    await comeToRest(hands, nodes);
    await bed.time.runTill(() => bed.isAsWished, "everything that is wished for serves", SERVES_MS);
    bed.invariants.look();
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

function faultPlan(random: () => number, untilMs: number, isLate: boolean): FaultPlan {
  const chance = (most: number) => (random() < 0.4 ? 0 : random() * most);
  return {
    ...calm,
    untilMs,
    latencyMs: [1, 2 + random() * 100],
    slow: isLate ? 0.03 : 0,
    slowMs: [1_000, LATE_MS],
    lateWrite: isLate ? 0.05 : 0,
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

/** All nodes are there, nobody else wants anything, and what is wished for has room. */
async function comeToRest({ bed, random }: Hands, nodes: number): Promise<void> {
  for (let index = 0; index < nodes; index++) {
    await bed.sim.reviveNode(`gpu-${index}`);
    await bed.cordon(`gpu-${index}`, false);
  }
  bed.sim.isNextHeld = false;
  bed.seatTaker = undefined;
  for (const process of bed.processes) {
    process.atWrite = undefined;
    process.api.latePodPatches = 0;
  }
  await bed.tenantsLeave();
  for (const name of NAMES) if (name === "a" || random() < 0.5) await bed.apply(name, wish(random, true));
  const others = bed.server.objects(modelDeployments).filter(({ metadata }) => metadata.name !== "a");
  for (const { metadata } of others) await bed.apply(metadata.name, wish(random, true));
}

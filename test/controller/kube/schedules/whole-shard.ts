// A share of the seeded schedules, for one test file each: vitest runs files side by side. Owns which seeds there are, what is
// printed where one fails, and the proof that what shall happen in them does happen.
//
// In CI there are ten thousand, elsewhere fewer: one takes about 50 ms of a quiet core (Node 24, 2026), two files run side by
// side, so it is four and a half minutes or two. MUSTER_SCHEDULES: how many there are in all; MUSTER_FIRST: the seed they
// begin at, for running many in pieces; MUSTER_SEED: that one alone.
import { expect, test } from "vitest";
import { type Played, playSchedule } from "./whole-schedule.ts";

const SCHEDULES = process.env.CI === "true" ? 10_000 : 4_000;
const SCHEDULES_MAX = 1_000_000;
/** A machine that ten others use takes thirty times what a quiet one does. */
const MS_EACH_MAX = 3_000;
const BROKEN_MAX = 5;

const FAULTS = ["refuse", "unreachable", "loseReply", "lateWrite", "watchBreak", "watchGone", "watchDuplicate", "slow"];
/** `dies`, `isPaused`: of controllers, at any moment or between two of their writes; `hold`: the scheduler forgets a pod. */
const DEEDS = [
  ...["dies", "isPaused", "leaderDiesAtWrite", "leaderIsPausedAtWrite"],
  ...["nodeDies", "cordon", "crash", "vanish", "hold"],
  ...["tenant", "seatIsTaken", "edit", "scale", "delete"],
];

function numberOf(name: string, otherwise: number): number {
  const text = process.env[name];
  const count = Number(text ?? otherwise);
  if (Number.isInteger(count) && count >= 1 && count <= SCHEDULES_MAX) return count;
  throw new Error(`${name} is ${text}; whole numbers from 1 to ${SCHEDULES_MAX} are possible`);
}

const again = (seed: number): string =>
  `MUSTER_SEED=${seed} npx vitest run test/controller/kube/whole-schedules-1.test.ts`;

export function shard(index: number, shards: number): void {
  const only = process.env.MUSTER_SEED;
  const all = numberOf("MUSTER_SCHEDULES", SCHEDULES);
  const from = numberOf("MUSTER_FIRST", 1);
  const first = from + Math.floor((all * index) / shards);
  const end = from + Math.floor((all * (index + 1)) / shards);
  const seeds =
    only === undefined ? Array.from({ length: end - first }, (_, at) => first + at) : index === 0 ? [Number(only)] : [];

  test.skipIf(seeds.length === 0)(
    `seeds ${seeds[0]} to ${seeds.at(-1)}: invariants hold at every change, all serves when calm, nothing is left`,
    async () => {
      const traces = Error.stackTraceLimit;
      // Thousands of aborts each make a trace that nobody reads.
      if (only === undefined) Error.stackTraceLimit = 0;
      const totals = new Map<string, number>();
      const broken: string[] = [];
      try {
        for (const seed of seeds) {
          const played = await playSchedule(seed);
          addUp(totals, played);
          if (played.broken.length > 0)
            broken.push(`seed ${seed} (${again(seed)}):\n  ${played.broken.slice(0, 3).join("\n  ")}`);
          if (broken.length >= BROKEN_MAX) break;
        }
      } finally {
        Error.stackTraceLimit = traces;
      }
      expect(broken.join("\n")).toBe("");
      if (only !== undefined) return;
      console.log(`${seeds.length} schedules: ${[...totals].map(([what, times]) => `${what} ${times}`).join(", ")}`);
      for (const what of [...FAULTS, ...DEEDS])
        expect(totals.get(what) ?? 0, `${what} has happened`).toBeGreaterThan(seeds.length / 20);
    },
    60_000 + seeds.length * MS_EACH_MAX,
  );
}

function addUp(totals: Map<string, number>, { happened, bed }: Played): void {
  for (const [what, times] of [...happened, ...Object.entries(bed.invariants.met)])
    totals.set(what, (totals.get(what) ?? 0) + times);
}

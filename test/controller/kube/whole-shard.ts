// A share of the seeded schedules, for one test file each: vitest runs files side by side. Owns which seeds there are, what is
// printed where one fails, and the proof that what shall happen in them does happen.
//
// MUSTER_SCHEDULES: how many there are in all; MUSTER_SEED: that one alone.
import { expect, test } from "vitest";
import { type Played, playSchedule } from "./whole-schedule.ts";

/** What one core does in about two minutes; the whole ten thousand are asked for by MUSTER_SCHEDULES=10000. */
const SCHEDULES = 2_000;
const SCHEDULES_MAX = 1_000_000;
/** A slow and busy machine takes ten times what a quiet one does. */
const MS_EACH_MAX = 1_000;
const BROKEN_MAX = 5;

const FAULTS = ["refuse", "unreachable", "loseReply", "watchBreak", "watchGone", "watchDuplicate", "slow"];
const DEEDS = ["leaderDies", "leaderIsPaused", "nodeDies", "crash", "vanish", "tenant", "edit", "delete", "cordon"];

function countOf(text: string | undefined): number {
  const count = Number(text ?? SCHEDULES);
  if (Number.isInteger(count) && count >= 1 && count <= SCHEDULES_MAX) return count;
  throw new Error(`MUSTER_SCHEDULES is ${text}; whole numbers from 1 to ${SCHEDULES_MAX} are possible`);
}

const again = (seed: number): string =>
  `MUSTER_SEED=${seed} npx vitest run test/controller/kube/whole-schedules-1.test.ts`;

export function shard(index: number, shards: number): void {
  const only = process.env.MUSTER_SEED;
  const all = countOf(process.env.MUSTER_SCHEDULES);
  const first = 1 + Math.floor((all * index) / shards);
  const end = 1 + Math.floor((all * (index + 1)) / shards);
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

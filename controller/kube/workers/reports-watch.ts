// Reads the board while a term lasts: whoever may be standing still is looked at before its bound is over, and what leaders say
// comes into status. Owns the rhythm alone.
import type { Clock } from "../api/clock.ts";
import type { ReportsBoard } from "./reports-board.ts";

/** How often is looked for groups that stand still: a small part of the time in which one is to be named. */
const LOOK_MS = 500;
/** Numbers are offered so often, and written as seldom as the status writer lets them. */
const SAY_MS = 2_000;

export type BoardReaders = { clock: Clock; onSuspect: (group: string) => void; onNumbers: (group: string) => void };

/** Resolves when aborted. */
export async function watchReports(
  board: ReportsBoard | undefined,
  { clock, onSuspect, onNumbers }: BoardReaders,
  signal: AbortSignal,
): Promise<void> {
  let saidMs = clock.nowMs();
  while (!signal.aborted) {
    const untilMs = board === undefined ? Number.POSITIVE_INFINITY : clock.nowMs() + LOOK_MS;
    await clock.sleep(signal, untilMs);
    if (board === undefined || signal.aborted) continue;
    for (const group of board.suspects()) onSuspect(group);
    if (clock.nowMs() - saidMs < SAY_MS) continue;
    saidMs = clock.nowMs();
    for (const { group } of board.voices()) onNumbers(group);
  }
}

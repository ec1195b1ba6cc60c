// A decision while it is being made, and the few ways to add to it.
import type { Action, GroupRecord, WorkerSeen } from "./cluster.ts";
import type { Finding, Phase } from "./status.ts";
import type { Because, World } from "./world.ts";

export type Draft = { actions: Action[]; because: Because[]; wakes: number[]; finding: Finding };

export const isRunning = (worker: WorkerSeen): boolean => worker.state.kind === "running";

export function findingOf(record: GroupRecord, phase: Phase, code: string, cause: string): Finding {
  const nothing = { leaderAddress: "", numericsId: "", readyRanks: 0, bytesLoaded: 0n, bytesTotal: 0n, progress: code };
  return { phase, code, cause, incarnation: record.incarnation, restarts: record.restarts, ...nothing };
}

export function stopAll(draft: Draft, workers: readonly WorkerSeen[], graceMs: number, why: Because): void {
  for (const worker of workers) draft.actions.push({ kind: "stop-worker", name: worker.name, graceMs });
  if (workers.length > 0) draft.because.push(why);
}

export function pushRecord(draft: Draft, world: World, record: GroupRecord): void {
  draft.actions.push({ kind: "record", group: world.seen.group, replaces: world.seen.record.incarnation, record });
}

export function pushStart(draft: Draft, world: World, worker: number): void {
  const { group, record } = world.seen;
  draft.actions.push({ kind: "start-worker", name: { group, incarnation: record.incarnation, worker } });
}

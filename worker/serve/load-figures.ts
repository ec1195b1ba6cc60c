// The counters of a leader that WorkerStats shows: totals since it began, and moving averages of step times.
import type { WorkerStats } from "../../proto/gen/muster/v1/worker.ts";
import type { StepResult } from "../engine/engine.ts";

/** Weight of the newest step: about the last 20 steps count. */
const NEWEST = 0.05;

export type Totals = Pick<WorkerStats, "tokensGenerated" | "tokensPrefilled" | "drafted" | "accepted" | "preemptions">;

export class LoadFigures {
  readonly totals: Totals = { tokensGenerated: 0n, tokensPrefilled: 0n, drafted: 0n, accepted: 0n, preemptions: 0n };
  stepMs = 0;
  waitMs = 0;

  addStep(
    result: StepResult,
    counts: { generated: number; prefilled: number; drafted: number; accepted: number },
  ): void {
    this.totals.tokensGenerated += BigInt(counts.generated);
    this.totals.tokensPrefilled += BigInt(counts.prefilled);
    this.totals.drafted += BigInt(counts.drafted);
    this.totals.accepted += BigInt(counts.accepted);
    const weight = this.stepMs === 0 ? 1 : NEWEST;
    this.stepMs += weight * (result.stepMs - this.stepMs);
    this.waitMs += weight * (result.waitMs - this.waitMs);
  }
}

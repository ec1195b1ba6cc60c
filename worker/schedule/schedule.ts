// The batch scheduler: which sequences take part in the next step, and with how many tokens. Pure: same state, same
// decision. Owns no block and no slot: it is told counts and answers counts.
//
//   C1  a decision never exceeds tokensMax, rowsMax, verifyMax, the free slots or the free blocks.
//   C2  the oldest running sequence advances in every step, so everything admitted ends (no starvation).
//   C3  first come, first served: nothing is admitted before what waits in front of it; preempted sequences wait first.
//   C4  drafts and admissions never cause a preemption; only a running sequence that must grow does, newest first.
//   C5  ahead of results nothing is guessed: no step is decided while a running sequence waits for one, nothing is preempted
//       (blocks of a step in flight rest), and no row is given to what that step ends for certain.
import { blocksFor } from "../kv/block-pool.ts";

/**
 * What the scheduler knows of a sequence, as it is once all launched steps are done. Lengths and counts in tokens unless they
 * say blocks.
 */
export type SequenceView = {
  /** All ids, prompt and generated; the one that a launched row samples is counted before it is known. */
  readonly length: number;
  /** Of them, how many are in the KV cache. */
  readonly computed: number;
  readonly blocksHeld: number;
  /** Tokens it may still generate; 0 where a step in flight ends it for certain. */
  readonly remaining: number;
  /** Nothing can be decided for it before a step in flight is done: that verifies its guesses, or gives what to guess from. */
  readonly isUnsettled: boolean;
  /** Guesses at hand for the next step. */
  readonly draftCount: number;
};

export type ScheduleState<S extends SequenceView> = {
  /** In order of admission. */
  readonly running: readonly S[];
  /** In order of service. */
  readonly waiting: readonly S[];
  readonly blocksFree: number;
  readonly slotsFree: number;
  /** A launched step is not done yet. */
  readonly isAhead: boolean;
};

export type Budget = {
  readonly tokensMax: number;
  readonly rowsMax: number;
  readonly verifyMax: number;
  readonly runningMax: number;
  readonly blockTokens: number;
};

export type RowDecision<S> = {
  readonly sequence: S;
  readonly count: number;
  readonly drafts: number;
  readonly sample: boolean;
  /** Blocks to append to its table before the row. */
  readonly grow: number;
};

export type Decision<S> = {
  /** Newest first. They go back to the front of the queue with computed 0 and no blocks. */
  readonly preempt: readonly S[];
  /** Opened in this step with blocks for all of their ids. */
  readonly admit: readonly { readonly sequence: S; readonly blocks: number }[];
  readonly rows: readonly RowDecision<S>[];
};

/** Sequences that can run at once so that every one of them always finds room for a row (C2). */
export const runningLimit = (budget: Budget): number =>
  Math.max(1, Math.min(budget.runningMax, budget.rowsMax, budget.tokensMax));

/** Ready to sample with one more token computed. */
export const isDecoding = (sequence: SequenceView): boolean => sequence.length - sequence.computed === 1;

type Draft<S> = { sequence: S; count: number; drafts: number; sample: boolean; grow: number };

class Step<S extends SequenceView> {
  readonly budget: Budget;
  readonly preempted: S[] = [];
  readonly rows: Draft<S>[] = [];
  survivors: number;
  blocksFree: number;
  tokensLeft: number;
  /** Somebody must grow and there are no blocks, or only resting ones. */
  isShort = false;

  constructor(state: ScheduleState<S>, budget: Budget) {
    this.budget = budget;
    this.survivors = state.running.length;
    this.blocksFree = state.blocksFree;
    this.tokensLeft = budget.tokensMax;
  }

  missing(sequence: S, tokens: number): number {
    return Math.max(0, blocksFor(tokens, this.budget.blockTokens) - sequence.blocksHeld);
  }

  /** One row for every decoding sequence; whoever cannot grow takes the blocks of the newest, where `mayPreempt`. */
  decode(running: readonly S[], mayPreempt: boolean): void {
    for (let index = 0; index < this.survivors; index++) {
      const sequence = running[index];
      if (sequence === undefined || !isDecoding(sequence) || sequence.remaining === 0) continue;
      const grow = this.missing(sequence, sequence.length);
      if (grow > this.blocksFree && !mayPreempt) {
        this.isShort = true;
        return;
      }
      while (grow > this.blocksFree && this.survivors > index) {
        const victim = running[--this.survivors];
        if (victim === undefined) break;
        this.preempted.push(victim);
        this.blocksFree += victim.blocksHeld;
      }
      if (this.survivors <= index) break;
      if (this.rows.length >= this.budget.rowsMax || this.tokensLeft === 0) break;
      this.blocksFree -= grow;
      this.tokensLeft -= 1;
      this.rows.push({ sequence, count: 1, drafts: 0, sample: true, grow });
    }
  }

  /** Guesses take blocks and tokens that nobody needs, in turn of admission, never more than `tokens`. */
  verify(tokens: number): void {
    let left = Math.min(tokens, this.tokensLeft);
    for (const row of this.rows) {
      if (left === 0) return;
      const { sequence } = row;
      const room = (sequence.blocksHeld + row.grow + this.blocksFree) * this.budget.blockTokens - sequence.length;
      const drafts = Math.min(sequence.draftCount, this.budget.verifyMax, sequence.remaining - 1, left, room);
      if (drafts <= 0) continue;
      const grow = this.missing(sequence, sequence.length + drafts);
      this.blocksFree -= grow - row.grow;
      this.tokensLeft -= drafts;
      left -= drafts;
      row.drafts = drafts;
      row.grow = grow;
    }
  }

  /** The next piece of a sequence whose ids are not all computed. False when the step is full. */
  prefill(sequence: S): boolean {
    if (this.tokensLeft === 0 || this.rows.length >= this.budget.rowsMax) return false;
    const behind = sequence.length - sequence.computed;
    const count = Math.min(behind, this.tokensLeft);
    this.tokensLeft -= count;
    this.rows.push({ sequence, count, drafts: 0, sample: count === behind, grow: 0 });
    return true;
  }
}

/** One step. An empty `rows` means that there is nothing to do, or not before the step in flight is done. */
export function schedule<S extends SequenceView>(state: ScheduleState<S>, budget: Budget): Decision<S> {
  const nothing = { preempt: [], admit: [], rows: [] };
  // Waiting for all keeps the batch whole: two half steps cost more than the pause between two whole ones.
  if (state.running.some(({ isUnsettled }) => isUnsettled)) return nothing;
  const step = new Step(state, budget);
  step.decode(state.running, !state.isAhead);
  if (step.isShort) return nothing;
  const running = state.running.slice(0, step.survivors);
  const prefilling = running.filter((sequence) => !isDecoding(sequence));
  const isCrowded = prefilling.length > 0 || state.waiting.length > 0;
  // Half of what is left belongs to prefill where there is any: a guess must not keep a prompt from its first token.
  step.verify(isCrowded ? Math.floor(step.tokensLeft / 2) : step.tokensLeft);
  for (const sequence of prefilling) if (!step.prefill(sequence)) break;
  const admit = step.preempted.length > 0 ? [] : admissions(state, step);
  return { preempt: step.preempted, admit, rows: step.rows };
}

// A sequence is admitted with blocks for all of its ids and its next one, where that leaves one block for each that runs:
// else the next growth would preempt what has just been computed. Alone it always fits (the leader refuses what never can).
function admissions<S extends SequenceView>(state: ScheduleState<S>, step: Step<S>) {
  const admitted: { sequence: S; blocks: number }[] = [];
  const limit = Math.min(runningLimit(step.budget) - state.running.length, state.slotsFree);
  for (const sequence of state.waiting) {
    if (admitted.length >= limit) break;
    const running = state.running.length + admitted.length;
    const blocks = blocksFor(sequence.length, step.budget.blockTokens);
    const wanted = blocksFor(sequence.length + 1, step.budget.blockTokens) + running;
    if ((running === 0 ? blocks : wanted) > step.blocksFree) break;
    if (!step.prefill(sequence)) break;
    step.blocksFree -= blocks;
    admitted.push({ sequence, blocks });
  }
  return admitted;
}

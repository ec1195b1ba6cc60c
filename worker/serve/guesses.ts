// The leader's side of speculation: which running sequences have a session with the speculator, and what it guesses for them.
// Guesses are cut to ids that exist: whatever a draft says, a plan with them is valid (L3 of leader.ts).
import { isDecoding } from "../schedule/schedule.ts";
import type { Speculator } from "../spec/speculator.ts";
import type { Sequence } from "./sequence.ts";

export class Guesses {
  readonly #speculator: Speculator;
  readonly #vocabSize: number;
  #sessions = 0;

  constructor(speculator: Speculator, vocabSize: number) {
    this.#speculator = speculator;
    this.#vocabSize = vocabSize;
  }

  get isUseful(): boolean {
    return this.#speculator.isUseful;
  }

  /** Where the request wants it. A sequence that comes back after preemption opens a new session. */
  open(sequence: Sequence): void {
    const { seedLow, seedHigh, speculation } = sequence.request;
    if (!speculation) return;
    sequence.session = ++this.#sessions;
    const { session, ids: tokens, generatedFrom, sampling } = sequence;
    this.#speculator.open({ session, tokens, generatedFrom, seedLow, seedHigh, sampling });
  }

  commit(sequence: Sequence, added: number): void {
    if (sequence.session !== 0) this.#speculator.commit(sequence.session, sequence.ids, added);
  }

  close(sequence: Sequence): void {
    if (sequence.session !== 0) this.#speculator.close(sequence.session);
    sequence.session = 0;
    sequence.drafts = [];
  }

  /** Fills `drafts` of the sequences that can verify in the next step. Waits no longer than the speculator does. */
  async collect(running: readonly Sequence[]): Promise<void> {
    const ready = running.filter((each) => each.session !== 0 && isDecoding(each) && each.remaining > 1);
    if (ready.length === 0) return;
    const drafts = await this.#speculator.drafts(ready.map(({ session }) => session));
    ready.forEach((sequence, index) => {
      // It may have been cancelled meanwhile.
      if (sequence.session !== 0) sequence.drafts = this.#valid(drafts[index] ?? []);
    });
  }

  #valid(guesses: readonly number[]): readonly number[] {
    const wrong = guesses.findIndex((id) => !(Number.isInteger(id) && id >= 0 && id < this.#vocabSize));
    return wrong < 0 ? guesses : guesses.slice(0, wrong);
  }
}

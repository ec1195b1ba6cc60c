// The leader's side of speculation: which running sequences have a session with the speculator, and what it guesses for them.
// Guesses are cut to ids that exist: whatever a draft says, a plan with them is valid (L3 of leader.ts).
//
//   Q1  a sequence that was often left without guesses no longer waits for them (Sequence.isUnsettled): its steps run ahead.
//       It goes on asking, so that the speculator's probes go on; the first answer makes it wait again.
import { isDecoding } from "../schedule/schedule.ts";
import { noSpeculator, type Speculator } from "../spec/speculator.ts";
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
    if (!speculation || this.#speculator === noSpeculator) return;
    sequence.session = ++this.#sessions;
    sequence.misses = 0;
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

  /** Whether some sequence would ask now. */
  hasQuestions(running: readonly Sequence[]): boolean {
    return running.some(asks);
  }

  /** Fills `drafts` of the sequences that can verify in the next step. Waits no longer than the speculator does. */
  async collect(running: readonly Sequence[]): Promise<void> {
    const ready = running.filter(asks);
    const drafts = await this.#speculator.drafts(ready.map(({ session }) => session));
    ready.forEach((sequence, index) => {
      if (sequence.session === 0) return; // cancelled meanwhile
      const guesses = this.#valid(drafts[index] ?? []);
      sequence.misses = guesses.length > 0 ? 0 : sequence.misses + 1;
      // With a row in flight they are late, but they say that the next ones are worth waiting for.
      sequence.drafts = sequence.promised > 0 ? [] : guesses;
    });
  }

  #valid(guesses: readonly number[]): readonly number[] {
    const wrong = guesses.findIndex((id) => !(Number.isInteger(id) && id >= 0 && id < this.#vocabSize));
    return wrong < 0 ? guesses : guesses.slice(0, wrong);
  }
}

// A sequence that awaits guesses asks when its last token is known; one that does not, in every round.
function asks(sequence: Sequence): boolean {
  return sequence.session !== 0 && isDecoding(sequence) && sequence.remaining > 1 && !sequence.isUnsettled;
}

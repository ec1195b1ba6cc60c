// What the step loop needs of speculation: drafts for the sequences of the next step. The tokens that come back are
// guesses; the engine verifies them, so nothing here can change an answer (reference: coupled match verification).
import type { Sampling } from "../../proto/gen/muster/v1/worker.ts";

export type SpeculatedSequence = {
  /** Unique among this leader's running sequences; a preempted sequence opens again under a new one. */
  session: number;
  /** All token ids so far, prompt and generated. */
  tokens: readonly number[];
  generatedFrom: number;
  seedLow: bigint;
  seedHigh: bigint;
  sampling: Sampling;
};

export interface Speculator {
  /** A sequence begins; its prefix goes to a draft. Never throws, never waits. */
  open(sequence: SpeculatedSequence): void;
  /** Tokens were committed: `tokens` is the whole sequence now, its last `added` are new. */
  commit(session: number, tokens: readonly number[], added: number): void;
  close(session: number): void;
  /**
   * Drafts for the given sessions, in order; an empty list where there is none. Waits for missing ones no longer than the
   * configured limit, and not at all where drafts have not been arriving or have not been of use.
   */
  drafts(sessions: readonly number[]): Promise<number[][]>;
  /** True while hints arrive. */
  readonly isUseful: boolean;
  stop(): Promise<void>;
}

/** Speculation off. */
export const noSpeculator: Speculator = {
  open() {},
  commit() {},
  close() {},
  drafts: async (sessions) => sessions.map(() => []),
  isUseful: false,
  async stop() {},
};

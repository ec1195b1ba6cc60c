// What the tests of the leader ask, and a speculator that guesses from what they must answer.
import type { Open } from "../../../proto/gen/muster/v1/worker.ts";
import type { SpeculatedSequence, Speculator } from "../../../worker/spec/speculator.ts";
import { EOS, sampled } from "./harness.ts";

/** Requests of all kinds, the same in every test: the answer of one may not depend on how it was served. */
export const requests: Partial<Open>[] = [
  { input: { $case: "text", value: "Mr. Speaker, Mr. President" }, maxTokens: 40 },
  { input: { $case: "text", value: "We" }, maxTokens: 60, sampling: sampled(0.8), seedLow: 5n, seedHigh: 9n },
  { input: { $case: "prompt", value: { ids: [2042] } }, maxTokens: 33, sampling: sampled(1), seedLow: 6n },
  {
    input: { $case: "text", value: "The state of the Union ".repeat(12) },
    maxTokens: 20,
    sampling: sampled(1),
    seedLow: 7n,
  },
  { input: { $case: "text", value: "A" }, maxTokens: 80, stop: ["e", "zz"], sampling: sampled(1), seedLow: 8n },
  {
    input: { $case: "text", value: "B" },
    maxTokens: 50,
    sampling: sampled(0.7, { presencePenalty: 1, frequencyPenalty: 0.5 }),
    seedLow: 4n,
  },
  { input: { $case: "text", value: "C" }, maxTokens: 70, logprobs: 3, margins: true },
  { input: { $case: "text", value: "D" }, maxTokens: 25, ignoreEos: true, minTokens: 10, stop: ["a"] },
];
export const boost = new Map([[EOS, 1.2]]);

/** Guesses made from the truth, spoilt at a given rate; what it is told of sequences is checked on the way. */
export class TruthfulLiar implements Speculator {
  readonly isUseful = true;
  readonly sessions = new Map<number, number[]>();
  problems: string[] = [];
  #truth: readonly number[][];
  #draw: () => number;
  constructor(truth: readonly number[][], seed: number) {
    this.#truth = truth;
    let state = seed;
    this.#draw = () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return state / 4294967296;
    };
  }
  open({ session, tokens }: SpeculatedSequence) {
    if (this.sessions.has(session)) this.problems.push(`session ${session} twice`);
    this.sessions.set(session, [...tokens]);
  }
  commit(session: number, tokens: readonly number[], added: number) {
    const known = this.sessions.get(session);
    if (known === undefined) return void this.problems.push(`commit to unknown session ${session}`);
    known.push(...tokens.slice(tokens.length - added));
    if (known.join() !== tokens.join()) this.problems.push(`session ${session} drifted`);
  }
  close(session: number) {
    if (!this.sessions.delete(session)) this.problems.push(`close of unknown session ${session}`);
  }
  async drafts(sessions: readonly number[]): Promise<number[][]> {
    await new Promise((resolve) => setImmediate(resolve));
    return sessions.map((session) => {
      const known = this.sessions.get(session) ?? [];
      const truth = this.#truth.find((all) => known.every((id, index) => all[index] === id)) ?? [];
      const guess = truth.slice(known.length, known.length + Math.floor(this.#draw() * 8));
      return guess.map((id) => {
        const draw = this.#draw();
        return draw < 0.6 ? id : draw < 0.95 ? Math.floor(this.#draw() * 2048) : draw < 0.97 ? -1 : 1e9;
      });
    });
  }
  async stop() {}
}

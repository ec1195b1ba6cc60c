// At a fixed cut a request's tokens and log-probabilities are the same to the last bit, whatever is served beside it, however its
// prompt is chunked, however often it is preempted, with whatever guesses. The truth is every request alone, one token a step.
import fc from "fast-check";
import { beforeAll, describe, expect, test } from "vitest";
import type { ModelSpec } from "../../proto/gen/muster/v1/plan.ts";
import type { Open } from "../../proto/gen/muster/v1/worker.ts";
import type { SpeculatedSequence, Speculator } from "../../worker/spec/speculator.ts";
import { randomFrom } from "../worker/spec/relay.ts";
import {
  type Answer,
  type GroupOptions,
  PROMPTS,
  readNano,
  Serving,
  type ServingOptions,
  sampled,
  textOf,
} from "./in-process.ts";

const LAYOUT = { ranks: 2, ep: 2, workers: 1 };
const TOKENS = 40;
const REQUESTS = 12;
const BUDGETS = [7, 16, 64, 512];
/** 13 blocks of 16 tokens: one of the longest requests, or two or three short ones. */
const TINY_POOL = 14;
const VERIFY_MAX = 8;
const files = ["nano-maverick", "nano-maverick/nano-maverick-Q4_K_M.gguf"];

const samplings = [
  sampled(0),
  sampled(0.8),
  sampled(1.2, { topK: 40 }),
  sampled(0.7, { topP: 0.9, minP: 0.02 }),
  sampled(0, { repetitionPenalty: 1.3 }),
  sampled(1, { presencePenalty: 0.5, frequencyPenalty: 0.4, logitBias: [{ id: 300, bias: 4 }] }),
];

// Prompts from one sentence to about 130 tokens: several chunks of every budget but the largest.
const requests: (Partial<Open> & { seedLow: bigint })[] = Array.from({ length: REQUESTS }, (_, index) => ({
  input: textOf(PROMPTS.slice(index, index + 1 + ((index * 5) % 9)).join(" ")),
  maxTokens: TOKENS,
  ignoreEos: true,
  logprobs: 4,
  seedLow: BigInt(index),
  seedHigh: 5n,
  sampling: samplings[index % samplings.length],
}));

/** Guesses what is known to come, up to a wrong id at a random place: every count of accepted drafts happens. */
class Oracle implements Speculator {
  readonly isUseful = true;
  guessed = 0;
  readonly #random: () => number;
  readonly #truth: Answer[];
  readonly #sequences = new Map<number, { seed: number; at: number }>();

  constructor(truth: Answer[], seed: number) {
    this.#truth = truth;
    this.#random = randomFrom(seed);
  }

  open({ session, tokens, generatedFrom, seedLow }: SpeculatedSequence): void {
    this.#sequences.set(session, { seed: Number(seedLow), at: tokens.length - generatedFrom });
  }
  commit(session: number, _tokens: readonly number[], added: number): void {
    const known = this.#sequences.get(session);
    if (known) known.at += added;
  }
  close(session: number): void {
    this.#sequences.delete(session);
  }
  drafts = async (sessions: readonly number[]): Promise<number[][]> => sessions.map((id) => this.#guess(id));
  async stop(): Promise<void> {}

  #guess(id: number): number[] {
    const known = this.#sequences.get(id);
    if (!known) return [];
    const length = Math.floor(this.#random() * (VERIFY_MAX + 1));
    const guess = this.#truth[known.seed]?.tokens.slice(known.at, known.at + length) ?? [];
    const wrong = Math.floor(this.#random() * 2 * VERIFY_MAX);
    // Half of the wrong ones do not even exist.
    if (wrong < guess.length) guess[wrong] = Math.floor(this.#random() * 4096);
    this.guessed += guess.length;
    return guess;
  }
}

const bitsOf = ({ tokens, logprobs, finish }: Answer) => ({ tokens, logprobs, reason: finish.reason });

describe.each(files)("%s, 2 ranks in one worker", (file) => {
  let model: ModelSpec;
  const truth: Answer[] = [];

  const serve = (wish: GroupOptions & ServingOptions) => Serving.open(model, { layout: LAYOUT, ...wish });

  /** Serves the given requests, each opened when the one before has `stagger` tokens, and compares every bit. */
  async function check(wish: GroupOptions & ServingOptions, order: readonly number[], stagger = 0) {
    const serving = await serve(wish);
    try {
      const running: Promise<Answer>[] = [];
      const openFrom = (place: number): void => {
        const request = requests[order[place] ?? -1];
        if (request === undefined) return;
        let isNextOpen = false;
        const openNext = (count: number) => {
          if (isNextOpen || count < stagger) return;
          isNextOpen = true;
          openFrom(place + 1);
        };
        running.push(serving.run({ ...request, speculation: wish.speculator !== undefined }, openNext));
        openNext(0);
      };
      openFrom(0);
      const answers: Answer[] = [];
      // Later ones join `running` while earlier ones are awaited.
      for (let place = 0; place < order.length; place++) answers.push(await (running[place] ?? Promise.reject(place)));
      for (const [place, answer] of answers.entries()) {
        const index = order[place] ?? -1;
        const alone = truth[index];
        expect(bitsOf(answer), `request ${index}`).toEqual(alone && bitsOf(alone));
      }
      const sum = (count: (answer: Answer) => number) => answers.reduce((total, each) => total + count(each), 0);
      return {
        preemptions: Number(serving.leader.stats().preemptions),
        drafted: sum(({ finish }) => finish.drafted),
        accepted: sum(({ finish }) => finish.accepted),
      };
    } finally {
      await serving.stop();
    }
  }
  const all = requests.map((_, index) => index);

  beforeAll(async () => {
    model = await readNano(file);
    const serving = await serve({ runningMax: 1 });
    for (const request of requests) truth.push(await serving.run({ ...request, speculation: false }));
    await serving.stop();
  });

  test("alone, every request gives all its tokens with the log-probabilities asked for", () => {
    for (const { tokens, logprobs } of truth) {
      expect(tokens).toHaveLength(TOKENS);
      expect(logprobs.map(({ top }) => top.length)).toEqual(tokens.map(() => 3));
    }
    expect(Math.max(...truth.map(({ prompt }) => prompt.length))).toBeGreaterThan(100);
  });

  test.each(BUDGETS)("all at once, %i tokens to a step", async (tokensMax) => {
    await check({ tokensMax }, all);
    await check({ tokensMax }, all.toReversed(), 3);
  });

  test.each(BUDGETS)("a KV pool so small that requests are preempted, %i tokens to a step", async (tokensMax) => {
    const { preemptions } = await check({ tokensMax, kvBlocks: TINY_POOL }, all);
    expect(preemptions).toBeGreaterThan(0);
  });

  test.each(BUDGETS)("guesses of every length and quality, %i tokens to a step", async (tokensMax) => {
    const { drafted, accepted } = await check({ tokensMax, speculator: new Oracle(truth, tokensMax) }, all);
    expect(accepted).toBeGreaterThan(tokensMax < 16 ? 0 : 100);
    expect(drafted).toBeGreaterThan(accepted);
  });

  test("resumed after any number of its tokens, beside others", async () => {
    const serving = await serve({ tokensMax: 64 });
    try {
      const resumed = all.map((index) => {
        const kept = 1 + ((index * 7) % (TOKENS - 1));
        const generated = truth[index]?.tokens.slice(0, kept) ?? [];
        return serving.run({ ...requests[index], speculation: false, generated });
      });
      for (const [index, answer] of (await Promise.all(resumed)).entries()) {
        const alone = truth[index];
        const kept = TOKENS - answer.tokens.length;
        expect(answer.tokens.length).toBeLessThan(TOKENS);
        expect(answer.tokens).toEqual(alone?.tokens.slice(kept));
        expect(answer.logprobs).toEqual(alone?.logprobs.slice(kept));
      }
    } finally {
      await serving.stop();
    }
  });

  test("all of it together, in 40 seeded scenarios", async () => {
    const totals = { preemptions: 0, drafted: 0, accepted: 0 };
    const scenario = fc.record({
      order: fc.shuffledSubarray([...all, ...all], { minLength: 2 }),
      tokensMax: fc.constantFrom(...BUDGETS),
      kvBlocks: fc.constantFrom(TINY_POOL, 20, 40, 400),
      runningMax: fc.constantFrom(1, 3, 64),
      stagger: fc.nat(20),
      guessSeed: fc.option(fc.nat(), { nil: undefined }),
    });
    const property = fc.asyncProperty(scenario, async ({ order, stagger, guessSeed, ...wish }) => {
      const speculator = guessSeed === undefined ? {} : { speculator: new Oracle(truth, guessSeed) };
      const counts = await check({ ...wish, ...speculator }, order, stagger);
      totals.preemptions += counts.preemptions;
      totals.drafted += counts.drafted;
      totals.accepted += counts.accepted;
    });
    await fc.assert(property, { seed: 20260, numRuns: 40 });
    expect(totals.preemptions).toBeGreaterThan(0);
    expect(totals.accepted).toBeGreaterThan(500);
    expect(totals.drafted).toBeGreaterThan(totals.accepted);
  });
});

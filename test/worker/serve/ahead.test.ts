// Steps that are launched before the results of the last one are there: when that happens, when not, and that nobody notices.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { Open, ScoreChunk } from "../../../proto/gen/muster/v1/worker.ts";
import { Finish_Reason } from "../../../proto/gen/muster/v1/worker.ts";
import type { Leader } from "../../../worker/serve/leader.ts";
import type { Speculator } from "../../../worker/spec/speculator.ts";
import { TableEngine } from "../schedule/table-engine.ts";
import { answer, Bench, EOS, sampled, tableDefaults, tokenizer } from "./harness.ts";
import { boost, requests, TruthfulLiar } from "./requests.ts";

const { blockTokens } = tableDefaults;

/** The engine alone, every result read before the next step: what any leader must answer. */
async function oneByOne(request: Partial<Open>, count: number): Promise<number[]> {
  const engine = new TableEngine({ ...tableDefaults, boost, tokensMax: 400 });
  const input = request.input;
  const prompt =
    input?.$case === "prompt" ? input.value.ids : await tokenizer.encode(input?.$case === "text" ? input.value : "");
  const { seedLow = 0n, seedHigh = 0n, sampling = sampled(0) } = request;
  const blocks = Array.from({ length: Math.ceil((prompt.length + count) / blockTokens) }, (_, index) => index + 1);
  const open = { ids: prompt, generatedFrom: prompt.length, seedLow, seedHigh, sampling, computed: 0, blocks };
  const tokens: number[] = [];
  for (let step = 1n; tokens.length < count; step++) {
    const updates = step === 1n ? [{ slot: 1, kind: { $case: "open" as const, value: open } }] : [];
    const row = { slot: 1, count: step === 1n ? prompt.length : 1, drafts: [], sample: true };
    const rows = [{ ...row, logprobs: 0, logits: false, margins: false }];
    const result = await engine.launch({ step, updates, rows, incarnation: 0n });
    tokens.push(...(result.rows[0]?.tokens ?? []));
  }
  return tokens;
}

/** Never has a guess, until it is told to; counts what it is asked. */
class Mute implements Speculator {
  readonly isUseful = false;
  asked = 0;
  guess: number[] = [];
  open() {}
  commit() {}
  close() {}
  async drafts(sessions: readonly number[]): Promise<number[][]> {
    this.asked++;
    return sessions.map(() => this.guess);
  }
  async stop() {}
}

/** How many log-probabilities came. */
async function scoreOf(leader: Leader, tokens: readonly number[]): Promise<number> {
  let count = 0;
  const emit = async (chunk: ScoreChunk) => void (count += chunk.logprobs.length);
  await leader.score({ tokens, logits: false, emit, signal: new AbortController().signal });
  return count;
}

const endless = (index: number): Partial<Open> => ({ ...requests[index], stop: [], ignoreEos: true, minTokens: 0 });

describe("running ahead", () => {
  test("L1: the tokens are those of an engine whose results are read step by step", async () => {
    const bench = new Bench({ boost });
    const results = await Promise.all(requests.map((_, index) => bench.run(endless(index))));
    await bench.stop();
    expect(bench.engine.seen.ahead).toBeGreaterThan(50);
    for (const [index, { tokens }] of results.entries())
      expect(tokens).toEqual(await oneByOne(requests[index] ?? {}, requests[index]?.maxTokens ?? 0));
  });

  test("what ends for certain costs no step more", async () => {
    const bench = new Bench();
    const { tokens, finish } = await bench.run(endless(0));
    await bench.stop();
    expect(bench.engine.seen).toMatchObject({ steps: tokens.length, rows: tokens.length, ahead: tokens.length - 1 });
    expect(finish).toMatchObject({ targetSteps: tokens.length - 1, accepted: 0, drafted: 0 });
  });

  test("an unforeseen end costs one row, which counts nowhere", async () => {
    const ids = await oneByOne(requests[1] ?? {}, 20);
    const bench = new Bench({ boost: new Map() });
    const first = await bench.run({ ...endless(1), maxTokens: 20 });
    const stopIds = [first.tokens[9] ?? EOS];
    const kept = first.tokens.indexOf(stopIds[0] ?? EOS) + 1;
    const [rows, generated] = [bench.engine.seen.rows, bench.leader.stats().tokensGenerated];
    const { tokens, finish } = await bench.run({ ...endless(1), stopIds });
    await bench.stop();
    expect(ids.length).toBe(20);
    expect(tokens).toEqual(first.tokens.slice(0, kept));
    expect(finish).toMatchObject({ reason: Finish_Reason.STOP, targetSteps: kept - 1 });
    expect(bench.engine.seen.rows - rows).toBe(kept + 1);
    expect(bench.leader.stats().tokensGenerated - generated).toBe(BigInt(kept));
    expect(bench.leader.stats().kvBlocksFree).toBe(tableDefaults.blocks - 1);
  });

  test("who waits for guesses does not run ahead; who waits in vain does, until there are some", async () => {
    const speculator = new Mute();
    const bench = new Bench({ speculator });
    const seen: number[] = [];
    const { tokens } = await bench.run({ ...endless(2), maxTokens: 40, speculation: true }, () => {
      seen.push(bench.engine.seen.ahead);
      if (seen.length === 25) speculator.guess = [1];
    });
    await bench.stop();
    expect(seen[9]).toBe(0);
    expect(seen[20]).toBeGreaterThan(5);
    expect(seen.at(-1)).toBe(seen[26]);
    expect(speculator.asked).toBeGreaterThan(30);
    expect(tokens).toEqual(await oneByOne(requests[2] ?? {}, 40));
  });

  test("F2: cancels at any time, with guesses and without, beside scores, do not reach the others", async () => {
    const bench = new Bench({ boost });
    const reference = await Promise.all(requests.map((request) => bench.run(request)));
    await bench.stop();
    const truth = reference.map(({ prompt, tokens }) => [...prompt, ...tokens]);
    let ahead = 0;
    const one = fc.record({
      index: fc.nat(requests.length - 1),
      speculation: fc.boolean(),
      cancelAt: fc.option(fc.nat(30)),
    });
    const given = fc.record({
      runs: fc.array(one, { minLength: 2, maxLength: 10 }),
      seed: fc.nat(),
      spare: fc.nat(30),
      scores: fc.nat(6),
    });
    const property = fc.asyncProperty(given, async ({ runs, seed, spare, scores }) => {
      const speculator = new TruthfulLiar(truth, seed);
      const blocks = 23 + spare + scores * 40;
      const tried = new Bench({ boost, speculator, lengthMax: 88, blocks, runningMax: 6 });
      const scored = Array.from({ length: scores }, (_, index) => scoreOf(tried.leader, truth[index] ?? []));
      const results = runs.map(({ index, speculation, cancelAt }) => {
        const id = tried.nextId();
        let count = 0;
        return tried.run({ ...requests[index], id, speculation }, ({ tokens }) => {
          count += tokens.length;
          if (cancelAt !== null && count >= cancelAt) tried.leader.cancel(tried.outlet, id);
        });
      });
      for (const [at, result] of (await Promise.all(results)).entries()) {
        const { index, cancelAt } = runs[at] ?? { index: 0, cancelAt: null };
        const expected = reference[index];
        if (expected === undefined) throw new Error(`there is no request ${index}`);
        if (cancelAt === null) expect(answer(result)).toEqual(answer(expected));
        else expect(expected.tokens.slice(0, result.tokens.length)).toEqual(result.tokens);
      }
      expect(await Promise.all(scored)).toEqual(truth.slice(0, scores).map((ids) => ids.length - 1));
      await tried.stop();
      expect(tried.leader.stats()).toMatchObject({ running: 0, waiting: 0, kvBlocksFree: blocks - 1 });
      expect(speculator.sessions.size).toBe(0);
      ahead += tried.engine.seen.ahead;
    });
    await fc.assert(property, { numRuns: 150 });
    expect(ahead).toBeGreaterThan(100);
  });
});

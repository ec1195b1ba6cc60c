import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { Open } from "../../../proto/gen/muster/v1/worker.ts";
import { Fault_Kind, Finish_Reason } from "../../../proto/gen/muster/v1/worker.ts";
import { answer, Bench, type Result, sampled, tokenizer } from "./harness.ts";
import { boost, requests, TruthfulLiar } from "./requests.ts";

const alone = async (): Promise<Result[]> => {
  const results: Result[] = [];
  for (const request of requests) {
    const bench = new Bench({ boost, tokensMax: 400 });
    results.push(await bench.run(request));
    await bench.stop();
  }
  return results;
};
const reference = await alone();
const truth = reference.map(({ prompt, tokens }) => [...prompt, ...tokens]);

const expectedOf = (index: number) => {
  const found = reference[index];
  if (found === undefined) throw new Error(`there is no request ${index}`);
  return answer(found);
};

describe("what a request answers does not depend on how it is served", () => {
  test("the reference covers stop ids, stop strings and length", () => {
    expect(new Set(reference.map(({ finish }) => `${finish.reason}${finish.stop !== ""}`)).size).toBeGreaterThanOrEqual(
      3,
    );
    expect(reference.every(({ tokens }) => tokens.length > 0)).toBe(true);
  });

  test("any batch mates, chunk sizes, preemption pressure and guesses give the same tokens and text", async () => {
    const seen = { preemptions: 0n, accepted: 0n };
    await fc.assert(
      fc.asyncProperty(
        fc.record({
          tokensMax: fc.integer({ min: 2, max: 64 }),
          rowsMax: fc.integer({ min: 1, max: 12 }),
          runningMax: fc.integer({ min: 1, max: 12 }),
          spareBlocks: fc.integer({ min: 0, max: 30 }),
          blockTokens: fc.constantFrom(4, 8),
          verifyMax: fc.integer({ min: 0, max: 5 }),
          seed: fc.integer(),
          speculation: fc.boolean(),
          order: fc.shuffledSubarray([0, 1, 2, 3, 4, 5, 6, 7], { minLength: 1 }),
        }),
        async ({ order, seed, speculation, spareBlocks, ...given }) => {
          // Block 0, as many as the longest sequence needs, and few more: most runs are short of blocks.
          const lengthMax = 88;
          const settings = { ...given, lengthMax, blocks: 1 + lengthMax / given.blockTokens + spareBlocks };
          const speculator = new TruthfulLiar(truth, seed);
          const bench = new Bench({ ...settings, boost, speculator });
          const results = await Promise.all(order.map((index) => bench.run({ ...requests[index], speculation })));
          await bench.stop();
          const { kvBlocksFree, preemptions, accepted } = bench.leader.stats();
          expect(results.map(answer)).toEqual(order.map(expectedOf));
          expect(kvBlocksFree).toBe(settings.blocks - 1);
          for (const { tokens, finish } of results) {
            if (finish.reason !== Finish_Reason.LENGTH) continue;
            expect(tokens.length).toBe(finish.accepted + finish.targetSteps + 1);
          }
          expect(bench.engine.seen.tokensMost).toBeLessThanOrEqual(settings.tokensMax);
          expect(bench.engine.seen.rowsMost).toBeLessThanOrEqual(settings.rowsMax);
          expect(speculator.problems).toEqual([]);
          expect(speculator.sessions.size).toBe(0);
          seen.preemptions += preemptions;
          seen.accepted += accepted;
        },
      ),
      { numRuns: 200 },
    );
    // Else the property has shown nothing about them.
    expect(seen.preemptions).toBeGreaterThan(0n);
    expect(seen.accepted).toBeGreaterThan(0n);
  });
});

describe("a stream that goes on elsewhere", () => {
  test("from any point it answers with the same tokens and the same text, none lost and none repeated", async () => {
    let resumes = 0;
    for (const [index, expected] of reference.entries()) {
      const bench = new Bench({ boost });
      for (const [count, units] of expected.cuts) {
        if (count === 0) continue;
        const generated = expected.tokens.slice(0, count);
        const input = { $case: "prompt" as const, value: { ids: expected.prompt } };
        const rest = await bench.run({ ...requests[index], input, generated, textSent: units });
        expect([...generated, ...rest.tokens]).toEqual(expected.tokens);
        expect(expected.text.slice(0, units) + rest.text).toBe(expected.text);
        expect(rest.finish.reason).toBe(expected.finish.reason);
        expect(rest.finish.stop).toBe(expected.finish.stop);
        resumes++;
      }
      await bench.stop();
    }
    expect(resumes).toBeGreaterThan(100);
  });

  test("text that was not sent before the break is sent after it", async () => {
    const bench = new Bench({ boost });
    const [expected, request] = [reference[0], requests[0]];
    const rest = await bench.run({ ...request, generated: expected?.tokens.slice(0, 10) ?? [], textSent: 3 });
    expect(rest.text).toBe(expected?.text.slice(3));
    await bench.stop();
  });
});

describe("the life of a request", () => {
  test("the first answer holds the prompt's ids, and every Open has exactly one Finish", async () => {
    for (const { chunks } of reference) {
      expect(chunks[0]?.opened).toMatchObject({ revision: "r1", numericsId: "table-1" });
      expect(chunks.filter(({ opened }) => opened).length).toBe(1);
      expect(chunks.filter(({ finish }) => finish).length).toBe(1);
    }
  });

  test("one message carries a whole step of one stream", async () => {
    const bench = new Bench();
    await Promise.all(Array.from({ length: 12 }, () => bench.run({ ...requests[0] })));
    // 40 steps of 12 sequences, the openings, and the few steps in which not all were running yet.
    expect(bench.messages).toBeLessThan(60);
    await bench.stop();
  });

  test("a cancel frees its blocks within the launched step, and the others do not notice", async () => {
    const bench = new Bench({ boost });
    const id = bench.nextId();
    let count = 0;
    const cancelled = bench.run({ ...requests[6], id, maxTokens: 300 }, ({ tokens }) => {
      if ((count += tokens.length) >= 5 && tokens.length > 0) bench.leader.cancel(bench.outlet, id);
    });
    const other = await bench.run({ ...requests[0] });
    expect((await cancelled).finish.reason).toBe(Finish_Reason.CANCELLED);
    expect((await cancelled).tokens.length).toBe(5);
    expect(answer(other)).toEqual(expectedOf(0));
    expect(bench.leader.stats()).toMatchObject({ running: 0, waiting: 0, kvBlocksFree: 199 });
    await bench.stop();
  });

  test("a request that is cancelled while its prompt is tokenised never runs", async () => {
    const bench = new Bench();
    const id = bench.nextId();
    const result = bench.run({ ...requests[0], id });
    bench.leader.cancel(bench.outlet, id);
    expect((await result).finish.reason).toBe(Finish_Reason.CANCELLED);
    expect(bench.engine.seen.steps).toBe(0);
    await bench.stop();
  });

  test("the queue is bounded: what is over it is told so, the rest is served", async () => {
    const bench = new Bench({ runningMax: 2, queueMax: 3 });
    const results = await Promise.all(Array.from({ length: 9 }, () => bench.run({ ...requests[0] })));
    const refused = results.filter(({ finish }) => finish.fault?.code === "queue_full");
    expect(refused.length).toBe(4);
    expect(refused[0]?.finish.fault?.kind).toBe(Fault_Kind.WAITING);
    expect(results.filter(({ tokens }) => tokens.length === 40).length).toBe(5);
    await bench.stop();
  });

  const text = (value: string): Partial<Open> => ({ input: { $case: "text", value } });
  const wrong: [string, Partial<Open>, string, RegExp][] = [
    ["no input", {}, "input", /text, chat or prompt/],
    ["no tokens", { input: { $case: "prompt", value: { ids: [] } } }, "prompt", /no tokens/],
    [
      "an id outside the vocabulary",
      { input: { $case: "prompt", value: { ids: [1, 2048] } } },
      "prompt",
      /2048 at index 1/,
    ],
    ["a generated id outside the vocabulary", { ...text("A"), generated: [9999] }, "generated", /9999/],
    ["too long a prompt", text("The state of the Union ".repeat(100)), "prompt", /400 tokens.*shorten/],
    ["too many tokens", { ...text("A"), maxTokens: 399 }, "max_tokens", /400 tokens/],
    ["17 stop strings", { ...text("A"), stop: Array(17).fill("x") }, "stop", /at most 16/],
    ["an empty stop string", { ...text("A"), stop: [""] }, "stop", /empty/],
    ["a long stop string", { ...text("A"), stop: ["x".repeat(257)] }, "stop", /at most 256/],
    ["a stop id outside the vocabulary", { ...text("A"), stopIds: [3000] }, "stop_ids", /3000/],
    ["a negative temperature", { ...text("A"), sampling: sampled(-1) }, "temperature", /between 0 and/],
    ["no temperature at all", { ...text("A"), sampling: sampled(Number.NaN) }, "temperature", /NaN/],
    [
      "a temperature that is neither 0 nor useful",
      { ...text("A"), sampling: sampled(1e-7) },
      "temperature",
      /at least 0.00001/,
    ],
    ["top_p of 2", { ...text("A"), sampling: sampled(1, { topP: 2 }) }, "top_p", /between 1e-9 and 1/],
    [
      "a bias of an unknown id",
      { ...text("A"), sampling: sampled(1, { logitBias: [{ id: 2048, bias: 1 }] }) },
      "logit_bias",
      /2048/,
    ],
    [
      "a bias of 101",
      { ...text("A"), sampling: sampled(1, { logitBias: [{ id: 1, bias: 101 }] }) },
      "logit_bias",
      /101/,
    ],
    ["too many logprobs", { ...text("A"), logprobs: 22 }, "logprobs", /at most 20/],
  ];
  test.each(wrong)("%s is refused by name", async (_, open, field, detail) => {
    const bench = new Bench();
    const { finish, tokens } = await bench.run(open);
    expect(tokens).toEqual([]);
    expect(finish.fault?.kind).toBe(Fault_Kind.INVALID);
    expect(finish.fault?.field).toBe(field);
    expect(finish.fault?.detail).toMatch(detail);
    expect(bench.engine.seen.steps).toBe(0);
    await bench.stop();
  });

  test("over the context limit has a code of its own", async () => {
    const bench = new Bench();
    expect((await bench.run({ ...text("A"), maxTokens: 399 })).finish.fault?.code).toBe("context_length_exceeded");
    await bench.stop();
  });

  test("without max_tokens a sequence ends at the context limit", async () => {
    const bench = new Bench({ lengthMax: 50 });
    const { prompt, tokens, finish } = await bench.run({ ...text("A"), ignoreEos: true });
    expect(prompt.length + tokens.length).toBe(50);
    expect(finish.reason).toBe(Finish_Reason.LENGTH);
    await bench.stop();
  });

  test("a stop id is part of the answer, not of the text; before min_tokens it does not end it", async () => {
    const ids = reference[0]?.tokens ?? [];
    const stopIds = [ids[4] ?? 0, ids[12] ?? 0];
    const bench = new Bench({ boost });
    const early = await bench.run({ ...requests[0], stopIds });
    expect(early.tokens).toEqual(ids.slice(0, 5));
    expect(reference[0]?.text.startsWith(early.text)).toBe(true);
    const late = await bench.run({ ...requests[0], stopIds, minTokens: 8 });
    expect(late.tokens).toEqual(ids.slice(0, 13));
    await bench.stop();
  });

  test("before min_tokens stop strings are not looked for", async () => {
    const bench = new Bench({ boost });
    const free = await bench.run({ ...requests[0], maxTokens: 30 });
    const late = await bench.run({ ...requests[0], maxTokens: 30, stop: ["e"], minTokens: 12 });
    const detokenizer = tokenizer.detokenizer();
    const pieces = free.tokens.map((id) => detokenizer.push(id));
    expect(pieces.slice(0, 12).join("")).toContain("e");
    const end = pieces.findIndex((piece, index) => index >= 12 && piece.includes("e"));
    expect(late.tokens).toEqual(free.tokens.slice(0, end + 1));
    expect(late.finish).toMatchObject({ reason: Finish_Reason.STOP, stop: "e" });
    await bench.stop();
  });

  test("blocks of a sequence that is cancelled during a step are not free before the step is done", async () => {
    const bench = new Bench();
    const id = bench.nextId();
    const seen: number[] = [];
    const result = bench.run({ ...requests[6], id }, ({ tokens }) => {
      if (tokens.length === 0 || seen.length > 0) return;
      seen.push(bench.leader.stats().kvBlocksFree); // the next step has been launched already
      bench.leader.cancel(bench.outlet, id);
      seen.push(bench.leader.stats().kvBlocksFree);
    });
    expect((await result).finish.reason).toBe(Finish_Reason.CANCELLED);
    expect(seen[0]).toBeLessThan(199);
    expect(seen[1]).toBe(seen[0]);
    await bench.run({ ...requests[0] });
    expect(bench.leader.stats().kvBlocksFree).toBe(199);
    await bench.stop();
  });

  test("a lost engine ends every stream with a lost fault, and the loop", async () => {
    const bench = new Bench();
    const pending = [bench.run({ ...requests[6] }, () => void bench.engine.close()), bench.run({ ...requests[0] })];
    for (const { finish } of await Promise.all(pending)) expect(finish.fault?.kind).toBe(Fault_Kind.LOST);
    await expect(bench.ended).rejects.toThrow("closed");
    expect((await bench.run({ ...requests[0] })).finish.fault?.kind).toBe(Fault_Kind.LOST);
  });
});

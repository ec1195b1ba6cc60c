import OpenAI from "openai";
import { afterAll, beforeAll, expect, test } from "vitest";
import { seedOfChoice, seedOfClient } from "../../../controller/gateway/seed.ts";
import { type Bed, MODEL, makeBed, until } from "./bed.ts";
import { chatPromptIds, expectedAnswer, promptIds } from "./scripted-leader.ts";

let bed: Bed;
let client: OpenAI;

beforeAll(async () => {
  bed = await makeBed();
  client = new OpenAI({ baseURL: `${bed.http}/v1`, apiKey: "unused", maxRetries: 0 });
});
afterAll(() => bed.stop());

const rules = { stop: [], maxTokens: 24, ignoreEos: true };
const sourceOf = (prompt: number[], seed: number, choice = 0) => {
  const { low, high } = seedOfChoice(seedOfClient(seed), choice);
  return { prompt, seedLow: low, seedHigh: high };
};
const messages = [
  { role: "system" as const, content: "be brief" },
  { role: "user" as const, content: "hello" },
];
const chatIds = chatPromptIds(messages);
const extra = { ignore_eos: true };

test("models are listed and found by name and by alias", async () => {
  const list = await client.models.list();
  expect(list.data.map((model) => model.id)).toEqual([MODEL]);
  expect((await client.models.retrieve("nano-alias")).id).toBe(MODEL);
  await expect(client.models.retrieve("other")).rejects.toMatchObject({ status: 404, code: "model_not_found" });
});

test("a chat answer has exactly the leader's text, with usage", async () => {
  const expected = expectedAnswer(sourceOf(chatIds, 7), rules);
  const answer = await client.chat.completions.create({ model: MODEL, messages, seed: 7, max_tokens: 24, ...extra });
  expect(answer.choices[0]?.message.content).toBe(expected.text);
  expect(answer.choices[0]?.finish_reason).toBe("length");
  expect(answer.usage).toMatchObject({
    prompt_tokens: chatIds.length,
    completion_tokens: 24,
    total_tokens: chatIds.length + 24,
    muster: { drafted: 0, accepted: 0, target_steps: 24 },
  });
});

test("a streamed chat answer joins to the same text and ends with usage", async () => {
  const expected = expectedAnswer(sourceOf(chatIds, 8), rules);
  const stream = await client.chat.completions.create({
    model: MODEL,
    messages,
    seed: 8,
    max_completion_tokens: 24,
    stream: true,
    stream_options: { include_usage: true },
    ...extra,
  });
  let text = "";
  const finishes: string[] = [];
  let usage: OpenAI.CompletionUsage | null | undefined;
  let role = "";
  for await (const event of stream) {
    role ||= event.choices[0]?.delta.role ?? "";
    text += event.choices[0]?.delta.content ?? "";
    if (event.choices[0]?.finish_reason) finishes.push(event.choices[0].finish_reason);
    if (event.usage) usage = event.usage;
  }
  expect(text).toBe(expected.text);
  expect(role).toBe("assistant");
  expect(finishes).toEqual(["length"]);
  expect(usage?.completion_tokens).toBe(24);
});

test("completions take text, a list of texts, ids and lists of ids", async () => {
  const ask = async (prompt: string | string[] | number[] | number[][]) =>
    client.completions.create({ model: MODEL, prompt, seed: 3, max_tokens: 24, ...extra });
  const a = expectedAnswer(sourceOf(promptIds("ab"), 3), rules).text;
  const c = expectedAnswer(sourceOf(promptIds("cd"), 3), rules).text;
  expect((await ask("ab")).choices.map((choice) => choice.text)).toEqual([a]);
  expect((await ask(["ab", "cd"])).choices.map((choice) => choice.text)).toEqual([a, c]);
  expect((await ask(promptIds("ab"))).choices.map((choice) => choice.text)).toEqual([a]);
  const both = await ask([promptIds("ab"), promptIds("cd")]);
  expect(both.choices.map((choice) => choice.text)).toEqual([a, c]);
  expect(both.usage?.prompt_tokens).toBe(6);
});

test("completions answer with 16 tokens where no limit is given", async () => {
  const answer = await client.completions.create({ model: MODEL, prompt: "x", ...extra });
  expect(answer.usage?.completion_tokens).toBe(16);
});

test("choice i of n has the stated seed of (seed, i), streamed or not", async () => {
  const expected = [0, 1, 2].map((choice) => expectedAnswer(sourceOf(promptIds("ab"), 5, choice), rules).text);
  expect(new Set(expected).size).toBe(3);
  const body = { model: MODEL, prompt: "ab", n: 3, seed: 5, max_tokens: 24, ...extra };
  const whole = await client.completions.create(body);
  expect(whole.choices.map((choice) => choice.text)).toEqual(expected);
  expect(whole.usage).toMatchObject({ prompt_tokens: 3, completion_tokens: 72 });
  const texts = ["", "", ""];
  for await (const event of await client.completions.create({ ...body, stream: true })) {
    for (const choice of event.choices) texts[choice.index] += choice.text;
  }
  expect(texts).toEqual(expected);
});

test("without a seed two answers differ", async () => {
  const ask = async () => (await client.completions.create({ model: MODEL, prompt: "ab", ...extra })).choices[0]?.text;
  expect(await ask()).not.toBe(await ask());
});

test("stop strings and their text are cut as the leader cuts them", async () => {
  const whole = expectedAnswer(sourceOf(promptIds("ab"), 11), rules).text;
  const stop = whole.slice(20, 23);
  const expected = expectedAnswer(sourceOf(promptIds("ab"), 11), { ...rules, stop: [stop] });
  const body = { model: MODEL, prompt: "ab", seed: 11, max_tokens: 24, stop, ...extra };
  const answer = await client.completions.create(body);
  expect(answer.choices[0]).toMatchObject({ text: expected.text, finish_reason: "stop" });
  let text = "";
  for await (const event of await client.completions.create({ ...body, stop: [stop], stream: true })) {
    text += event.choices[0]?.text ?? "";
  }
  expect(text).toBe(expected.text);
});

test("log-probabilities have each API's shape, streamed or not", async () => {
  const body = { model: MODEL, messages, seed: 2, max_tokens: 5, logprobs: true, top_logprobs: 3, ...extra };
  const chat = await client.chat.completions.create(body);
  const content = chat.choices[0]?.logprobs?.content ?? [];
  expect(content).toHaveLength(5);
  expect(content[0]).toMatchObject({ logprob: -0.5, bytes: [...Buffer.from(content[0]?.token ?? "")] });
  expect(content[0]?.top_logprobs).toHaveLength(3);
  expect(content.map((entry) => entry.token).join("")).toBe(chat.choices[0]?.message.content);
  const streamed: unknown[] = [];
  for await (const event of await client.chat.completions.create({ ...body, stream: true })) {
    streamed.push(...(event.choices[0]?.logprobs?.content ?? []));
  }
  expect(streamed).toEqual(content);

  const ask = { model: MODEL, prompt: "ab", seed: 2, max_tokens: 5, logprobs: 2, ...extra };
  const { choices } = await client.completions.create(ask);
  const logprobs = choices[0]?.logprobs;
  expect(logprobs?.tokens?.join("")).toBe(choices[0]?.text);
  expect(logprobs?.token_logprobs).toEqual([-0.5, -0.5, -0.5, -0.5, -0.5]);
  expect(Object.keys(logprobs?.top_logprobs?.[0] ?? {})).toHaveLength(2);
  expect(logprobs?.text_offset?.[0]).toBe(0);
  expect(logprobs?.text_offset?.[1]).toBe(logprobs?.tokens?.[0]?.length);
});

test("token ids are returned where asked", async () => {
  const expected = expectedAnswer(sourceOf(promptIds("ab"), 3), rules);
  const body = { model: MODEL, prompt: "ab", seed: 3, max_tokens: 24, muster: { return_token_ids: true }, ...extra };
  const { choices } = await client.completions.create(body);
  expect(choices[0]).toMatchObject({ muster: { prompt_token_ids: promptIds("ab"), token_ids: expected.ids } });
  const ids: number[] = [];
  for await (const event of await client.completions.create({ ...body, stream: true })) {
    const [choice] = event.choices;
    if (choice && "muster" in choice) {
      const { token_ids: tokenIds }: { token_ids: number[] } = JSON.parse(JSON.stringify(choice.muster));
      ids.push(...tokenIds);
    }
  }
  expect(ids).toEqual(expected.ids);
});

test("every sampling parameter reaches the leader", async () => {
  const leader = bed.leaders[0];
  await client.completions.create({
    model: MODEL,
    prompt: "ab",
    temperature: 0.5,
    top_p: 0.25,
    presence_penalty: 1,
    frequency_penalty: -1,
    logit_bias: { "5": -100, "6": 2 },
    max_tokens: 2,
    ...{ top_k: 4, min_p: 0.125, repetition_penalty: 2, min_tokens: 1, muster: { speculation: false } },
  });
  expect(leader?.opens.at(-1)).toMatchObject({
    maxTokens: 2,
    minTokens: 1,
    ignoreEos: false,
    speculation: false,
    sampling: {
      temperature: 0.5,
      topK: 4,
      topP: 0.25,
      minP: 0.125,
      repetitionPenalty: 2,
      presencePenalty: 1,
      frequencyPenalty: -1,
      logitBias: [
        { id: 5, bias: -100 },
        { id: 6, bias: 2 },
      ],
    },
  });
});

test("an abort of the client cancels on the leader at once", async () => {
  const leader = bed.leaders[0];
  const before = leader?.cancels.length ?? 0;
  const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true, ...extra });
  for await (const _event of stream) break;
  await until(() => (leader?.cancels.length ?? 0) === before + 1 && leader?.running === 0);
  const stop = new AbortController();
  const whole = client.chat.completions.create({ model: MODEL, messages, ...extra }, { signal: stop.signal });
  await until(() => leader?.running === 1);
  stop.abort();
  await expect(whole).rejects.toThrow(/abort/i);
  await until(() => leader?.running === 0);
});

test("an over-long request says the limit", async () => {
  const ask = client.completions.create({ model: MODEL, prompt: "x".repeat(5000), max_tokens: 1 });
  await expect(ask).rejects.toMatchObject({ status: 400, code: "context_length_exceeded", message: /4096/ });
  const ids = client.completions.create({ model: MODEL, prompt: Array.from({ length: 5000 }, () => 1) });
  await expect(ids).rejects.toMatchObject({ status: 400, code: "context_length_exceeded", message: /4096/ });
});

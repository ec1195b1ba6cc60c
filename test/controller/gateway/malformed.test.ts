// Requests that are wrong: each is refused by the name of the field, in OpenAI's shape, and the gateway serves on.
import { connect } from "node:net";
import { afterAll, beforeAll, expect, test } from "vitest";
import { BODY_BYTES_MAX } from "../../../controller/gateway/limits.ts";
import { type Bed, MODEL, makeBed, until } from "./bed.ts";
import { ask } from "./sse-client.ts";

let bed: Bed;
beforeAll(async () => {
  bed = await makeBed();
});
afterAll(() => bed.stop());

const CHAT = "/v1/chat/completions";
const COMPLETIONS = "/v1/completions";
const messages = [{ role: "user", content: "hi" }];
const chat = (more: object) => ({ model: MODEL, messages, ...more });
const text = (more: object) => ({ model: MODEL, prompt: "hi", ...more });
const said = (content: unknown, more: object = {}) => chat({ messages: [{ role: "user", content, ...more }] });

type Case = [name: string, path: string, body: object | string, status: number, param: string | null, message: RegExp];

const cases: Case[] = [
  ["cut JSON", CHAT, '{"model": ', 400, null, /malformed JSON/],
  ["broken JSON", CHAT, '{"model": "nano", ]', 400, null, /malformed JSON.*position 18/],
  ["an empty body", CHAT, "", 400, null, /body|JSON/i],
  ["an array as body", CHAT, "[]", 400, null, /JSON object/],
  ["a string as body", CHAT, '"x"', 400, null, /JSON object/],
  [
    "a prototype trap",
    CHAT,
    '{"model": "nano", "messages": [{"role": "user", "content": ""}], "__proto__": {"n": 9}}',
    400,
    "__proto__",
    /unknown/,
  ],
  ["100,000 open brackets", CHAT, "[".repeat(100_000), 400, null, /JSON/],
  ["no model", CHAT, { messages }, 400, "model", /model/],
  ["an unknown model", CHAT, chat({ model: "gpt-4" }), 404, "model", /nano/],
  ["no messages", CHAT, { model: MODEL }, 400, "messages", /messages/],
  ["empty messages", CHAT, chat({ messages: [] }), 400, "messages", /messages/],
  ["a message that is a string", CHAT, chat({ messages: ["hi"] }), 400, "messages[0]", /object/],
  ["an unknown role", CHAT, chat({ messages: [{ role: "king", content: "" }] }), 400, "messages[0].role", /role/],
  ["a tool role", CHAT, chat({ messages: [{ role: "tool", content: "" }] }), 400, "messages[0].role", /not supported/],
  ["a message without content", CHAT, chat({ messages: [{ role: "user" }] }), 400, "messages[0].content", /content/],
  ["an image", CHAT, said([{ type: "image_url", image_url: {} }]), 400, "messages[0].content[0].type", /image_url/],
  ["a part without text", CHAT, said([{ type: "text" }]), 400, "messages[0].content[0].text", /text/],
  ["tool calls in a message", CHAT, said("", { tool_calls: [] }), 400, "messages[0].tool_calls", /not supported/],
  ["an unknown field in a message", CHAT, said("", { mood: 1 }), 400, "messages[0].mood", /unknown field/],
  ["tools", CHAT, chat({ tools: [] }), 400, "tools", /not supported/],
  ["tool_choice", CHAT, chat({ tool_choice: "auto" }), 400, "tool_choice", /not supported/],
  ["functions", CHAT, chat({ functions: [] }), 400, "functions", /not supported/],
  ["audio", CHAT, chat({ audio: {} }), 400, "audio", /not supported/],
  ["modalities", CHAT, chat({ modalities: ["text"] }), 400, "modalities", /not supported/],
  [
    "a JSON response format",
    CHAT,
    chat({ response_format: { type: "json_object" } }),
    400,
    "response_format.type",
    /text/,
  ],
  ["an unknown field", CHAT, chat({ temprature: 1 }), 400, "temprature", /unknown field temprature/],
  ["an unknown muster field", CHAT, chat({ muster: { fast: true } }), 400, "muster.fast", /unknown field/],
  ["a temperature that is text", CHAT, chat({ temperature: "1" }), 400, "temperature", /number/],
  ["a temperature above 2", CHAT, chat({ temperature: 2.5 }), 400, "temperature", /2/],
  ["top_p of 0", CHAT, chat({ top_p: 0 }), 400, "top_p", /top_p/],
  ["n of 17", CHAT, chat({ n: 17 }), 400, "n", /16/],
  ["a fractional seed", CHAT, chat({ seed: 1.5 }), 400, "seed", /int/],
  ["a seed that JSON cannot hold", CHAT, '{"model":"nano","messages":[],"seed":9007199254740993}', 400, "seed", /seed/],
  ["max_tokens of 0", CHAT, chat({ max_tokens: 0 }), 400, "max_tokens", /max_tokens/],
  ["max_tokens above the context", CHAT, chat({ max_tokens: 5000 }), 400, "max_tokens", /4096/],
  ["17 stop strings", CHAT, chat({ stop: Array.from({ length: 17 }, String) }), 400, "stop", /16/],
  ["an empty stop string", CHAT, chat({ stop: "" }), 400, "stop", /stop/],
  ["a bias on a word", CHAT, chat({ logit_bias: { the: 1 } }), 400, "logit_bias.the", /logit_bias/],
  ["a bias of 101", CHAT, chat({ logit_bias: { "1": 101 } }), 400, "logit_bias.1", /100/],
  ["top_logprobs alone", CHAT, chat({ top_logprobs: 2 }), 400, "top_logprobs", /logprobs: true/],
  ["top_logprobs of 21", CHAT, chat({ logprobs: true, top_logprobs: 21 }), 400, "top_logprobs", /20/],
  ["stream options without a stream", CHAT, chat({ stream_options: {} }), 400, "stream_options", /stream: true/],
  ["min_tokens above max_tokens", CHAT, chat({ min_tokens: 3, max_tokens: 2 }), 400, "min_tokens", /max_tokens/],
  ["no prompt", COMPLETIONS, { model: MODEL }, 400, "prompt", /missing/],
  ["an empty prompt list", COMPLETIONS, text({ prompt: [] }), 400, "prompt", /prompt/],
  ["mixed prompts", COMPLETIONS, text({ prompt: ["a", [1]] }), 400, "prompt[1]", /string/],
  ["fractional ids", COMPLETIONS, text({ prompt: [1, 1.5] }), 400, "prompt", /integers/],
  ["negative ids", COMPLETIONS, text({ prompt: [[-1]] }), 400, "prompt[0]", /integers/],
  ["too many prompts", COMPLETIONS, text({ prompt: Array.from({ length: 129 }, () => "a") }), 400, "prompt", /128/],
  ["too many choices", COMPLETIONS, text({ prompt: Array.from({ length: 100 }, () => "a"), n: 2 }), 400, "n", /128/],
  ["echo", COMPLETIONS, text({ echo: true }), 400, "echo", /not supported/],
  ["best_of", COMPLETIONS, text({ best_of: 2 }), 400, "best_of", /not supported/],
  ["suffix", COMPLETIONS, text({ suffix: "x" }), 400, "suffix", /not supported/],
  ["chat logprobs in completions", COMPLETIONS, text({ logprobs: true }), 400, "logprobs", /number/],
];

test.each(cases)("%s is refused by name", async (_name, path, body, status, param, message) => {
  const answer = await ask(bed.http, path, body);
  expect(answer.status).toBe(status);
  expect(answer.body).toEqual({
    error: {
      message: expect.stringMatching(message),
      type: "invalid_request_error",
      param,
      code: expect.any(String),
    },
  });
  expect(answer.headers.get("x-request-id")).toMatch(/^req_/);
});

test("null stands for absent, as in OpenAI's API", async () => {
  const nothing = { tools: null, stop: null, seed: null, n: null, response_format: null, echo: null, max_tokens: 1 };
  expect((await ask(bed.http, COMPLETIONS, text(nothing))).status).toBe(200);
});

test("text parts are joined and developer is the system role", async () => {
  const parts = [
    { type: "text", text: "a" },
    { type: "text", text: "b" },
  ];
  const body = chat({
    messages: [
      { role: "developer", content: "x" },
      { role: "user", content: parts },
    ],
    max_tokens: 1,
    response_format: { type: "text" },
  });
  expect((await ask(bed.http, CHAT, body)).status).toBe(200);
  expect(bed.leaders[0]?.opens.at(-1)?.input).toMatchObject({
    value: {
      messages: [
        { role: "system", content: "x" },
        { role: "user", content: "ab" },
      ],
    },
  });
});

test("unknown URLs, wrong methods and wrong content types have OpenAI's shape", async () => {
  const unknown = await ask(bed.http, "/v1/embeddings", {});
  expect([unknown.status, unknown.body.error.code]).toEqual([404, "unknown_url"]);
  const wrong = await ask(bed.http, CHAT);
  expect([wrong.status, wrong.headers.get("allow"), wrong.body.error.code]).toEqual([
    405,
    "POST",
    "method_not_allowed",
  ]);
  const put = await ask(bed.http, "/v1/models", {}, { method: "PUT" });
  expect([put.status, put.headers.get("allow")]).toEqual([405, "GET"]);
  const form = await ask(bed.http, CHAT, "a=b", { headers: { "content-type": "application/x-www-form-urlencoded" } });
  expect([form.status, form.body.error.code]).toEqual([415, "unsupported_media_type"]);
});

test("a body over the limit is 413 and says the limit", async () => {
  const answer = await ask(bed.http, CHAT, chat({ messages: [{ role: "user", content: "x".repeat(BODY_BYTES_MAX) }] }));
  expect([answer.status, answer.body.error.code]).toEqual([413, "body_too_large"]);
  expect(answer.body.error.message).toContain(String(BODY_BYTES_MAX));
});

test("bytes that are no HTTP are answered with 400 and a closed socket", async () => {
  const { hostname, port } = new URL(bed.http);
  const socket = connect(Number(port), hostname);
  let got = "";
  socket.on("data", (data) => {
    got += data.toString();
  });
  socket.write("\u0000\u0001 nonsense\r\n\r\n");
  await until(() => socket.destroyed || socket.readableEnded);
  expect(got).toMatch(/^HTTP\/1\.1 400/);
});

test("after all of that the gateway serves and nothing is left open", async () => {
  expect((await ask(bed.http, COMPLETIONS, text({}))).status).toBe(200);
  expect(bed.leaders[0]?.running).toBe(0);
});

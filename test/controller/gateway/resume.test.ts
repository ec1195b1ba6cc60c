// Going on after a death: whatever dies when, a client gets exactly the undisturbed answer.
import { afterEach, expect, test } from "vitest";
import { seedOfChoice, seedOfClient } from "../../../controller/gateway/seed.ts";
import { transient, waiting } from "../../../proto/fault.ts";
import { Phase } from "../../../proto/gen/muster/v1/control.ts";
import { type Bed, type BedOptions, MODEL, makeBed, servedModel, until } from "./bed.ts";
import { engineLost, expectedAnswer, promptIds, tokenAt } from "./scripted-leader.ts";
import { ask, chunksOf, openSse } from "./sse-client.ts";

let bed: Bed;
const make = async (options: BedOptions = {}) => {
  bed = await makeBed(options);
  return bed;
};
afterEach(() => bed.stop());

const TOKENS = 20;
const rules = { stop: [], maxTokens: TOKENS, ignoreEos: true };
const prompt = promptIds("ab");
const expectedFor = (seed: number, choice = 0, tokens = TOKENS) => {
  const { low, high } = seedOfChoice(seedOfClient(seed), choice);
  return expectedAnswer({ prompt, seedLow: low, seedHigh: high }, { ...rules, maxTokens: tokens });
};
const body = (seed: number, more: object = {}) => ({
  model: MODEL,
  prompt: "ab",
  seed,
  max_tokens: TOKENS,
  ignore_eos: true,
  stream: true,
  stream_options: { include_usage: true },
  muster: { return_token_ids: true },
  ...more,
});
const metric = async (name: string) => {
  const text = await (await fetch(`${bed.http}/metrics`)).text();
  const line = text.split("\n").find((each) => each.startsWith(name));
  return line === undefined ? 0 : Number(line.split(" ").at(-1));
};

test("G1: a stream whose leader dies after any token goes on exactly, streamed and whole", async () => {
  await make({ leader: "none" });
  const expected = expectedFor(1);
  for (let index = 1; index <= TOKENS; index++) {
    const first = await bed.serve({ dieAfterTokens: index });
    const stream = openSse(bed.http, "/v1/completions", body(1));
    await first.died;
    bed.controller.tell([servedModel(undefined)]);
    const second = await bed.serve();
    const got = await chunksOf(await stream);
    expect({ index, text: got.text, ids: got.ids }).toEqual({ index, text: expected.text, ids: expected.ids });
    expect(got.isDone).toBe(true);
    expect(got.usage?.completion_tokens).toBe(TOKENS);
    expect(got.usage?.muster.target_steps).toBe(TOKENS);
    second.kill();
    bed.controller.tell([servedModel(undefined)]);

    const third = await bed.serve({ dieAfterTokens: index, tokensPerStep: 3 });
    const whole = ask(bed.http, "/v1/completions", body(1, { stream: false, stream_options: undefined }));
    await third.died;
    await bed.serve({ tokensPerStep: 2 });
    const answer = await whole;
    expect({ index, text: answer.body.choices[0].text }).toEqual({ index, text: expected.text });
    bed.leaders.at(-1)?.kill();
    bed.controller.tell([servedModel(undefined)]);
  }
}, 120_000);

test("G1: three deaths in one stream with 16 streams running; every one is exact", async () => {
  await make({ leader: { dieAfterTokens: 40, tokensPerStep: 3 } });
  const streams = Array.from({ length: 16 }, (_, seed) => openSse(bed.http, "/v1/completions", body(seed)));
  for (const dieAfterTokens of [50, 60, undefined]) {
    await bed.leaders.at(-1)?.died;
    await bed.serve(dieAfterTokens === undefined ? {} : { dieAfterTokens, tokensPerStep: 2 });
  }
  for (const [seed, stream] of streams.entries()) {
    const got = await chunksOf(await stream);
    expect({ seed, text: got.text }).toEqual({ seed, text: expectedFor(seed).text });
  }
  expect(await metric("muster_gateway_resumes_total")).toBeGreaterThanOrEqual(16);
});

test("G2: the re-opening carries prompt, generated ids, text sent and the drawn seed, over all choices", async () => {
  await make({ leader: { dieAfterTokens: 12 } });
  const { seed, ...unseeded } = body(0, { n: 2 });
  expect(seed).toBe(0);
  const stream = openSse(bed.http, "/v1/completions", unseeded);
  const [first] = bed.leaders;
  await first?.died;
  const second = await bed.serve();
  const got = await chunksOf(await stream);
  expect(second.opens).toHaveLength(2);
  const [opened] = first?.opens ?? [];
  const again = second.opens.find((open) => open.seedLow === opened?.seedLow);
  expect(again?.seedHigh).toBe(opened?.seedHigh);
  expect(again?.input).toEqual({ $case: "prompt", value: { ids: prompt } });
  const source = { prompt, seedLow: opened?.seedLow ?? 0n, seedHigh: opened?.seedHigh ?? 0n };
  expect(again?.generated).toEqual(again?.generated.map((_, index) => tokenAt(source, index)));
  expect(got.texts[0]).toBe(expectedAnswer(source, rules).text);
});

test("a stream whose stop string straddles the death is cut at the same place", async () => {
  await make({ leader: "none" });
  const plain = expectedFor(4).text;
  const stop = plain.slice(17, 22);
  const { low, high } = seedOfClient(4);
  const expected = expectedAnswer({ prompt, seedLow: low, seedHigh: high }, { ...rules, stop: [stop] });
  for (let index = 1; index <= expected.ids.length; index++) {
    const first = await bed.serve({ dieAfterTokens: index });
    const stream = openSse(bed.http, "/v1/completions", body(4, { stop }));
    await first.died;
    await bed.serve();
    const got = await chunksOf(await stream);
    expect({ index, text: got.text, finish: got.finish }).toEqual({ index, text: expected.text, finish: "stop" });
    bed.leaders.at(-1)?.kill();
  }
});

test("an engine that is lost ends its streams with a fault; they are held and go on", async () => {
  await make({ leader: { faultAfterTokens: { tokens: 9, fault: engineLost } } });
  const stream = openSse(bed.http, "/v1/completions", body(5));
  await until(() => bed.leaders[0]?.running === 0);
  await bed.serve();
  expect((await chunksOf(await stream)).text).toBe(expectedFor(5).text);
});

test("a new incarnation takes the streams over although the old leader still answers", async () => {
  await make({ leader: { stepMs: 20 } });
  const stream = openSse(bed.http, "/v1/completions", body(6));
  await until(() => bed.leaders[0]?.running === 1);
  await bed.serve();
  expect((await chunksOf(await stream)).text).toBe(expectedFor(6).text);
  expect(bed.leaders[1]?.opens).toHaveLength(1);
  await until(() => bed.leaders[0]?.running === 0);
});

test("S4: a link that breaks while the leader lives is made again", async () => {
  await make({ leader: { stepMs: 10 } });
  const [leader] = bed.leaders;
  const stream = openSse(bed.http, "/v1/completions", body(7));
  await until(() => leader?.running === 1);
  leader?.breakLinks();
  expect((await chunksOf(await stream)).text).toBe(expectedFor(7).text);
  expect(leader?.streams).toBe(2);
});

test("G3: another numerics id is counted and told in usage; the text stays valid", async () => {
  await make({ leader: { dieAfterTokens: 5, numericsId: "cpu-a" } });
  const stream = openSse(bed.http, "/v1/completions", body(8));
  await bed.leaders[0]?.died;
  await bed.serve({ numericsId: "cpu-b" });
  const got = await chunksOf(await stream);
  expect(got.usage?.muster).toMatchObject({ numerics_changed: true, resumes: 1 });
  expect(await metric("muster_gateway_numerics_changes_total")).toBe(1);
});

test("experts that move under a stream: it goes on where it is, says so, and it is counted", async () => {
  await make({ leader: { stepMs: 5, numericsId: "cpu-a" } });
  const [leader] = bed.leaders;
  if (leader === undefined) throw new Error("no leader");
  const stream = openSse(bed.http, "/v1/completions", body(12));
  await until(() => leader.running === 1);
  leader.hasMoved = true;
  bed.controller.tell([servedModel(leader, { numericsId: "cpu-a-x0123456789ab" })]);
  const got = await chunksOf(await stream);
  expect(got.text).toBe(expectedFor(12).text);
  expect(got.usage?.muster).toMatchObject({ numerics_changed: true });
  expect(got.usage?.muster.resumes).toBeUndefined();
  expect({ streams: leader.streams, opens: leader.opens.length }).toEqual({ streams: 1, opens: 1 });
  expect(await metric("muster_gateway_numerics_changes_total")).toBe(1);
});

test("G3: a stream never crosses revisions; it ends with a typed error event", async () => {
  await make({ leader: { dieAfterTokens: 5 } });
  const stream = openSse(bed.http, "/v1/completions", body(9));
  await bed.leaders[0]?.died;
  await bed.serve({ revision: "r2" });
  const got = await chunksOf(await stream);
  expect(got.error).toMatchObject({ code: "revision_changed", type: "server_error" });
  expect(got.isDone).toBe(false);
  expect(expectedFor(9).text.startsWith(got.text)).toBe(true);
});

test("G4: a stream is held with comments, then ends with a typed error once the time is over", async () => {
  await make({ leader: { dieAfterTokens: 5 }, limits: { holdMs: 600, waitingMs: 100 } });
  const started = performance.now();
  const got = await chunksOf(await openSse(bed.http, "/v1/completions", body(10)));
  expect(performance.now() - started).toBeGreaterThanOrEqual(590);
  expect(got.comments.filter((comment) => comment === ": waiting").length).toBeGreaterThanOrEqual(3);
  expect(got.error).toMatchObject({ code: "hold_expired", type: "server_error" });
  expect(expectedFor(10).text.startsWith(got.text)).toBe(true);
  expect(await metric("muster_gateway_held_streams")).toBe(0);
});

test("G4: an answer that is not streamed ends with 503 and Retry-After after the hold", async () => {
  await make({ leader: { dieAfterTokens: 5 }, limits: { holdMs: 300 } });
  const answer = await ask(bed.http, "/v1/completions", body(10, { stream: false, stream_options: undefined }));
  expect(answer.status).toBe(503);
  expect(answer.headers.get("retry-after")).toBe("5");
  expect(answer.body.error).toMatchObject({ code: "hold_expired" });
});

test("a request that comes while the model is down waits and is served", async () => {
  await make({ leader: "none" });
  bed.controller.tell([servedModel(undefined)]);
  await until(async () => (await ask(bed.http, "/v1/models")).body.data.length === 1);
  const stream = openSse(bed.http, "/v1/completions", body(11));
  await until(async () => (await metric("muster_gateway_held_streams")) === 1);
  await bed.serve();
  expect((await chunksOf(await stream)).text).toBe(expectedFor(11).text);
});

test("a model that has been down for the hold time, or cannot come, is refused at once with its cause", async () => {
  await make({ leader: "none", limits: { holdMs: 200 } });
  bed.controller.tell([servedModel(undefined)]);
  await until(async () => (await ask(bed.http, "/v1/completions", body(1))).status === 503);
  const stopped = servedModel(undefined, {
    phase: Phase.INFEASIBLE,
    cause: "needs 3 more GPUs",
    name: "big",
    aliases: [],
  });
  bed.controller.tell([servedModel(undefined), stopped]);
  await until(async () => (await ask(bed.http, "/v1/models")).body.data.length === 2);
  const answer = await ask(bed.http, "/v1/completions", body(1, { model: "big" }));
  expect(answer.status).toBe(503);
  expect(answer.body.error.message).toContain("needs 3 more GPUs");
});

test("a full queue of the leader is 429 with Retry-After, for streams too", async () => {
  await make({ leader: { refusal: waiting("queue_full", "the queue is full: 8 requests are waiting") } });
  for (const stream of [false, true]) {
    const answer = await ask(bed.http, "/v1/completions", { model: MODEL, prompt: "x", stream });
    expect(answer.status).toBe(429);
    expect(answer.headers.get("retry-after")).toBe("1");
    expect(answer.body.error).toMatchObject({ type: "rate_limit_error", code: "queue_full" });
  }
  expect(await metric('muster_gateway_queue_refusals_total{by="leader"')).toBe(2);
});

test("the gateway's own bound on open requests is 429 too", async () => {
  await make({ leader: { stepMs: 50 }, limits: { openRequestsMax: 2 } });
  const stop = new AbortController();
  const open = [1, 2].map((seed) => openSse(bed.http, "/v1/completions", body(seed), stop.signal));
  await until(() => bed.leaders[0]?.running === 2);
  expect((await ask(bed.http, "/v1/completions", { model: MODEL, prompt: "x" })).status).toBe(429);
  stop.abort();
  await Promise.allSettled(open);
});

test("the prompts of all open requests are bounded together, and given back", async () => {
  await make({ leader: { stepMs: 20 }, limits: { openBytesMax: 3000 } });
  const long = { model: MODEL, prompt: "x".repeat(1000), max_tokens: 20, ignore_eos: true };
  const first = ask(bed.http, "/v1/completions", long);
  await until(() => bed.leaders[0]?.running === 1);
  const refused = await ask(bed.http, "/v1/completions", long);
  expect(refused.status).toBe(429);
  expect(refused.body.error.message).toContain("3000 bytes");
  expect((await first).status).toBe(200);
  expect((await ask(bed.http, "/v1/completions", { ...long, max_tokens: 1 })).status).toBe(200);
});

test("a taken-over stream waits for a place where the new leader's queue is full", async () => {
  await make({ leader: { dieAfterTokens: 8, stepMs: 5 } });
  const streams = [1, 2, 3].map((seed) => openSse(bed.http, "/v1/completions", body(seed)));
  await bed.leaders[0]?.died;
  await bed.serve({ capacity: 1 });
  for (const [index, stream] of streams.entries()) {
    expect((await chunksOf(await stream)).text).toBe(expectedFor(index + 1).text);
  }
});

test("a draining leader's refusal holds the request until another leader is there", async () => {
  await make({ leader: { refusal: transient("draining", "the worker is draining") } });
  const stream = openSse(bed.http, "/v1/completions", body(12));
  await until(() => (bed.leaders[0]?.opens.length ?? 0) > 1);
  await bed.serve();
  expect((await chunksOf(await stream)).text).toBe(expectedFor(12).text);
});

test("a request that kills every leader is given up", async () => {
  await make({ leader: { faultAfterTokens: { tokens: 0, fault: engineLost } } });
  const answer = await ask(
    bed.http,
    "/v1/completions",
    body(1, { stream: false, stream_options: undefined, max_tokens: 64 }),
  );
  expect(answer.status).toBe(500);
  expect(answer.body.error).toMatchObject({ code: "resumes_exhausted" });
  expect(bed.leaders[0]?.opens).toHaveLength(18);
});

test("W1: the controller's death changes nothing; its return is seen", async () => {
  await make();
  const port = Number(bed.controller.address.split(":")[1]);
  bed.controller.kill();
  expect((await ask(bed.http, "/v1/completions", body(1, { stream: false, stream_options: undefined }))).status).toBe(
    200,
  );
  await bed.controller.start(port);
  bed.controller.tell([servedModel(bed.leaders[0], { aliases: ["later"] })]);
  await until(async () => (await ask(bed.http, "/v1/models/later")).status === 200);
});

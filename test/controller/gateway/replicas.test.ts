// Several replicas of one model: who gets what, and what becomes of a stream whose replica dies, drains or is replaced.
import { type ChannelCredentials, credentials } from "@grpc/grpc-js";
import { afterEach, expect, test } from "vitest";
import { seedOfClient } from "../../../controller/gateway/seed.ts";
import { transient } from "../../../proto/fault.ts";
import { Phase, type ServedModel } from "../../../proto/gen/muster/v1/control.ts";
import { noTrust, type Peer } from "../../../proto/trust.ts";
import { type Bed, type BedOptions, MODEL, makeBed, servedModel, until } from "./bed.ts";
import { expectedAnswer, type LeaderOptions, promptIds, type ScriptedLeader } from "./scripted-leader.ts";
import { ask, chunksOf, openSse } from "./sse-client.ts";

let bed: Bed;
const make = async (options: BedOptions = {}) => {
  bed = await makeBed({ leader: "none", ...options });
  return bed;
};
afterEach(() => bed.stop());

const COMPLETIONS = "/v1/completions";
const TOKENS = 40;
const expectedFor = (seed: number, prompt = "ab") => {
  const { low, high } = seedOfClient(seed);
  const rules = { stop: [], maxTokens: TOKENS, ignoreEos: true };
  return expectedAnswer({ prompt: promptIds(prompt), seedLow: low, seedHigh: high }, rules);
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
const CLUSTER = { namespace: "models", deployment: MODEL, aliases: [`models/${MODEL}`] };
const replica = (name: string, leader: ScriptedLeader | undefined, changes: Partial<ServedModel> = {}): ServedModel =>
  servedModel(leader, { ...CLUSTER, replica: name, ...changes });
const metric = async (name: string) => {
  const text = await (await fetch(`${bed.http}/metrics`)).text();
  const line = text.split("\n").find((each) => each.startsWith(name));
  return line === undefined ? 0 : Number(line.split(" ").at(-1));
};

/** Two leaders, told as replicas g0 and g1. */
async function pair(first: Partial<LeaderOptions> = {}, second: Partial<LeaderOptions> = {}) {
  const leaders: [ScriptedLeader, ScriptedLeader] = [await bed.launch(first), await bed.launch(second)];
  bed.controller.tell([replica("g0", leaders[0]), replica("g1", leaders[1])]);
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster?.replicas === 2);
  return leaders;
}

test("many conversations spread over both replicas; metrics say which got how many", async () => {
  await make();
  const leaders = await pair();
  const prompts = Array.from({ length: 64 }, (_, index) => `conversation ${index}`);
  const streams = prompts.map((prompt, seed) => openSse(bed.http, COMPLETIONS, body(seed, { prompt })));
  for (const [seed, stream] of streams.entries()) {
    expect((await chunksOf(await stream)).text).toBe(expectedFor(seed, prompts[seed]).text);
  }
  const counts = leaders.map(({ opens }) => opens.length);
  expect(counts[0] ?? 0).toBeGreaterThan(20);
  expect(counts[1] ?? 0).toBeGreaterThan(20);
  for (const [index, count] of counts.entries()) {
    const name = `muster_gateway_replica_requests_total{model="models/nano",replica="g${index}"`;
    expect(await metric(name)).toBe(count);
  }
});

test("one conversation stays where it is until that is clearly busier; then the other shares", async () => {
  await make();
  const leaders = await pair({ stepMs: 5 }, { stepMs: 5 });
  for (let turn = 0; turn < 6; turn++)
    await ask(bed.http, COMPLETIONS, body(turn, { stream: false, stream_options: null }));
  expect(leaders.map(({ opens }) => opens.length).toSorted()).toEqual([0, 6]);
  const streams = Array.from({ length: 24 }, (_, seed) => openSse(bed.http, COMPLETIONS, body(seed)));
  for (const stream of streams) await chunksOf(await stream);
  for (const { opens } of leaders) expect(opens.length).toBeGreaterThanOrEqual(8);
});

test("the leaders' figures count: a replica that others have filled gets nothing while one is free", async () => {
  await make();
  const [first, second] = await pair({ load: { running: 60, waiting: 10 } }, {});
  await until(async () => (await metric('muster_leader_waiting{model="models/nano",replica="g0"')) === 10);
  await until(async () => (await metric('muster_leader_kv_blocks_free{model="models/nano",replica="g1"')) === 7);
  for (let seed = 0; seed < 12; seed++) {
    await ask(
      bed.http,
      COMPLETIONS,
      body(seed, { prompt: `conversation ${seed}`, stream: false, stream_options: null }),
    );
  }
  expect([first.opens.length, second.opens.length]).toEqual([0, 12]);
});

test("S4: a replica dies after any token: its streams go on at the other at once, with the same tokens and text", async () => {
  await make({ limits: { holdMs: 20_000 } });
  for (const dieAfterTokens of [1, 7, 33, 90]) {
    const [first, second] = await pair({ dieAfterTokens, stepMs: 2, tokensPerStep: 3 }, { dieAfterTokens, stepMs: 2 });
    const streams = Array.from({ length: 8 }, (_, seed) => openSse(bed.http, COMPLETIONS, body(seed)));
    const died = await Promise.race([first.died.then(() => first), second.died.then(() => second)]);
    // The other must live on: what is told next is a leader that does not die.
    const third = await bed.launch({ stepMs: 1 });
    const [deadName, otherName] = died === first ? ["g0", "g1"] : ["g1", "g0"];
    bed.controller.tell([replica(deadName, undefined, { incarnation: 99n }), replica(otherName, third)]);
    for (const [seed, stream] of streams.entries()) {
      const got = await chunksOf(await stream);
      const expected = expectedFor(seed);
      expect({ seed, text: got.text, ids: got.ids }).toEqual({ seed, text: expected.text, ids: expected.ids });
      expect(got.usage.muster.numerics_changed).toBeUndefined();
    }
    for (const leader of [first, second, third]) leader.kill();
  }
  expect(await metric("muster_gateway_resumes_total")).toBeGreaterThan(0);
});

test("S4: nobody need tell that it died: the view still shows both, and the streams go on without a wait", async () => {
  await make({ limits: { holdMs: 5_000, waitingMs: 50 } });
  const [first, second] = await pair({ stepMs: 5 }, { stepMs: 5 });
  const stream = await openSse(bed.http, COMPLETIONS, body(3)); // it has begun
  const [busy, other] = first.running === 1 ? [first, second] : [second, first];
  busy.kill();
  const got = await chunksOf(stream);
  expect(got.text).toBe(expectedFor(3).text);
  expect(got.usage.muster.resumes).toBe(1);
  expect(got.comments).toEqual([]);
  expect(other.opens).toHaveLength(1);
});

test("R1: the replica of the same numerics id takes over first; another one is counted and marked", async () => {
  await make();
  const leaders = [
    await bed.launch({ numericsId: "cpu-a", stepMs: 5 }),
    await bed.launch({ numericsId: "cpu-b", load: { running: 0 }, stepMs: 5 }),
    await bed.launch({ numericsId: "cpu-a", load: { running: 50 }, stepMs: 5 }),
  ];
  const [first, odd, twin] = leaders;
  bed.controller.tell([replica("g0", first)]);
  await until(async () => (await ask(bed.http, "/readyz")).status === 200);
  const stream = await openSse(bed.http, COMPLETIONS, body(4));
  bed.controller.tell([replica("g0", first), replica("g1", odd), replica("g2", twin)]);
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster.replicas === 3);
  first?.kill();
  await until(async () => (await metric("muster_gateway_resumes_total")) === 1);
  expect(twin?.opens).toHaveLength(1);
  twin?.kill();
  const got = await chunksOf(stream);
  expect(got.text).toBe(expectedFor(4).text);
  expect(odd?.opens).toHaveLength(1);
  expect(got.usage.muster).toMatchObject({ resumes: 2, numerics_changed: true });
  expect(await metric("muster_gateway_numerics_changes_total")).toBe(1);
});

test("R2, P3: a replica that drains gets nothing new and ends what it has, whatever its status says meanwhile", async () => {
  await make();
  const [first, second] = await pair({ stepMs: 20 }, { stepMs: 1 });
  const conversations = Array.from({ length: 24 }, (_, index) => `conversation ${index}`);
  const streams = conversations.map((prompt, seed) => openSse(bed.http, COMPLETIONS, body(seed, { prompt })));
  await until(() => first.running > 0);
  bed.controller.tell([replica("g0", first, { draining: true }), replica("g1", second)]);
  // What is said is how many take new requests.
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster.replicas === 1);
  // As the controller says it once the group stops: no leader, the next incarnation.
  const stopped = { phase: Phase.STOPPED, leaderAddress: "", incarnation: 99n, draining: true };
  bed.controller.tell([replica("g0", first, stopped), replica("g1", second)]);
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster.replicas === 1);
  const [before, running] = [first.opens.length, first.running];
  expect(running).toBeGreaterThan(0);
  for (let seed = 0; seed < 24; seed++) {
    const prompt = conversations[seed];
    await ask(bed.http, COMPLETIONS, body(seed, { prompt, stream: false, stream_options: null }));
  }
  for (const [seed, stream] of streams.entries()) {
    const got = await chunksOf(await stream);
    expect(got.text).toBe(expectedFor(seed, conversations[seed]).text);
    expect(got.usage.muster.resumes).toBeUndefined();
  }
  expect(first.opens).toHaveLength(before);
  expect(first.cancels).toEqual([]);
});

test("R4: while a revision is replaced new requests go to the wanted one; what runs on the old one ends there", async () => {
  await make();
  const old = await bed.launch({ revision: "r1", stepMs: 20 });
  const next = await bed.launch({ revision: "r2" });
  bed.controller.tell([replica("g0", old)]);
  await until(async () => (await ask(bed.http, "/readyz")).status === 200);
  const stream = openSse(bed.http, COMPLETIONS, body(1));
  await until(() => old.running === 1);
  bed.controller.tell([replica("g1", next), replica("g0", old)]);
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster.replicas === 2);
  for (let seed = 0; seed < 8; seed++) {
    await ask(bed.http, COMPLETIONS, body(seed, { prompt: `other ${seed}`, stream: false, stream_options: null }));
  }
  expect(next.opens).toHaveLength(8);
  expect((await chunksOf(await stream)).text).toBe(expectedFor(1).text);
  expect(old.opens).toHaveLength(1);
});

test("R1: what has begun waits for its own revision while that may come back, and ends with its name when it is gone", async () => {
  await make();
  const [old, next] = [await bed.launch({ revision: "r1", stepMs: 10 }), await bed.launch({ revision: "r2" })];
  const streams: Response[] = [];
  bed.controller.tell([replica("g0", old)]);
  await until(async () => (await ask(bed.http, "/readyz")).status === 200);
  for (const seed of [1, 2]) streams.push(await openSse(bed.http, COMPLETIONS, body(seed)));
  bed.controller.tell([replica("g1", next), replica("g0", old)]);
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster.replicas === 2);
  const told = [replica("g1", next), replica("g0", undefined, { revision: "r1", incarnation: 9n })];
  bed.controller.tell(told);
  old.kill();
  await until(async () => (await metric("muster_gateway_held_streams")) === 2);
  const back = await bed.launch({ revision: "r1", incarnation: 10n, dieAfterTokens: 10 });
  bed.controller.tell([replica("g1", next), replica("g0", back)]);
  await back.died;
  bed.controller.tell([replica("g1", next)]);
  for (const stream of streams) {
    const got = await chunksOf(stream);
    expect(got.error).toMatchObject({ code: "revision_changed" });
  }
  expect(next.opens).toHaveLength(0);
});

test("what has begun on a revision that drains ends with its name as soon as that is gone, whenever the next one serves", async () => {
  await make();
  const old = await bed.launch({ revision: "r1", stepMs: 100 });
  bed.controller.tell([replica("g0", old)]);
  await until(async () => (await ask(bed.http, "/readyz")).status === 200);
  const stream = await openSse(bed.http, COMPLETIONS, body(1));
  await until(() => old.running === 1);
  const coming = replica("g1", undefined, { revision: "r2" });
  bed.controller.tell([coming, replica("g0", old, { draining: true })]);
  bed.controller.tell([coming, replica("g0", undefined, { revision: "r1", draining: true })]);
  old.kill();
  expect((await chunksOf(stream)).error).toMatchObject({ code: "revision_changed" });
});

test("streams and whole answers name the revision that they come from", async () => {
  await make();
  const leader = await bed.launch({ revision: "0123456789abcdef" });
  bed.controller.tell([replica("g0", leader)]);
  await until(async () => (await ask(bed.http, "/readyz")).status === 200);
  const stream = await chunksOf(await openSse(bed.http, COMPLETIONS, body(1)));
  expect([...stream.fingerprints]).toEqual(["0123456789ab"]);
  const whole = await ask(bed.http, COMPLETIONS, body(1, { stream: false, stream_options: null }));
  expect(whole.body.system_fingerprint).toBe("0123456789ab");
});

test("a full queue of one replica is another one's work; only when all are full the client hears of it", async () => {
  await make();
  const full = { capacity: 0 };
  const [first, second] = await pair(full, {});
  for (let seed = 0; seed < 16; seed++) {
    const more = { prompt: `conversation ${seed}`, stream: false, stream_options: null };
    expect((await ask(bed.http, COMPLETIONS, body(seed, more))).status).toBe(200);
  }
  expect(second.opens).toHaveLength(16);
  expect(first.opens.length).toBeGreaterThan(0);
  const third = await bed.launch(full);
  bed.controller.tell([replica("g0", first), replica("g1", third)]);
  await until(() => second.streams === 1 && third.streams === 1);
  const refused = await ask(bed.http, COMPLETIONS, body(1, { stream: false, stream_options: null }));
  expect(refused.status).toBe(429);
});

test("a worker that refuses because it drains is left at once for another", async () => {
  await make({ limits: { holdMs: 3_000 } });
  const [first, second] = await pair({ refusal: transient("draining", "the worker is draining") }, {});
  for (let seed = 0; seed < 16; seed++) {
    const got = await chunksOf(await openSse(bed.http, COMPLETIONS, body(seed, { prompt: `conversation ${seed}` })));
    expect(got.text).toBe(expectedFor(seed, `conversation ${seed}`).text);
  }
  expect(first.opens.length).toBeGreaterThan(0);
  expect(second.opens).toHaveLength(16);
});

test("a model asleep: the request is held with phase and cause, wakes with it, and is served when a replica comes", async () => {
  await make({ limits: { holdMs: 100, wakeMs: 20_000, waitingMs: 50 }, gateway: { readyWithoutModels: true } });
  bed.controller.tell([servedModel(undefined, { ...CLUSTER, phase: Phase.STOPPED, cause: "asleep", revision: "" })]);
  await until(async () => (await ask(bed.http, "/readyz")).status === 200);
  const stream = follow(await openSse(bed.http, COMPLETIONS, body(5))); // its head came with the first comment
  expect(await metric("muster_gateway_held_streams")).toBe(1);
  const evil = "1 of 2\n\ndata: forged\r\nGB";
  bed.controller.tell([replica("g0", undefined, { phase: Phase.LOADING, cause: evil })]);
  await until(() => stream.text().includes("loading"));
  bed.controller.tell([replica("g0", await bed.launch())]);
  const got = await chunksOf(new Response(await stream.ended));
  expect(got.text).toBe(expectedFor(5).text);
  expect(got.comments).toContain(": waiting: stopped: asleep");
  expect(got.comments).toContain(": waiting: loading: 1 of 2 data: forged GB");
});

test("a model that does not wake in time ends with a typed error that says why", async () => {
  await make({ limits: { holdMs: 60_000, wakeMs: 200 }, gateway: { readyWithoutModels: true } });
  bed.controller.tell([servedModel(undefined, { ...CLUSTER, phase: Phase.CAPACITY_SHORT, cause: "2 GPUs short" })]);
  await until(async () => (await ask(bed.http, "/readyz")).status === 200);
  const answer = await ask(bed.http, COMPLETIONS, body(1, { stream: false, stream_options: null }));
  expect(answer.status).toBe(503);
  expect(answer.body.error).toMatchObject({ code: "model_not_serving" });
  expect(answer.body.error.message).toContain("capacity short: 2 GPUs short");
});

test("a model that a person has scaled to zero is refused at once; one of two namespaces is asked for by both names", async () => {
  await make({ gateway: { readyWithoutModels: true } });
  const leader = await bed.launch();
  const off = { namespace: "other", aliases: ["other/nano"], phase: Phase.STOPPED, cause: "no replicas are wanted" };
  bed.controller.tell([replica("g0", leader), servedModel(undefined, off)]);
  await until(async () => (await ask(bed.http, "/v1/models")).body.data?.length === 2);
  const ambiguous = await ask(bed.http, COMPLETIONS, body(1));
  expect(ambiguous.status).toBe(400);
  expect(ambiguous.body.error).toMatchObject({ param: "model" });
  expect(ambiguous.body.error.message).toContain("models/nano, other/nano");
  const refused = await ask(bed.http, COMPLETIONS, body(1, { model: "other/nano" }));
  expect(refused.status).toBe(503);
  expect(refused.body.error.message).toContain("no replicas are wanted");
  const served = await ask(
    bed.http,
    COMPLETIONS,
    body(1, { model: "models/nano", stream: false, stream_options: null }),
  );
  expect(served.body).toMatchObject({ model: "models/nano", choices: [{ text: expectedFor(1).text }] });
});

test("ready before a state was told: never; after it without a model: only where that is asked for", async () => {
  await make({ gateway: { readyWithoutModels: true } });
  await until(async () => (await ask(bed.http, "/readyz")).status === 200); // the empty state has been told
  await bed.stop();
  await make();
  await until(async () => (await metric("muster_gateway_controller_connected")) === 1);
  const answer = await ask(bed.http, "/readyz");
  expect([answer.status, answer.body.status]).toEqual([503, "no model is serving"]);
});

test("links to leaders are opened with the trust that was given, for the worker of that group", async () => {
  const peers: Peer[] = [];
  const channel = (peer: Peer): ChannelCredentials => {
    peers.push(peer);
    return credentials.createInsecure();
  };
  await make({ gateway: { trust: { ...noTrust, channel } } });
  await pair();
  expect(peers).toEqual([
    { role: "worker", namespace: "models", group: "g0" },
    { role: "worker", namespace: "models", group: "g1" },
  ]);
});

/** Reads a stream as it comes. */
function follow(response: Response): { text: () => string; ended: Promise<string> } {
  let got = "";
  const read = async () => {
    const decoder = new TextDecoder();
    for await (const piece of response.body ?? []) got += decoder.decode(piece, { stream: true });
    return got;
  };
  return { text: () => got, ended: read() };
}

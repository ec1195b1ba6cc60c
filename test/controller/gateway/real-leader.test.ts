// The gateway in front of a real worker: its service, leader, scheduler, KV pool and tokenizer, over the table engine.
import { credentials } from "@grpc/grpc-js";
import { pino } from "pino";
import { afterEach, expect, test } from "vitest";
import { ModelSpec, ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import { LoadRequest, WorkerClient } from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { runWorker } from "../../../worker/serve/main.ts";
import { TableEngine } from "../../worker/schedule/table-engine.ts";
import { EOS, nanoSpec, tableDefaults } from "../../worker/serve/harness.ts";
import { type Bed, MODEL, makeBed, servedModel, until } from "./bed.ts";
import { ask, chunksOf, openSse } from "./sse-client.ts";

const CONTEXT = 400;
const quiet = pino({ level: "silent" });

let bed: Bed | undefined;
const workers: { stop: AbortController; ended: Promise<unknown> }[] = [];
afterEach(async () => {
  await bed?.stop();
  bed = undefined;
  for (const { stop, ended } of workers.splice(0)) {
    stop.abort();
    await ended.catch(() => {});
  }
});

type Worker = {
  address: string;
  stop: AbortController;
  ended: Promise<unknown>;
  engine: () => TableEngine | undefined;
};

async function startWorker(incarnation: bigint): Promise<Worker> {
  let engine: TableEngine | undefined;
  const backend = {
    listen: () => ({ address: "127.0.0.1:1" }),
    openEngine: async () => (engine = new TableEngine({ ...tableDefaults, boost: new Map([[EOS, 1]]) })),
  };
  const stop = new AbortController();
  const { promise, resolve } = Promise.withResolvers<string>();
  const run = { listen: "127.0.0.1:0", incarnation, worker: 0, backend, log: quiet, drainMs: 1 };
  const ended = runWorker({ ...run, onListening: resolve }, stop.signal);
  ended.catch(() => {});
  const address = await promise;
  workers.push({ stop, ended });
  const client = new WorkerClient(address, credentials.createInsecure(), channelOptions);
  for await (const progress of client.load(loadRequest(incarnation, address))) expect(progress.fault).toBeUndefined();
  client.close();
  return { address, stop, ended, engine: () => engine };
}

function loadRequest(incarnation: bigint, address: string): LoadRequest {
  const { rowsMax, tokensMax, verifyMax, slotsMax, vocab, blockTokens, blocks } = tableDefaults;
  const model = ModelSpec.fromPartial({
    name: "table",
    vocabSize: vocab,
    contextTokens: CONTEXT,
    stopIds: [EOS],
    tokenizer: nanoSpec,
  });
  const plan = ShardPlan.fromPartial({
    revision: "r1",
    model,
    workers: 1,
    contextTokens: CONTEXT,
    kvBlockTokens: blockTokens,
    kvBlocks: blocks,
  });
  return LoadRequest.fromPartial({
    incarnation,
    plan,
    worker: 0,
    workerAddresses: [address],
    engine: { rowsMax, tokensMax, verifyMax, slotsMax, logprobsMax: 21 },
    limits: { queueMax: 64, runningMax: 16 },
  });
}

function tell(made: Bed, worker: Worker | undefined, incarnation: bigint): void {
  const served = servedModel(undefined, { contextTokens: CONTEXT });
  const phase = { phase: 8 as const, leaderAddress: worker?.address ?? "", incarnation };
  made.controller.tell([worker ? { ...served, ...phase } : served]);
}

const COMPLETIONS = "/v1/completions";
const body = (seed: number, more: object = {}) => ({
  model: MODEL,
  prompt: "We the people",
  seed,
  max_tokens: 60,
  temperature: 0.8,
  presence_penalty: 0.3,
  ignore_eos: true,
  ...more,
});

async function makeReal(): Promise<{ made: Bed; worker: Worker }> {
  const made = await makeBed({ leader: "none" });
  bed = made;
  const worker = await startWorker(1n);
  tell(made, worker, 1n);
  await until(async () => (await ask(made.http, "/readyz")).status === 200);
  return { made, worker };
}

test("streamed, whole and chat answers, usage and log-probabilities of a real leader", async () => {
  const { made } = await makeReal();
  const whole = await ask(made.http, COMPLETIONS, body(1, { muster: { return_token_ids: true } }));
  expect(whole.status).toBe(200);
  expect(whole.body.usage).toMatchObject({ completion_tokens: 60 });
  const streamed = await chunksOf(await openSse(made.http, COMPLETIONS, body(1, { stream: true })));
  expect(streamed.text).toBe(whole.body.choices[0].text);
  const ids = whole.body.choices[0].muster.prompt_token_ids;
  const byIds = await ask(made.http, COMPLETIONS, body(1, { prompt: ids }));
  expect(byIds.body.choices[0].text).toBe(streamed.text);
  const logprobs = await ask(made.http, COMPLETIONS, body(1, { logprobs: 3 }));
  expect(logprobs.body.choices[0].logprobs.token_logprobs).toHaveLength(60);
  const chat = { model: MODEL, messages: [{ role: "user", content: "We" }], max_tokens: 10, seed: 1 };
  expect((await ask(made.http, "/v1/chat/completions", chat)).status).toBe(200);
  const long = await ask(made.http, COMPLETIONS, body(1, { prompt: "x ".repeat(900) }));
  expect(long.body.error).toMatchObject({ code: "context_length_exceeded", message: expect.stringMatching(/400/) });
});

test("G1: sixteen streams over a dying worker are the streams of an undisturbed one", async () => {
  const { made, worker } = await makeReal();
  const seeds = Array.from({ length: 16 }, (_, seed) => seed);
  const undisturbed = await Promise.all(
    seeds.map((seed) => ask(made.http, COMPLETIONS, body(seed, { max_tokens: 300 }))),
  );
  const before = worker.engine()?.seen.steps ?? 0;
  const streams = seeds.map((seed) => openSse(made.http, COMPLETIONS, body(seed, { max_tokens: 300, stream: true })));
  await until(() => (worker.engine()?.seen.steps ?? 0) > before + 60);
  worker.stop.abort();
  tell(made, undefined, 1n);
  const next = await startWorker(2n);
  tell(made, next, 2n);
  for (const [seed, stream] of streams.entries()) {
    const got = await chunksOf(await stream);
    expect({ seed, text: got.text }).toEqual({ seed, text: undisturbed[seed]?.body.choices[0].text });
  }
  expect(next.engine()?.seen.opens).toBeGreaterThanOrEqual(16);
});

test("a client abort frees the KV blocks of a real leader", async () => {
  const { made, worker } = await makeReal();
  const free = async () => {
    const line = /^muster_leader_kv_blocks_free\{.*\} (\d+)/m.exec((await ask(made.http, "/metrics")).body);
    return Number(line?.[1] ?? -1);
  };
  await until(async () => (await free()) > 0);
  const before = await free();
  const stop = new AbortController();
  const more = { max_tokens: 380, stream: true, n: 4 };
  const stream = await openSse(made.http, COMPLETIONS, body(1, more), stop.signal);
  const steps = worker.engine()?.seen.steps ?? 0;
  stop.abort();
  await stream.text().catch(() => {});
  await until(async () => (await free()) === before);
  // It was the abort: 4 x 380 tokens need 380 steps at least.
  expect((worker.engine()?.seen.steps ?? 0) - steps).toBeLessThan(300);
});

// Workers over the native engine and nano-maverick: golden tokens through gRPC, and the same bits for any company.
import { mkdtempSync, rmSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { credentials } from "@grpc/grpc-js";
import { pino } from "pino";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { slicesOf } from "../../../controller/model/shards.ts";
import {
  type Chunk,
  LoadRequest,
  Open,
  type SubmitResponse,
  WorkerClient,
  WorkerPhase,
  type WorkerStats,
} from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { runWorker } from "../../../worker/serve/main.ts";
import { planOf, ROOT, readPlaced } from "../engine/open.ts";
import { sampled } from "./harness.ts";

const INCARNATION = 3n;
const GAP_MIN = 1e-3;

type Greedy = { prompt: string; prompt_ids: number[]; greedy: number[]; text: string; top2_gap: number[] };

class Group {
  readonly #folder = mkdtempSync(join(tmpdir(), "muster-"));
  readonly #stop = new AbortController();
  #ended: Promise<void>[] = [];
  #clients: WorkerClient[] = [];

  async start(workers: number, engine: { tokensMax: number; kvBlocks: number }): Promise<void> {
    const model = await readPlaced("test/models/nano-maverick/");
    const placed = planOf(model, { ranks: workers, ep: workers, workers });
    const plan = { ...placed, kvBlocks: engine.kvBlocks };
    const addresses = Array.from({ length: workers }, (_, index) => `unix:${this.#folder}/${index}.sock`);
    for (const [worker, listen] of addresses.entries()) {
      const log = pino({ level: "silent" });
      const listening = Promise.withResolvers<string>();
      const run = { listen, incarnation: INCARNATION, worker, log, drainMs: 100, onListening: listening.resolve };
      this.#ended.push(runWorker(run, this.#stop.signal));
      await listening.promise;
      this.#clients.push(new WorkerClient(listen, credentials.createInsecure(), channelOptions));
    }
    const describe = (client: WorkerClient) =>
      new Promise<string>((done) =>
        client.describe({ incarnation: INCARNATION }, (_, found) => done(found.commAddress)),
      );
    const commAddresses = await Promise.all(this.#clients.map(describe));
    const load = async (client: WorkerClient, worker: number) => {
      const request = LoadRequest.fromPartial({
        incarnation: INCARNATION,
        plan,
        worker,
        slices: slicesOf(plan, worker),
        commAddresses,
        workerAddresses: addresses,
        engine: { tokensMax: engine.tokensMax, rowsMax: 16, slotsMax: 20, threads: 1 },
        limits: { queueMax: 32, runningMax: 16 },
      });
      let phase: WorkerPhase = WorkerPhase.IDLE;
      for await (const progress of client.load(request)) {
        expect(progress.fault).toBeUndefined();
        phase = progress.phase;
      }
      expect(phase).toBe(WorkerPhase.SERVING);
    };
    await Promise.all(this.#clients.map(load));
  }

  async answers(opens: Partial<Open>[]): Promise<{ tokens: number[]; text: string }[]> {
    const [leader] = this.#clients;
    if (leader === undefined) throw new Error("the group was not started");
    const call = leader.submit();
    const chunks = opens.map((): Chunk[] => []);
    for (const [id, open] of opens.entries()) {
      const value = Open.fromPartial({ ...open, id });
      call.write({ incarnation: INCARNATION, kind: { $case: "open", value } });
    }
    call.end();
    const responses: AsyncIterable<SubmitResponse> = call;
    for await (const response of responses) for (const chunk of response.chunks) chunks[chunk.id]?.push(chunk);
    return chunks.map((all) => {
      expect(all.at(-1)?.finish?.fault).toBeUndefined();
      return { tokens: all.flatMap(({ tokens }) => tokens), text: all.map(({ text }) => text).join("") };
    });
  }

  async preemptions(): Promise<bigint> {
    const [leader] = this.#clients;
    if (leader === undefined) throw new Error("the group was not started");
    const call = leader.stats({ incarnation: INCARNATION });
    call.on("error", () => {}); // it is cancelled
    const stats = await new Promise<WorkerStats>((done) => call.once("data", done));
    call.cancel();
    return stats.preemptions;
  }

  async stop(): Promise<void> {
    this.#stop.abort();
    for (const client of this.#clients) client.close();
    await Promise.allSettled(this.#ended);
    rmSync(this.#folder, { recursive: true });
  }
}

const golden: { greedy: Greedy[] } = JSON.parse(
  await readFile(new URL("test/models/nano-maverick/golden.json", ROOT), "utf8"),
);

/** Sampled requests of different lengths; alone on a wide step they give what they must give in any company. */
const requests: Partial<Open>[] = Array.from({ length: 8 }, (_, index) => ({
  input: { $case: "text", value: "The Congress of the United States ".repeat(1 + (index % 4)) },
  maxTokens: 60 + index,
  sampling: sampled(0.8, { presencePenalty: index % 2 }),
  seedLow: BigInt(index + 1),
  seedHigh: 77n,
}));

describe.each([1, 2])("%i worker(s) of one rank, native engine", (workers) => {
  const roomy = new Group();
  const tight = new Group();
  beforeAll(async () => {
    await roomy.start(workers, { tokensMax: 256, kvBlocks: 200 });
    // 8 blocks of 16 tokens for sequences of up to 96: most of the eight are preempted at some time.
    await tight.start(workers, { tokensMax: 7, kvBlocks: 9 });
  });
  afterAll(async () => {
    await roomy.stop();
    await tight.stop();
  });

  test("greedy answers are the golden ones as far as the gap allows, text included", async () => {
    const opens = golden.greedy.map(({ prompt, greedy }): Partial<Open> => {
      return { input: { $case: "text", value: prompt }, maxTokens: greedy.length, ignoreEos: true };
    });
    const answers = await roomy.answers(opens);
    for (const [index, { greedy, text, top2_gap }] of golden.greedy.entries()) {
      const close = top2_gap.findIndex((gap) => gap <= GAP_MIN);
      const sure = close < 0 ? greedy.length : close;
      expect(answers[index]?.tokens.slice(0, sure)).toEqual(greedy.slice(0, sure));
      if (sure === greedy.length) expect(answers[index]?.text).toBe(text);
    }
  });

  test("sampled answers are bitwise the same alone, in a batch, in small chunks and under preemption", async () => {
    const alone: { tokens: number[]; text: string }[] = [];
    for (const request of requests) alone.push(...(await roomy.answers([request])));
    expect(await roomy.answers(requests)).toEqual(alone);
    expect(await tight.answers(requests)).toEqual(alone);
    expect(await tight.preemptions()).toBeGreaterThan(0n);
  });
});

// Workers of a test as servers on unix sockets, over table engines; they end with the test.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { credentials, type ServiceError } from "@grpc/grpc-js";
import { pino } from "pino";
import { afterEach } from "vitest";
import { ModelSpec, ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import {
  type Chunk,
  type LoadProgress,
  LoadRequest,
  Open,
  type SubmitResponse,
  WorkerClient,
} from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { runWorker } from "../../../worker/serve/main.ts";
import type { Localise } from "../../../worker/serve/role.ts";
import { TableEngine } from "../schedule/table-engine.ts";
import { EOS, nanoSpec, tableDefaults } from "./harness.ts";

export const INCARNATION = 7n;
export const CONTEXT = 400;
const quiet = pino({ level: "silent" });

export type More = { podUid?: string; drainMs?: number; localise?: Localise };
export const same = (engine: TableEngine): TableEngine => engine;

export class Worker {
  readonly address: string;
  readonly client: WorkerClient;
  readonly stop = new AbortController();
  readonly ended: Promise<void>;
  readonly listening: Promise<string>;
  engine: TableEngine | undefined;
  constructor(folder: string, index = 0, tweak = same, more: More = {}) {
    this.address = `unix:${folder}/worker-${index}.sock`;
    let heard: (address: string) => void = () => {};
    this.listening = new Promise((resolve) => (heard = resolve));
    const backend = {
      listen: () => ({ address: "127.0.0.1:1" }),
      openEngine: async () => (this.engine = tweak(new TableEngine({ ...tableDefaults, boost: new Map([[EOS, 1]]) }))),
    };
    const { address: listen } = this;
    const run = {
      listen,
      incarnation: INCARNATION,
      worker: index,
      backend,
      log: quiet,
      drainMs: 200,
      ...more,
      onListening: heard,
    };
    this.ended = runWorker(run, this.stop.signal);
    this.ended.catch(() => {});
    this.client = new WorkerClient(this.address, credentials.createInsecure(), channelOptions);
  }
}

export const workers: Worker[] = [];
const folders: string[] = [];
afterEach(async () => {
  for (const worker of workers.splice(0)) {
    worker.stop.abort();
    worker.client.close();
    await worker.ended.catch(() => {});
  }
  for (const folder of folders.splice(0)) rmSync(folder, { recursive: true });
});

export function folder(): string {
  const made = mkdtempSync(join(tmpdir(), "muster-"));
  folders.push(made);
  return made;
}

export async function start(where: string, index = 0, tweak = same, more: More = {}): Promise<Worker> {
  const worker = new Worker(where, index, tweak, more);
  workers.push(worker);
  await worker.listening;
  return worker;
}

export function loadRequest(index: number, addresses: string[]): LoadRequest {
  const { rowsMax, tokensMax, verifyMax, slotsMax, vocab } = tableDefaults;
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
    workers: addresses.length,
    contextTokens: CONTEXT,
    kvBlockTokens: tableDefaults.blockTokens,
    kvBlocks: tableDefaults.blocks,
  });
  return LoadRequest.fromPartial({
    incarnation: INCARNATION,
    plan,
    worker: index,
    workerAddresses: addresses,
    engine: { rowsMax, tokensMax, verifyMax, slotsMax },
    limits: { queueMax: 4, runningMax: 16 },
  });
}

export async function load(worker: Worker, request: LoadRequest): Promise<LoadProgress[]> {
  const seen: LoadProgress[] = [];
  for await (const progress of worker.client.load(request)) seen.push(progress);
  return seen;
}

export const failure = (act: (done: (error: ServiceError | null) => void) => void): Promise<ServiceError | null> =>
  new Promise(act);

/** Opens all on one stream and reads it to its end. */
export async function submit(worker: Worker, opens: Partial<Open>[]): Promise<Map<number, Chunk[]>> {
  const call = worker.client.submit();
  const chunks = new Map<number, Chunk[]>();
  for (const [index, open] of opens.entries()) {
    const value = Open.fromPartial({ id: index + 1, ...open });
    call.write({ incarnation: index === 0 ? INCARNATION : 0n, kind: { $case: "open", value } });
  }
  call.end();
  const responses: AsyncIterable<SubmitResponse> = call;
  for await (const response of responses) {
    for (const chunk of response.chunks) chunks.set(chunk.id, [...(chunks.get(chunk.id) ?? []), chunk]);
  }
  return chunks;
}

export const tokensOf = (chunks: Chunk[] | undefined) => chunks?.flatMap(({ tokens }) => tokens);
export const finishOf = (chunks: Chunk[] | undefined) => chunks?.at(-1)?.finish;
export const prompt = (value: string): Partial<Open> => ({ input: { $case: "text", value }, maxTokens: 30 });

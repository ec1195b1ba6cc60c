// Experts that move under a running stream, through gRPC: two workers over the native engine stage a map, the leader switches.
import { mkdtempSync, rmSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { credentials } from "@grpc/grpc-js";
import { pino } from "pino";
import { afterAll, beforeAll, expect, test } from "vitest";
import { expertSlices, planMap } from "../../../controller/model/expert-slices.ts";
import { slicesOf } from "../../../controller/model/shards.ts";
import type { ExpertLoadResponse } from "../../../proto/gen/muster/v1/experts.ts";
import type { ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import {
  type Chunk,
  LoadRequest,
  Open,
  StageExpertsRequest,
  type SubmitResponse,
  WorkerClient,
  type WorkerDescription,
} from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { runWorker } from "../../../worker/serve/main.ts";
import { planOf, ROOT, readPlaced } from "../engine/open.ts";

const INCARNATION = 5n;
const GAP_MIN = 1e-3;
const DEALT = [6, 1, 3, 4, 0, 5, 2, 7];
const MOE_LAYERS = 2;

type Greedy = { prompt_ids: number[]; greedy: number[]; min_top2_gap: number };
const golden: { greedy: Greedy[] } = JSON.parse(
  await readFile(new URL("test/models/nano-maverick/golden.json", ROOT), "utf8"),
);

const folder = mkdtempSync(join(tmpdir(), "muster-"));
const stop = new AbortController();
const ended: Promise<void>[] = [];
const clients: WorkerClient[] = [];
let plan: ShardPlan;

const unary = <T>(call: (answer: (error: Error | null, value: T) => void) => unknown): Promise<T> =>
  new Promise((resolve, reject) => call((error, value) => (error ? reject(error) : resolve(value))));
const described = (client: WorkerClient) =>
  unary<WorkerDescription>((answer) => client.describe({ incarnation: INCARNATION }, answer));
const leader = (): WorkerClient => {
  const [first] = clients;
  if (first === undefined) throw new Error("the group was not started");
  return first;
};

beforeAll(async () => {
  const model = await readPlaced("test/models/nano-maverick/");
  plan = { ...planOf(model, { ranks: 2, ep: 2, workers: 2 }), kvBlocks: 200 };
  const addresses = [0, 1].map((index) => `unix:${folder}/${index}.sock`);
  for (const [worker, listen] of addresses.entries()) {
    const listening = Promise.withResolvers<string>();
    const run = { listen, incarnation: INCARNATION, worker, log: pino({ level: "silent" }), drainMs: 100 };
    ended.push(runWorker({ ...run, onListening: listening.resolve }, stop.signal));
    await listening.promise;
    clients.push(new WorkerClient(listen, credentials.createInsecure(), channelOptions));
  }
  const commAddresses = (await Promise.all(clients.map(described))).map(({ commAddress }) => commAddress);
  const loads = clients.map(async (client, worker) => {
    const engine = { tokensMax: 256, rowsMax: 16, slotsMax: 20, threads: 1 };
    const where = { incarnation: INCARNATION, plan, worker, commAddresses, workerAddresses: addresses };
    const load = client.load(LoadRequest.fromPartial({ ...where, slices: slicesOf(plan, worker), engine }));
    for await (const { fault } of load) expect(fault).toBeUndefined();
  });
  await Promise.all(loads);
});

afterAll(async () => {
  stop.abort();
  for (const client of clients) client.close();
  await Promise.allSettled(ended);
  rmSync(folder, { recursive: true });
});

test("a stream goes on over the switch, says so, and everybody has the new numerics id", async () => {
  const [before] = await Promise.all(clients.map(described));
  const next = { version: 1, ...layersOf(DEALT) };
  const current = planMap(plan);
  const staging = clients.map((client, worker) => {
    const slices = expertSlices(plan, { current, next }, worker);
    const request = StageExpertsRequest.fromPartial({ incarnation: INCARNATION, map: next, slices });
    return unary((answer) => client.stageExperts(request, answer));
  });
  await Promise.all(staging);
  const sure = golden.greedy.filter(({ min_top2_gap }) => min_top2_gap > GAP_MIN);
  expect(sure.length).toBeGreaterThan(1);
  const call = leader().submit();
  const chunks = sure.map((): Chunk[] => []);
  for (const [id, { prompt_ids: ids, greedy }] of sure.entries()) {
    const wish = { id, input: { $case: "prompt", value: { ids } }, maxTokens: greedy.length, ignoreEos: true } as const;
    call.write({ incarnation: INCARNATION, kind: { $case: "open", value: Open.fromPartial(wish) } });
  }
  call.end();
  const tokensOf = (id: number) => chunks[id]?.flatMap(({ tokens }) => tokens) ?? [];
  let switched: Promise<{ numericsId: string }> | undefined;
  const responses: AsyncIterable<SubmitResponse> = call;
  for await (const response of responses) {
    for (const chunk of response.chunks) chunks[chunk.id]?.push(chunk);
    if (tokensOf(0).length < 4) continue;
    switched ??= unary((answer) => leader().switchExperts({ incarnation: INCARNATION, version: 1 }, answer));
  }
  const numericsId = (await switched)?.numericsId ?? "";
  expect(numericsId.startsWith(`${before?.numericsId}-x`)).toBe(true);
  for (const [id, { greedy }] of sure.entries()) expect(tokensOf(id)).toEqual(greedy);
  expect(chunks.map((all) => all.at(-1)?.finish?.numericsChanged)).toEqual(sure.map(() => true));
  const after = await Promise.all(clients.map(described));
  expect(after.map((one) => one.numericsId)).toEqual([numericsId, numericsId]);
});

test("the leader counts what every expert has served, and which map it was", async () => {
  const load = await unary<ExpertLoadResponse>((answer) => leader().expertLoad({ incarnation: INCARNATION }, answer));
  expect(load.map).toEqual({ version: 1, ...layersOf(DEALT) });
  expect(load.layers.map(({ block }) => block)).toEqual(layersOf(DEALT).layers.map(({ block }) => block));
  const sums = load.layers.map(({ tokens }) => tokens.reduce((sum, count) => sum + count, 0n));
  expect(sums).toHaveLength(MOE_LAYERS);
  expect(sums[0]).toBe(sums[1]);
  expect(sums[0]).toBeGreaterThan(0n);
});

test("an idle group switches at once; a follower, another incarnation and a map that is not staged are refused", async () => {
  const next = { ...planMap(plan), version: 2 };
  const current = { version: 1, ...layersOf(DEALT) };
  const staging = clients.map((client, worker) => {
    const slices = expertSlices(plan, { current, next }, worker);
    const request = StageExpertsRequest.fromPartial({ incarnation: INCARNATION, map: next, slices });
    return unary((answer) => client.stageExperts(request, answer));
  });
  await Promise.all(staging);
  const [, follower] = clients;
  const asked = (client: WorkerClient | undefined, incarnation: bigint) =>
    unary((answer) => client?.switchExperts({ incarnation, version: 2 }, answer));
  await expect(asked(follower, INCARNATION)).rejects.toThrow("does not lead");
  await expect(asked(leader(), INCARNATION + 1n)).rejects.toThrow("incarnation");
  await asked(leader(), INCARNATION);
  await expect(asked(leader(), INCARNATION)).rejects.toThrow("map 2 is not staged");
  const [found] = await Promise.all(clients.map(described));
  expect(found?.numericsId).toMatch(/-x[0-9a-f]{12}$/);
  const nothing = StageExpertsRequest.fromPartial({ incarnation: INCARNATION, map: { ...next, slots: 9 } });
  await expect(unary((answer) => leader().stageExperts(nothing, answer))).rejects.toThrow("map.slots");
});

function layersOf(places: readonly number[]) {
  const { slots, layers } = planMap(plan);
  return { slots, layers: layers.map(({ block }) => ({ block, places: [...places] })) };
}

// The engine as the worker sees it: promises in launch order, faults with a field, two workers over TCP, an orderly end.
import { rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { beforeAll, expect, onTestFinished, test } from "vitest";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import { type Row, Sampling, type SlotUpdate, StepPlan } from "../../../proto/gen/muster/v1/worker.ts";
import { type Engine, EngineError, type EngineRequest } from "../../../worker/engine/engine.ts";
import { devices, gumbel, listenComm, noiseBits, openEngine } from "../../../worker/engine/native.ts";
import { closing, Driver, opening, openPlaced, type Placing, readPlaced, requestOf, rowOf } from "./open.ts";

let model: ModelSpec;
beforeAll(async () => {
  model = await readPlaced("test/models/nano-maverick/");
});

const prompt = [40, 900, 33, 7, 1200, 65, 2, 300, 77, 5];
const warm = Sampling.fromPartial({ temperature: 0.8, topP: 1, repetitionPenalty: 1 });

async function faultOf(promise: Promise<unknown>): Promise<EngineError["fault"]> {
  const error = await promise.then(
    () => undefined,
    (cause: unknown) => cause,
  );
  if (error instanceof EngineError) return error.fault;
  throw error ?? new Error("it succeeded");
}

async function withEngine(body: (driver: Driver) => Promise<void>, placing: Placing = {}): Promise<void> {
  const engine = await openPlaced(model, placing);
  try {
    await body(new Driver(engine));
  } finally {
    await engine.close();
  }
}

test("loading reports its bytes, and the engine its identity, memory and expert counts", async () => {
  const seen: [string, number, number][] = [];
  const request: EngineRequest = { ...requestOf(model, { ranks: 2, ep: 2 }), onProgress: (...now) => seen.push(now) };
  const engine = await openEngine(request);
  try {
    const loading = seen.filter(([phase]) => phase === "loading");
    const total = loading.at(-1)?.[2] ?? 0;
    expect(loading.at(-1)).toEqual(["loading", total, total]);
    expect(total).toBeGreaterThan(10_000_000);
    expect(seen.at(-1)?.[0]).toBe("warming");
    expect(engine.numericsId).toMatch(/^cpu-.*\/f32kv16\/tp2\/[0-9a-f]{16}-ep2etp1-[0-9a-f]{16}$/);
    const [first, second] = engine.memory();
    expect(first?.weights).toBeGreaterThan(0);
    // 40 blocks of 16 tokens, 4 layers, k and v of one kv head of 32 in f32
    expect(second?.kv).toBe(40 * 16 * 4 * 2 * 32 * 4);
    await new Driver(engine).run([opening(1, prompt)], [rowOf(1, prompt.length)]);
    const counts = engine.expertTokens().map((block) => block.reduce((sum, count) => sum + count, 0));
    expect(counts).toEqual([0, prompt.length, 0, prompt.length]);
  } finally {
    await engine.close();
  }
});

test("E2: verified drafts, chunks and batch mates change no token", async () => {
  await withEngine(async (driver) => {
    const want = await driver.generate(prompt, 24, { sampling: warm });
    const got: number[] = [];
    await driver.run([opening(2, prompt.slice(0, 7))], [rowOf(2, 7)]);
    await driver.run([opening(1, prompt, { sampling: warm })], [rowOf(1, 6, { sample: false }), rowOf(2, 1)]);
    for (let i = 0; got.length < 20; i++) {
      const drafts = want.slice(got.length, got.length + 4).map((id, at) => (at === i % 4 ? (id + 1) % 2048 : id));
      const { rows } = await driver.run([], [rowOf(2, 1), rowOf(1, i === 0 ? 4 : 1, { drafts })]);
      expect(rows[1]?.accepted).toBe(i % 4);
      got.push(...(rows[1]?.tokens ?? []));
    }
    expect(got).toEqual(want.slice(0, got.length));
  });
});

test("two steps may be in flight, a third is refused, and results come in launch order", async () => {
  // Plain loops over a long prompt: the first step takes much longer than launching the others.
  const long = Array.from({ length: 120 }, (_, i) => (i * 37) % 2000);
  await withEngine(
    async ({ engine }) => {
      const order: number[] = [];
      const launch = (step: bigint, rows: Row[], updates: SlotUpdate[] = []) =>
        engine.launch({ step, rows, updates, incarnation: 0n });
      const first = launch(1n, [rowOf(1, long.length)], [opening(1, long)]);
      const second = launch(2n, [rowOf(1, 1)]);
      const third = faultOf(launch(3n, [rowOf(1, 1)]));
      await Promise.all([first.then(() => order.push(1)), second.then(() => order.push(2))]);
      expect(await third).toMatchObject({ code: "invalid", field: "in_flight" });
      expect(order).toEqual([1, 2]);
      expect((await second).step).toBe(2n);
      expect((await launch(3n, [rowOf(1, 1)])).rows[0]?.computed).toBe(long.length + 2);
    },
    { backend: "ref" },
  );
});

test("log-probabilities and margins come with each token", async () => {
  await withEngine(async (driver) => {
    const row = await driver.row([opening(1, prompt)], rowOf(1, prompt.length, { logprobs: 4, margins: true }));
    const [detail] = row.details;
    expect(detail?.top.length).toBe(3);
    expect(detail?.top[0]).toEqual({ id: row.tokens[0], logprob: detail?.logprob });
    expect(detail?.scoreGap).toBeGreaterThan(0);
    expect(detail?.routerGap).toBeGreaterThan(0);
    expect(row.logits.length).toBe(0);
  });
});

test("E1: a refused step names its field, changes nothing, and the next one is computed", async () => {
  await withEngine(async (driver) => {
    const refusals: [Parameters<Driver["run"]>, string][] = [
      [[[], [rowOf(1, 1)]], "rows[0].slot"],
      [[[opening(1, [99_999])], []], "updates[0].open.ids[0]"],
      [[[opening(1, [-1])], []], "updates[0].open.ids"],
      [[[opening(1, prompt, { seedLow: -1n })], []], "updates[0].open.seed_low"],
      [
        [[opening(1, prompt, { sampling: { ...warm, temperature: Number.NaN } })], []],
        "updates[0].open.sampling.temperature",
      ],
      [[[opening(1, prompt)], [rowOf(1, prompt.length, { drafts: [1, 2, 3, 4, 5, 6, 7, 8, 9] })]], "rows[0].drafts"],
      [[[{ slot: 1, kind: undefined }], []], "updates[0].kind"],
    ];
    for (const [[updates, rows], field] of refusals) {
      const plan = StepPlan.fromPartial({ step: 1n, rows });
      expect(await faultOf(driver.engine.launch({ ...plan, updates }))).toMatchObject({ code: "invalid", field });
    }
    const row = await driver.row([opening(1, prompt)], rowOf(1, prompt.length));
    expect(row.tokens.length).toBe(1);
  });
});

test("two workers over TCP sample what one worker of two ranks samples, with equal digests", async () => {
  const placing = { ranks: 2, ep: 2, workers: 2 };
  const listeners = [listenComm("127.0.0.1"), listenComm("127.0.0.1:0")];
  const addresses = listeners.map(({ address }) => address);
  const open = (worker: number): Promise<Engine> => {
    const listener = listeners[worker];
    if (listener === undefined) throw new Error("no listener");
    return openEngine({ ...requestOf(model, placing, worker), comm: { listener, addresses, incarnation: 3n } });
  };
  const [leader, follower] = await Promise.all([open(0), open(1)]);
  const together = await openPlaced(model, { ranks: 2, ep: 2 });
  try {
    expect(leader.numericsId).toBe(together.numericsId);
    expect(follower.numericsId).toBe(together.numericsId);
    const drivers = [together, leader, follower].map((engine) => new Driver(engine));
    for (let i = 0; i < 8; i++) {
      const updates = i === 0 ? [opening(1, prompt, { sampling: warm })] : [];
      const results = await Promise.all(drivers.map((d) => d.run(updates, [rowOf(1, i === 0 ? prompt.length : 1)])));
      expect(new Set(results.map(({ digest }) => digest)).size).toBe(1);
      expect(results[1]?.waitMs).toBeGreaterThanOrEqual(0);
    }
    await follower.close();
    const rows = [rowOf(1, 1)];
    const fault = await faultOf(leader.launch(StepPlan.fromPartial({ step: 9n, rows })));
    expect(fault).toMatchObject({ code: "lost", rank: 1 });
    expect(await faultOf(leader.launch(StepPlan.fromPartial({ step: 10n, rows })))).toMatchObject({ code: "lost" });
  } finally {
    await Promise.all([leader.close(), follower.close(), together.close()]);
  }
});

test("a group of several workers needs its listener, and a listener serves once", async () => {
  const request = requestOf(model, { ranks: 2, ep: 2, workers: 2 }, 0);
  expect(await faultOf(openEngine(request))).toMatchObject({ code: "invalid", field: "comm" });
  const listener = { address: "127.0.0.1:1" };
  const comm = { listener, addresses: [], incarnation: 1n };
  expect(await faultOf(openEngine({ ...request, comm }))).toMatchObject({ field: "comm.listener" });
  expect(() => listenComm("nonsense:words")).toThrow(EngineError);
});

test("what a plan lacks, or a file has lost, is said by name", async () => {
  const good = requestOf(model);
  const path = join(tmpdir(), `muster-short-${process.pid}.safetensors`);
  await writeFile(path, Buffer.alloc(1000));
  onTestFinished(() => rm(path));
  const [file] = model.files;
  if (file === undefined || good.plan.model === undefined) throw new Error("the model has no file");
  const asked = (change: Partial<EngineRequest>) => faultOf(openEngine({ ...good, ...change }));
  const short = { ...good.plan, model: { ...good.plan.model, files: [{ ...file, path }] } };
  expect(await asked({ plan: short })).toMatchObject({ code: "invalid", field: path });
  expect((await asked({ plan: short })).detail).toContain("1000 bytes");
  expect(await asked({ slices: good.slices.slice(1) })).toMatchObject({ code: "invalid" });
  expect(await asked({ slices: [{ rank: 0, tensor: 9999, rows: undefined, cols: undefined }] })).toMatchObject({
    field: "slices[0].tensor",
  });
  expect(await asked({ options: { ...good.options, backend: "abacus" } })).toMatchObject({ code: "unsupported" });
  expect(await asked({ options: { ...good.options, threads: -1 } })).toMatchObject({ field: "options.threads" });
  const planOnly = { ...good.plan, model: { ...good.plan.model, planOnly: "no kernels for it" } };
  expect(await asked({ plan: planOnly })).toMatchObject({ code: "unsupported", detail: "no kernels for it" });
});

test("an abort ends the load; close may come at any time and twice", async () => {
  const abort = new AbortController();
  const opened = openEngine({ ...requestOf(model), signal: abort.signal, onProgress: () => abort.abort() });
  await expect(opened).rejects.toMatchObject({ name: "AbortError" });
  const engine = await openPlaced(model);
  const running = engine.launch(
    StepPlan.fromPartial({ step: 1n, updates: [opening(1, prompt)], rows: [rowOf(1, 10)] }),
  );
  await Promise.all([engine.close(), engine.close(), running]);
  const late = engine.launch(StepPlan.fromPartial({ step: 2n, updates: [closing(1)] }));
  expect(await faultOf(late)).toMatchObject({ code: "invalid", field: "engine" });
});

test("devices and noise answer, and the noise is that of the vectors", () => {
  const { isas, cpus } = devices();
  expect(isas).toContain("scalar");
  expect(cpus).toBeGreaterThan(0);
  const bits = noiseBits({ low: 1n, high: 2n }, 3, 0, 4);
  expect(bits).not.toBe(noiseBits({ low: 1n, high: 2n }, 3, 0, 5));
  const k = Number(bits >> 12n);
  expect(gumbel(bits)).toBeCloseTo(-Math.log(-Math.log((2 * k + 1) * 2 ** -53)), 12);
  expect(() => noiseBits({ low: -1n, high: 0n }, 0, 0, 0)).toThrow("seedLow");
});

// Experts that move between ranks while the engine serves: what a switched engine computes is what an engine computes that was
// opened so, bit for bit; and whatever is refused leaves it as it was.
import { beforeAll, expect, test } from "vitest";
import { expertSlices, planMap } from "../../../controller/model/expert-slices.ts";
import { slicesOf } from "../../../controller/model/shards.ts";
import type { ExpertMap, ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import type { SlotUpdate } from "../../../proto/gen/muster/v1/worker.ts";
import { type Engine, EngineError, type EngineRequest } from "../../../worker/engine/engine.ts";
import { openEngine } from "../../../worker/engine/native.ts";
import { closing, Driver, opening, type Placing, readPlaced, requestOf, rowOf } from "./open.ts";

let model: ModelSpec;
beforeAll(async () => {
  model = await readPlaced("test/models/nano-maverick/");
});

const PROMPT = [40, 900, 33, 7, 1200, 65, 2, 300, 77, 5, 901, 34, 8, 1201, 66, 3, 301, 78, 6, 902];
const EP: Placing = { ranks: 2, ep: 2 };
/** By place: 4 of the 8 experts on each slot, as no plan deals them. */
const DEALT = [6, 1, 3, 4, 0, 5, 2, 7];
/** Two experts more on each slot: 0, 1, 2 and 3 are everywhere or twice. */
const COPIED = [6, 1, 3, 4, 0, 2, 0, 5, 2, 7, 1, 3];

const switching = (version: number): SlotUpdate => ({ slot: 0, kind: { $case: "experts", value: { version } } });

function mapOf(request: EngineRequest, version: number, places: readonly number[]): ExpertMap {
  const { slots, layers } = planMap(request.plan);
  return { version, slots, layers: layers.map(({ block }) => ({ block, places: [...places] })) };
}

async function stage(engine: Engine, request: EngineRequest, maps: { current?: ExpertMap; next: ExpertMap }) {
  const { current = planMap(request.plan), next } = maps;
  await engine.stage(next, expertSlices(request.plan, { current, next }, request.worker));
}

/** Logits of the prompt, then tokens. */
async function answer(driver: Driver, before: SlotUpdate[] = []) {
  const row = rowOf(2, PROMPT.length, { sample: false, logits: true });
  const { logits } = await driver.row([...before, opening(2, PROMPT)], row);
  await driver.run([closing(2)], []);
  return { logits: [...logits], tokens: await driver.generate(PROMPT, 24) };
}

async function opened<T>(request: EngineRequest, body: (driver: Driver) => Promise<T>): Promise<T> {
  const engine = await openEngine(request);
  try {
    return await body(new Driver(engine));
  } finally {
    await engine.close();
  }
}

/** An engine that was opened with other experts on its ranks. */
function openedWith(places: readonly number[], placing: Placing): EngineRequest {
  const request = requestOf(model, placing);
  const etp = request.plan.cut?.etp ?? 1;
  const perSlot = places.length / (request.plan.cut?.ep ?? 1);
  const ranks = request.plan.ranks.map((shard) => {
    const slot = Math.floor(shard.rank / etp);
    return { ...shard, experts: places.slice(slot * perSlot, (slot + 1) * perSlot).toSorted((a, b) => a - b) };
  });
  const plan = { ...request.plan, ranks };
  return { ...request, plan, slices: slicesOf(plan, 0) };
}

async function faultOf(promise: Promise<unknown>): Promise<EngineError["fault"]> {
  const error = await promise.then(
    () => undefined,
    (cause: unknown) => cause,
  );
  if (error instanceof EngineError) return error.fault;
  throw error ?? new Error("it succeeded");
}

test.each([
  { backend: "cpu", ranks: 2 },
  { backend: "cpu", ranks: 4 },
  { backend: "ref", ranks: 2 },
])("$backend, $ranks ranks: after the switch as if it had been opened so", async ({ backend, ranks }) => {
  const placing = { ranks, ep: 2, backend };
  const want = await opened(openedWith(DEALT, placing), (driver) => answer(driver));
  const request = requestOf(model, placing);
  const got = await opened(request, async (driver) => {
    const { engine } = driver;
    const before = { id: engine.numericsId, weights: engine.memory().map(({ weights }) => weights) };
    await stage(engine, request, { next: mapOf(request, 1, DEALT) });
    expect(engine.numericsId).toBe(before.id);
    const result = await answer(driver, [switching(1)]);
    expect(engine.numericsId).toMatch(new RegExp(`^${before.id.replaceAll(/[/.]/g, "\\$&")}-x[0-9a-f]{12}$`));
    expect(engine.experts?.version).toBe(1);
    expect(engine.memory().map(({ weights }) => weights)).toEqual(before.weights);
    return result;
  });
  expect(got).toEqual(want);
});

test("copies share the tokens by position, the answer stays, memory tells of them and of their end", async () => {
  const request = requestOf(model, EP);
  await opened(request, async (driver) => {
    const { engine } = driver;
    const plain = await answer(driver);
    const [before] = engine.memory();
    const copied = mapOf(request, 1, COPIED);
    await stage(engine, request, { next: copied });
    const shared = await answer(driver, [switching(1)]);
    for (const [i, value] of shared.logits.entries()) expect(value).toBeCloseTo(plain.logits[i] ?? Number.NaN, 3);
    expect(shared.tokens).toEqual(plain.tokens);
    const [during] = engine.memory();
    // 2 more experts of 4 in 2 layers on each rank
    const perExpert = ((during?.weights ?? 0) - (before?.weights ?? 0)) / 4;
    expect(perExpert).toBeGreaterThan(0);
    const next = { ...planMap(request.plan), version: 2 };
    await stage(engine, request, { current: copied, next });
    expect(await answer(driver, [switching(2)])).toEqual(plain);
    expect(engine.memory()[0]?.weights).toBe(before?.weights);
    expect(engine.numericsId).not.toMatch(/-x.*-x/);
  });
});

test("steps that run beside the staging are not touched by it", async () => {
  const request = requestOf(model, EP);
  const want = await opened(request, (driver) => driver.generate(PROMPT, 40));
  await opened(request, async (driver) => {
    const staging = stage(driver.engine, request, { next: mapOf(request, 1, DEALT) });
    expect(await driver.generate(PROMPT, 40)).toEqual(want);
    await staging;
    expect(await driver.generate(PROMPT, 40)).toEqual(want);
  });
});

test("a switch that is not staged, or twice in a step, is refused and changes nothing", async () => {
  const request = requestOf(model, EP);
  await opened(request, async (driver) => {
    const plain = await answer(driver);
    const next = mapOf(request, 3, DEALT);
    const refusal = async (...updates: SlotUpdate[]) => {
      const { step } = driver;
      const { field, detail } = await faultOf(driver.run(updates, []));
      driver.step = step;
      return `${field}: ${detail}`;
    };
    expect(await refusal(switching(3))).toBe("updates[0].experts.version: 3 is not staged");
    await stage(driver.engine, request, { next });
    expect(await refusal(switching(2))).toBe("updates[0].experts.version: 2 is not staged; 3 is");
    expect(await refusal(switching(3), switching(3))).toContain("updates[1].experts.version: is the second switch");
    expect(await answer(driver)).toEqual(plain);
    await driver.run([switching(3)], []);
    expect(await refusal(switching(3))).toBe("updates[0].experts.version: 3 is not staged");
  });
});

test("maps and slices that are wrong are refused by name, and the engine goes on", async () => {
  const request = requestOf(model, EP);
  await opened(request, async (driver) => {
    const { engine } = driver;
    const plain = await answer(driver);
    const current = planMap(request.plan);
    const next = mapOf(request, 1, DEALT);
    const slices = expertSlices(request.plan, { current, next }, 0);
    const refusedAt = async (map: ExpertMap, given = slices) => {
      const { field, detail } = await faultOf(engine.stage(map, given));
      return `${field}: ${detail}`;
    };
    expect(await refusedAt({ ...next, slots: 3 })).toBe("map.slots: 3 slots, the cut has 2");
    expect(await refusedAt(mapOf(request, 1, [6, 1, 3, 4, 0, 5, 2, 2]))).toBe(
      "map.layers[0].places[7]: slot 1 holds expert 2 twice",
    );
    expect(await refusedAt(mapOf(request, 1, [6, 1, 3, 4, 0, 5, 2, 6]))).toBe(
      "map.layers[0].places: expert 7 has no place",
    );
    expect(await refusedAt({ ...next, layers: [] })).toContain("map.layers: 0 layers, the model has 2");
    expect(await refusedAt(next, slices.slice(1))).toContain("is missing");
    expect(await refusedAt({ ...next, version: 0 })).toContain("version");
    expect(await answer(driver)).toEqual(plain);
  });
});

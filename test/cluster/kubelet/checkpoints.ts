// Two checkpoints of one shape that answer differently: nano-maverick, and one with the dense layers of it exchanged; and what
// each of them answers, computed by an engine in this process. Greedy answers come from the reference loops and only such are
// asked for that no rounding can change; sampled and long ones from the kernels that serve, alone in their batch, at the cut that
// serves (one rank).
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { z } from "zod";
import { seedOfChoice, seedOfClient } from "../../../controller/gateway/seed.ts";
import { readModel } from "../../../controller/model/model.ts";
import { slicesOf } from "../../../controller/model/shards.ts";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import { EngineOptions, Sampling } from "../../../proto/gen/muster/v1/worker.ts";
import { openEngine } from "../../../worker/engine/native.ts";
import { closing, Driver, GREEDY, opening, planOf, ROOT, rowOf } from "../../worker/engine/open.ts";
import type { Question } from "./traffic.ts";

export const MODEL = new URL("test/models/nano-maverick/", ROOT).pathname;
const CONTEXT = 2_048;
const BLOCK_TOKENS = 16;
const BLOCKS = CONTEXT / BLOCK_TOKENS;
const GAP_MIN = 1e-3;
const EXCHANGED = ["down_proj", "gate_proj", "up_proj"].map((name) => {
  return [0, 2].map((layer) => `model.layers.${layer}.feed_forward.${name}.weight`);
});
const Header = z.record(z.string(), z.looseObject({ data_offsets: z.tuple([z.number(), z.number()]).optional() }));

/** Makes the second checkpoint in `folder`: the same headers, other bytes behind them. */
export function makeOther(folder: string): void {
  mkdirSync(folder, { recursive: true });
  for (const name of ["config.json", "tokenizer.json", "tokenizer_config.json"]) {
    cpSync(join(MODEL, name), join(folder, name));
  }
  const file = readFileSync(join(MODEL, "model.safetensors"));
  const length = Number(file.readBigUInt64LE(0));
  const header = Header.parse(JSON.parse(file.subarray(8, 8 + length).toString("utf8")));
  const bytesOf = (name = ""): Buffer => {
    const [begin, end] = header[name]?.data_offsets ?? [];
    if (begin === undefined || end === undefined) throw new Error(`nano-maverick has no ${name}`);
    return file.subarray(8 + length + begin, 8 + length + end);
  };
  for (const [one, other] of EXCHANGED) {
    const kept = Buffer.from(bytesOf(one));
    bytesOf(other).copy(bytesOf(one));
    kept.copy(bytesOf(other));
  }
  writeFileSync(join(folder, "model.safetensors"), file);
}

/** What one checkpoint answers. */
export class Reference {
  readonly #ref: Driver;
  readonly #kernels: Driver;

  private constructor(ref: Driver, kernels: Driver) {
    this.#ref = ref;
    this.#kernels = kernels;
  }

  static async open(folder: string): Promise<Reference> {
    const model = await readModel(pathToFileURL(`${folder}/`).href);
    return new Reference(await driver(model, "ref"), await driver(model, "cpu"));
  }

  /** Ids of each choice of one prompt; undefined where one that is to be sure is too close to call. */
  async answer({ prompt, body }: Question): Promise<number[][] | undefined> {
    const { temperature, top_p: topP = 1, max_tokens: count, n = 1, seed = 0, sure = false } = body;
    const sampling = temperature === 0 ? GREEDY : Sampling.fromPartial({ temperature, topP, repetitionPenalty: 1 });
    const choices: number[][] = [];
    for (let choice = 0; choice < n; choice++) {
      const { low: seedLow, high: seedHigh } = seedOfChoice(seedOfClient(seed), choice);
      const blocks = Array.from({ length: BLOCKS }, (_, index) => index + 1);
      const open = { sampling, seedLow, seedHigh, blocks };
      const ids = await generate(sure ? this.#ref : this.#kernels, { prompt, count, open, sure });
      if (ids === undefined) return undefined;
      choices.push(ids);
    }
    return choices;
  }

  async close(): Promise<void> {
    await Promise.all([this.#ref.engine.close(), this.#kernels.engine.close()]);
  }
}

async function driver(model: ModelSpec, backend: string): Promise<Driver> {
  const plan = { ...planOf(model), kvBlockTokens: BLOCK_TOKENS, kvBlocks: BLOCKS + 1, contextTokens: CONTEXT };
  const options = EngineOptions.fromPartial({ backend, tokensMax: 128, rowsMax: 1, slotsMax: 2, threads: 1 });
  return new Driver(await openEngine({ plan, worker: 0, slices: slicesOf(plan, 0), options }));
}

type Generation = { prompt: number[]; count: number; open: Parameters<typeof opening>[2]; sure: boolean };

async function generate(engine: Driver, { prompt, count, open, sure }: Generation): Promise<number[] | undefined> {
  const ids: number[] = [];
  let isClear = true;
  for (let index = 0; index < count; index++) {
    const updates = index === 0 ? [opening(1, prompt, open)] : [];
    const row = rowOf(1, index === 0 ? prompt.length : 1, { margins: sure });
    const { tokens, details } = await engine.row(updates, row);
    ids.push(...tokens);
    isClear &&= !sure || details.every(({ scoreGap }) => scoreGap > GAP_MIN);
  }
  await engine.run([closing(1)], []);
  return isClear ? ids : undefined;
}

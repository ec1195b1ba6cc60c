// Opens real engines over the models of the repository, and drives one sequence through them.
import { readModel } from "../../../controller/model/model.ts";
import { shardsOf, slicesOf } from "../../../controller/model/shards.ts";
import { Cut, type ModelSpec, ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import {
  EngineOptions,
  Row,
  Sampling,
  type SlotOpen,
  type SlotUpdate,
  StepPlan,
} from "../../../proto/gen/muster/v1/worker.ts";
import type { Engine, EngineRequest, RowResult, StepResult } from "../../../worker/engine/engine.ts";
import { openEngine } from "../../../worker/engine/native.ts";

export const ROOT = new URL("../../../", import.meta.url);

export const readPlaced = (path: string): Promise<ModelSpec> => readModel(new URL(path, ROOT).href);

export type Placing = { ranks?: number; ep?: number; workers?: number; backend?: string; tokensMax?: number };

export function planOf(model: ModelSpec, { ranks = 1, ep = 1, workers = 1 }: Placing = {}): ShardPlan {
  const cut = Cut.fromPartial({ world: ranks, tp: ranks, dp: 1, ep, etp: ranks / ep, pp: 1 });
  return {
    ...ShardPlan.fromPartial({ revision: "test", workers, kvBlockTokens: 16, kvBlocks: 40 }),
    contextTokens: Math.min(256, model.contextTokens),
    model,
    cut,
    ranks: shardsOf(model, cut, workers),
  };
}

export function requestOf(model: ModelSpec, placing: Placing = {}, worker = 0): EngineRequest {
  const plan = planOf(model, placing);
  const { backend = "cpu", tokensMax = 128 } = placing;
  return {
    plan,
    worker,
    slices: slicesOf(plan, worker),
    options: EngineOptions.fromPartial({ backend, tokensMax, rowsMax: 8, slotsMax: 8, threads: 2 }),
  };
}

export const openPlaced = (model: ModelSpec, placing: Placing = {}): Promise<Engine> =>
  openEngine(requestOf(model, placing));

export const GREEDY: Sampling = Sampling.fromPartial({ topP: 1, repetitionPenalty: 1 });

export function opening(slot: number, ids: number[], open: Partial<SlotOpen> = {}): SlotUpdate {
  const blocks = Array.from({ length: 10 }, (_, i) => 1 + (slot % 3) * 10 + i);
  const value = { ids, generatedFrom: ids.length, seedLow: 7n, seedHigh: 9n, sampling: GREEDY, computed: 0, blocks };
  return { slot, kind: { $case: "open", value: { ...value, ...open } } };
}

export const closing = (slot: number): SlotUpdate => ({ slot, kind: { $case: "close", value: {} } });
export const rowOf = (slot: number, count: number, more: Partial<Row> = {}): Row =>
  Row.fromPartial({ slot, count, sample: true, ...more });

/** Numbers the steps of one engine. */
export class Driver {
  readonly engine: Engine;
  /** The last that was launched. */
  step = 0n;
  constructor(engine: Engine) {
    this.engine = engine;
  }
  async run(updates: SlotUpdate[], rows: Row[]): Promise<StepResult> {
    const plan = StepPlan.fromPartial({ step: this.step + 1n, updates, rows });
    const result = this.engine.launch(plan);
    this.step += 1n;
    return result;
  }
  /** The only row of a step. */
  async row(updates: SlotUpdate[], row: Row): Promise<RowResult> {
    const [result] = (await this.run(updates, [row])).rows;
    if (result === undefined) throw new Error("the step has no row");
    return result;
  }
  /** Prompt in one row, then token by token. */
  async generate(ids: number[], count: number, open: Partial<SlotOpen> = {}): Promise<number[]> {
    const tokens: number[] = [];
    for (let i = 0; i < count; i++) {
      const result = await this.row(i === 0 ? [opening(1, ids, open)] : [], rowOf(1, i === 0 ? ids.length : 1));
      tokens.push(...result.tokens);
    }
    await this.run([closing(1)], []);
    return tokens;
  }
}

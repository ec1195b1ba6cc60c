// The other side of the overhead bench: the same cut, its engines opened directly in this process and joined over tcp, driven
// in lock-step with the plans that a leader writes. No HTTP, no gRPC, no queue, no text.
import { slicesOf } from "../../controller/model/shards.ts";
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { type EngineOptions, Sampling, type StepPlan } from "../../proto/gen/muster/v1/worker.ts";
import type { Engine, StepResult } from "../../worker/engine/engine.ts";
import { listenComm, openEngine } from "../../worker/engine/native.ts";
import { type Holder, StepWriter } from "../../worker/serve/step-writer.ts";

const INCARNATION = 1n;

/** `ids`: of each prompt, what was generated. */
export type Round = { ids: number[][]; ms: number; steps: number; stepMs: number; waitMs: number };

export class BareGroup {
  readonly #plan: ShardPlan;
  readonly #engines: readonly Engine[];
  readonly #writer: StepWriter;
  readonly #tokensMax: number;

  private constructor(plan: ShardPlan, engines: readonly Engine[], options: EngineOptions) {
    this.#plan = plan;
    this.#engines = engines;
    this.#tokensMax = options.tokensMax;
    this.#writer = new StepWriter({
      kvBlocks: plan.kvBlocks,
      slotsMax: options.slotsMax,
      incarnation: INCARNATION,
    });
  }

  /** Opens the engine of every worker of the plan. */
  static async open(plan: ShardPlan, options: EngineOptions): Promise<BareGroup> {
    const listeners = Array.from({ length: plan.workers }, () => listenComm("127.0.0.1"));
    const addresses = listeners.map(({ address }) => address);
    const opening = listeners.map((listener, worker) => {
      const comm = plan.workers > 1 ? { comm: { listener, addresses, incarnation: INCARNATION } } : {};
      return openEngine({ plan, worker, slices: slicesOf(plan, worker), options, ...comm });
    });
    return new BareGroup(plan, await Promise.all(opening), options);
  }

  get numericsId(): string {
    return this.#engines[0]?.numericsId ?? "";
  }

  /** Prefills all prompts, then decodes `count` tokens of each, one row a prompt and step; greedy. */
  async run(prompts: readonly number[][], count: number): Promise<Round> {
    const holders: Holder[] = prompts.map(() => ({ slot: 0, blocks: [], lastStep: 0n }));
    const round: Round = { ids: prompts.map(() => []), ms: 0, steps: 0, stepMs: 0, waitMs: 0 };
    const started = performance.now();
    this.#open(prompts, holders);
    for (let done = 0; done < count; done++) {
      if (done > 0) this.#decode(prompts, holders, done);
      const result = await this.#launch(this.#writer.take());
      for (const [index, ids] of round.ids.entries()) ids.push(...(result.rows[index]?.tokens ?? []));
      round.steps++;
      round.stepMs += result.stepMs;
      round.waitMs += result.waitMs;
    }
    round.ms = performance.now() - started;
    for (const holder of holders) this.#writer.release(holder);
    return round;
  }

  async close(): Promise<void> {
    await Promise.all(this.#engines.map((engine) => engine.close()));
  }

  #open(prompts: readonly number[][], holders: readonly Holder[]): void {
    const tokens = prompts.reduce((sum, ids) => sum + ids.length, 0);
    if (tokens > this.#tokensMax) throw new Error(`${tokens} prompt tokens do not fit in a step of ${this.#tokensMax}`);
    const sampling = Sampling.create({ topP: 1, repetitionPenalty: 1 });
    for (const [index, holder] of holders.entries()) {
      const ids = prompts[index] ?? [];
      this.#reserve(holder, this.#blocksOf(ids.length));
      this.#writer.open(holder, { ids, generatedFrom: ids.length, seedLow: 0n, seedHigh: 0n, sampling });
      this.#row(holder, ids.length);
    }
  }

  // Every slot's last sampled id; the engine has it already.
  #decode(prompts: readonly number[][], holders: readonly Holder[], done: number): void {
    for (const [index, holder] of holders.entries()) {
      const length = (prompts[index]?.length ?? 0) + done;
      this.#writer.grow(holder, this.#blocksOf(length) - holder.blocks.length);
      this.#row(holder, 1);
    }
  }

  #row(holder: Holder, count: number): void {
    this.#writer.row(holder, { count, drafts: [], sample: true, logits: false, logprobs: 0, margins: false });
  }

  #reserve(holder: Holder, count: number): void {
    if (!this.#writer.reserve(holder, count)) throw new Error("the plan's KV blocks do not hold the bench's sequences");
  }

  #blocksOf(tokens: number): number {
    return Math.ceil(tokens / this.#plan.kvBlockTokens);
  }

  async #launch(plan: StepPlan): Promise<StepResult> {
    const [own, ...others] = await Promise.all(this.#engines.map((engine) => engine.launch(plan)));
    if (own === undefined) throw new Error("the plan has no worker");
    for (const { digest } of others) if (digest !== own.digest) throw new Error(`step ${plan.step}: the ranks differ`);
    this.#writer.completed(plan.step);
    return own;
  }
}

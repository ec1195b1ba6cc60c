// Whole groups inside the test process: native engines for every worker of a cut, joined by the real collectives, under a real
// leader. What processes and gRPC add is tested elsewhere; here a run costs milliseconds, so that hundreds can be compared.
import { readFileSync } from "node:fs";
import { readModel } from "../../controller/model/model.ts";
import { shardsOf, slicesOf } from "../../controller/model/shards.ts";
import { Cut, type ModelSpec, ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import {
  type Chunk,
  EngineOptions,
  type Finish,
  type Margin,
  Open,
  Sampling,
  type TokenLogprob,
} from "../../proto/gen/muster/v1/worker.ts";
import type { Engine } from "../../worker/engine/engine.ts";
import { listenComm, openEngine } from "../../worker/engine/native.ts";
import type { Followers } from "../../worker/serve/followers.ts";
import { Leader } from "../../worker/serve/leader.ts";
import { budgetOf, engineOptionsOf, limitsOf } from "../../worker/serve/options.ts";
import { Outlet } from "../../worker/serve/outlet.ts";
import type { Bus } from "../../worker/spec/bus.ts";
import { type DraftWorker, startDraft } from "../../worker/spec/draft.ts";
import { noSpeculator, type Speculator } from "../../worker/spec/speculator.ts";
import { createSpeculator } from "../../worker/spec/target.ts";
import { Tokenizer } from "../../worker/token/tokenizer.ts";
import { until } from "../until.ts";

const ROOT = new URL("../../", import.meta.url);
const BLOCK_TOKENS = 16;
/** Of the machine that tests are made for; a group of several workers shares them. */
const CORES = 2;

export const PROMPTS: string[] = JSON.parse(readFileSync(new URL("test/fixtures/prompts.json", ROOT), "utf8")).prompts;

export const readNano = (path: string): Promise<ModelSpec> => readModel(new URL(`test/models/${path}`, ROOT).href);

export type Layout = { ranks: number; ep: number; workers: number };

export const ONE_RANK: Layout = { ranks: 1, ep: 1, workers: 1 };

/** `4 ranks ep2 x etp2 in 2 workers` */
export const layoutName = ({ ranks, ep, workers }: Layout): string =>
  `${ranks} rank${ranks > 1 ? "s" : ""} ep${ep} x etp${ranks / ep} in ${workers} worker${workers > 1 ? "s" : ""}`;

export type GroupOptions = {
  layout?: Layout;
  backend?: string;
  isa?: string;
  kvBlocks?: number;
  /** Of the engine: a leader's budget may be smaller. */
  tokensMax?: number;
};

export type Group = { plan: ShardPlan; model: ModelSpec; options: EngineOptions; engine: Engine; others: Engine[] };

/** Opens the engines of all workers; several find each other over tcp. Nothing stays open where it rejects. */
export async function openGroup(model: ModelSpec, wish: GroupOptions = {}): Promise<Group> {
  const { layout = ONE_RANK, backend = "cpu", isa = "", kvBlocks = 400, tokensMax = 512 } = wish;
  const { ranks, ep, workers } = layout;
  const cut = Cut.fromPartial({ world: ranks, tp: ranks, dp: 1, ep, etp: ranks / ep, pp: 1 });
  const sizes = {
    revision: "test",
    workers,
    kvBlockTokens: BLOCK_TOKENS,
    kvBlocks,
    contextTokens: model.contextTokens,
  };
  const plan = { ...ShardPlan.fromPartial(sizes), model, cut, ranks: shardsOf(model, cut, workers) };
  const threads = Math.max(1, Math.floor(CORES / workers));
  const options = engineOptionsOf(EngineOptions.fromPartial({ backend, isa, tokensMax, threads }));
  const listeners = Array.from({ length: workers }, () => listenComm("127.0.0.1"));
  const addresses = listeners.map(({ address }) => address);
  const opening = listeners.map((listener, worker) => {
    const comm = workers > 1 ? { comm: { listener, addresses, incarnation: 7n } } : {};
    return openEngine({ plan, worker, slices: slicesOf(plan, worker), options, ...comm });
  });
  const opened = await Promise.allSettled(opening);
  const engines = opened.flatMap((each) => (each.status === "fulfilled" ? [each.value] : []));
  const failed = opened.find((each) => each.status === "rejected");
  const [engine, ...others] = engines;
  if (failed === undefined && engine !== undefined) return { plan, model, options, engine, others };
  await Promise.all(engines.map((each) => each.close()));
  throw failed?.reason;
}

export const closeGroup = async ({ engine, others }: Group): Promise<void> => {
  await Promise.all([engine, ...others].map((each) => each.close()));
};

// The other workers of the group without gRPC: they compute the same plans and answer with their digests.
const followersOf = (others: Engine[]): Followers => ({
  launch: (plan) => Promise.all(others.map(async (engine) => (await engine.launch(plan)).digest)),
  epochs: [],
  close() {},
});

export type Answer = {
  prompt: number[];
  tokens: number[];
  /** How many of them each step brought. */
  steps: number[];
  logprobs: TokenLogprob[];
  margins: Margin[];
  finish: Finish;
};

export type ServingOptions = {
  speculator?: Speculator;
  /** Tokens of one step. */
  tokensMax?: number;
  runningMax?: number;
};

/** A leader over a group, and the gateway's end of its stream. One for each group: steps are numbered from 1. */
export class Serving {
  readonly leader: Leader;
  readonly #group: Group;
  readonly #outlet: Outlet;
  readonly #ended: Promise<void>;
  readonly #readers = new Map<number, (chunk: Chunk) => void>();
  #ids = 0;

  private constructor(group: Group, tokenizer: Tokenizer, wish: ServingOptions) {
    const { plan, model, options, engine, others } = group;
    const { speculator = noSpeculator, tokensMax = options.tokensMax, runningMax = 64 } = wish;
    this.#group = group;
    this.leader = new Leader({
      engine,
      tokenizer,
      speculator,
      followers: followersOf(others),
      incarnation: 7n,
      revision: plan.revision,
      budget: { ...budgetOf(options, { blockTokens: plan.kvBlockTokens, runningMax }), tokensMax },
      limits: limitsOf(plan, model, options),
      kvBlocks: plan.kvBlocks,
      slotsMax: options.slotsMax,
      queueMax: 256,
    });
    this.#outlet = new Outlet(({ chunks }) => {
      for (const chunk of chunks) this.#readers.get(chunk.id)?.(chunk);
    });
    this.#ended = this.leader.run();
    this.#ended.catch(() => {}); // every stream is told; stop() tells the test
  }

  static async open(model: ModelSpec, wish: GroupOptions & ServingOptions = {}): Promise<Serving> {
    if (model.tokenizer === undefined) throw new Error(`${model.name} has no tokenizer`);
    const tokenizer = await Tokenizer.load(model.tokenizer);
    const { tokensMax: _, ...group } = wish;
    return new Serving(await openGroup(model, group), tokenizer, wish);
  }

  get numericsId(): string {
    return this.#group.engine.numericsId;
  }

  /** Reads one request to its end; `onTokens` hears how many it has whenever there are more. Rejects where it ends with a fault. */
  run(open: Partial<Open>, onTokens?: (count: number) => void): Promise<Answer> {
    const id = ++this.#ids;
    return new Promise((resolve, reject) => {
      const answer = {
        prompt: [] as number[],
        tokens: [] as number[],
        steps: [] as number[],
        logprobs: [] as TokenLogprob[],
        margins: [] as Margin[],
      };
      this.#readers.set(id, ({ opened, tokens, logprobs, margins, finish }) => {
        if (opened) answer.prompt = opened.prompt;
        answer.tokens.push(...tokens);
        answer.logprobs.push(...logprobs);
        answer.margins.push(...margins);
        if (tokens.length > 0) {
          answer.steps.push(tokens.length);
          onTokens?.(answer.tokens.length);
        }
        if (finish === undefined) return;
        this.#readers.delete(id);
        if (finish.fault !== undefined) reject(new Error(`${finish.fault.code}: ${finish.fault.detail}`));
        else resolve({ ...answer, finish });
      });
      void this.leader.open(this.#outlet, Open.fromPartial({ ...open, id }));
    });
  }

  /** Rejects where the leader had lost its state. */
  async stop(): Promise<void> {
    this.leader.stop();
    try {
      await this.#ended;
    } finally {
      await closeGroup(this.#group);
    }
  }
}

export const sampled = (temperature: number, more: Partial<Sampling> = {}): Sampling =>
  Sampling.fromPartial({ temperature, topP: 1, repetitionPenalty: 1, ...more });

export const textOf = (value: string): Open["input"] => ({ $case: "text", value });

const POOL = "test";

/** A real draft engine behind a bus, as a draft worker of one rank has it. */
export class Drafter {
  readonly worker: DraftWorker;
  readonly #group: Group;

  private constructor(group: Group, bus: Bus) {
    const { plan, model, options, engine } = group;
    this.#group = group;
    this.worker = startDraft({
      bus,
      engine,
      pool: POOL,
      model: model.name,
      vocabHash: vocabHashOf(model),
      vocabSize: model.vocabSize,
      contextTokens: plan.contextTokens,
      kvBlocks: plan.kvBlocks,
      kvBlockTokens: plan.kvBlockTokens,
      tokensMax: options.tokensMax,
      rowsMax: options.rowsMax,
      sessionsMax: options.slotsMax - 1,
    });
  }

  static async start(model: ModelSpec, bus: Bus): Promise<Drafter> {
    return new Drafter(await openGroup(model), bus);
  }

  /** Its sessions are gone, and nobody is told. Rejects where the draft had failed before. */
  async kill(): Promise<void> {
    await this.worker.stop();
    await closeGroup(this.#group);
    await this.worker.finished;
  }
}

/** The leader's side of speculation on the same pool. */
export const speculatorOf = (
  model: ModelSpec,
  options: { bus: Bus; waitMs: number; draftTokens?: number },
): Speculator => createSpeculator({ pool: POOL, vocabHash: vocabHashOf(model), draftTokens: 4, ...options });

function vocabHashOf(model: ModelSpec): bigint {
  if (model.tokenizer === undefined) throw new Error(`${model.name} has no tokenizer`);
  return model.tokenizer.vocabHash;
}

/** Resolves when a hello of the pool has come over this bus: a speculator that listens there knows of a draft. */
export async function helloOn(bus: Bus): Promise<void> {
  let hasCome = false;
  const end = bus.subscribe(`spec.v1.pool.${POOL}.hello`, () => {
    hasCome = true;
  });
  await until(() => hasCome, "a draft has said hello");
  end();
}

// Teacher-forced scoring through the serving engine: the given ids are prefilled in pieces and the logits of every position
// come back. A job holds one slot and blocks for all of its ids; the leader gives it a step between two serving steps.
import { FaultError, invalid, waiting } from "../../proto/fault.ts";
import type { ScoreChunk, StepPlan } from "../../proto/gen/muster/v1/worker.ts";
import { greedy } from "../../proto/sampling.ts";
import type { StepResult } from "../engine/engine.ts";
import { blocksFor } from "../kv/block-pool.ts";
import type { Budget } from "../schedule/schedule.ts";
import type { RequestLimits } from "./request.ts";
import type { Holder, StepWriter } from "./step-writer.ts";

/** Logits of one answer, in bytes: well under the message limit of proto/grpc.ts. */
const CHUNK_BYTES_MAX = 16 * 1024 * 1024;
/** Jobs that may wait: each holds its ids, its blocks and an open call. */
const JOBS_MAX = 8;

export type ScoreRequest = {
  readonly tokens: readonly number[];
  readonly logits: boolean;
  /** Resolves when the reader has room for the next piece. */
  readonly emit: (chunk: ScoreChunk) => Promise<void>;
  readonly signal: AbortSignal;
};

type Job = Holder & {
  readonly request: ScoreRequest;
  computed: number;
  isReady: boolean;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
};

export type ScoreStep = { readonly plan: StepPlan; readonly take: (result: StepResult) => void };

export class Scorer {
  readonly #limits: RequestLimits;
  readonly #budget: Budget;
  readonly #writer: StepWriter;
  readonly #wake: () => void;
  #jobs: Job[] = [];

  constructor(options: { limits: RequestLimits; budget: Budget; writer: StepWriter; wake: () => void }) {
    this.#limits = options.limits;
    this.#budget = options.budget;
    this.#writer = options.writer;
    this.#wake = options.wake;
  }

  /** Resolves when every piece has been emitted or the signal has aborted. Rejects with FaultError. */
  async score(request: ScoreRequest): Promise<void> {
    this.#check(request.tokens);
    if (this.#jobs.length >= JOBS_MAX)
      throw new FaultError(waiting("queue_full", `${JOBS_MAX} score requests are waiting already`));
    const holder: Holder = { slot: 0, blocks: [], lastStep: 0n };
    if (!this.#writer.reserve(holder, blocksFor(request.tokens.length, this.#budget.blockTokens)))
      throw new FaultError(
        waiting("kv_in_use", "running sequences hold the KV cache; score again when they have ended"),
      );
    await new Promise<void>((resolve, reject) => {
      this.#jobs.push({ ...holder, request, computed: 0, isReady: true, resolve, reject });
      this.#wake();
    });
  }

  /** The next step of a job, where one can go on. */
  next(): ScoreStep | undefined {
    for (const job of this.#jobs.filter(({ request }) => request.signal.aborted)) this.#end(job);
    const job = this.#jobs.find(({ isReady }) => isReady);
    if (job === undefined || (job.slot === 0 && this.#writer.slotsFree === 0)) return undefined;
    const { tokens } = job.request;
    if (job.slot === 0)
      this.#writer.open(job, {
        ids: [...tokens],
        generatedFrom: tokens.length,
        seedLow: 0n,
        seedHigh: 0n,
        sampling: greedy,
      });
    const rows = Math.max(1, Math.floor(CHUNK_BYTES_MAX / (4 * this.#limits.vocabSize)));
    const count = Math.min(tokens.length - job.computed, this.#budget.tokensMax, rows);
    job.isReady = false;
    this.#writer.row(job, { count, drafts: [], sample: false, logprobs: 0, logits: true, margins: false });
    return { plan: this.#writer.take(), take: (result) => this.#take(job, count, result) };
  }

  fail(error: FaultError): void {
    for (const job of this.#jobs.splice(0)) job.reject(error);
  }

  #check(tokens: readonly number[]): void {
    const { lengthMax, vocabSize } = this.#limits;
    if (tokens.length === 0) throw new FaultError(invalid("tokens", "at least one token is needed"));
    if (tokens.length > lengthMax) {
      const detail = `${tokens.length} tokens; one sequence may have ${lengthMax}`;
      throw new FaultError(invalid("tokens", detail, "context_length_exceeded"));
    }
    const wrong = tokens.find((id) => !(id < vocabSize));
    if (wrong !== undefined)
      throw new FaultError(invalid("tokens", `token id ${wrong} is outside the vocabulary of ${vocabSize}`));
  }

  #take(job: Job, count: number, result: StepResult): void {
    const logits = result.rows[0]?.logits ?? new Float32Array(0);
    const vocab = this.#limits.vocabSize;
    if (logits.length !== count * vocab)
      throw new Error(`the engine gave ${logits.length} logits for ${count} positions of ${vocab}`);
    const { tokens, emit, signal } = job.request;
    const first = job.computed;
    job.computed += count;
    const logprobs: number[] = [];
    for (let row = 0; row < count; row++) {
      const next = tokens[first + row + 1];
      if (next !== undefined) logprobs.push(logprobAt(logits, row * vocab, vocab, next));
    }
    const bytes = job.request.logits ? littleEndian(logits) : Buffer.alloc(0);
    const emitted = signal.aborted ? Promise.resolve() : emit({ first, logprobs, logits: bytes });
    emitted.then(
      () => {
        job.isReady = true;
        if (job.computed === tokens.length) this.#end(job);
        this.#wake();
      },
      (error: unknown) => this.#end(job, error instanceof Error ? error : new Error(String(error))),
    );
  }

  #end(job: Job, error?: Error): void {
    const index = this.#jobs.indexOf(job);
    if (index < 0) return;
    this.#jobs.splice(index, 1);
    this.#writer.release(job);
    if (error === undefined) job.resolve();
    else job.reject(error);
    this.#wake();
  }
}

function logprobAt(logits: Float32Array, begin: number, vocab: number, id: number): number {
  let most = Number.NEGATIVE_INFINITY;
  for (let index = begin; index < begin + vocab; index++) most = Math.max(most, logits[index] ?? most);
  let total = 0;
  for (let index = begin; index < begin + vocab; index++) total += Math.exp((logits[index] ?? most) - most);
  return (logits[begin + id] ?? most) - most - Math.log(total);
}

// Float32Array is in the machine's order; every machine that Muster runs on is little-endian. Copied: the engine may reuse it.
const littleEndian = (values: Float32Array): Buffer =>
  Buffer.from(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));

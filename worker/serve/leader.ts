// The leader: queue and step loop of a group. Owns the life of every sequence from its Open to its Finish. Does not own: which
// rows a step has (worker/schedule), slots and blocks (step-writer.ts), what a request may ask (request.ts), when its text
// ends (transcript.ts) and is sent (answers.ts), the streams themselves (worker-service.ts).
//
//   L1  results are committed in the order of steps. The next step is launched before they are there where no decision needs
//       them; a row of a sequence that turns out to have ended before it counts for nothing.
//   L2  a step counts only when every follower's digest equals ours; else the incarnation is lost and nothing is committed.
//   L3  whatever a speculator says, the tokens are the engine's: guesses are cut to valid ids and verified.
//   L4  every Open with an id of its own is answered by exactly one Finish, unless its stream is closed first.
import { FaultError, waiting } from "../../proto/fault.ts";
import type { Fault, Open, WorkerStats } from "../../proto/gen/muster/v1/worker.ts";
import type { Engine, RowResult, StepResult } from "../engine/engine.ts";
import {
  type Budget,
  type Decision,
  isDecoding,
  type RowDecision,
  runningLimit,
  schedule,
} from "../schedule/schedule.ts";
import type { Speculator } from "../spec/speculator.ts";
import type { Tokenizer } from "../token/tokenizer.ts";
import { Answers } from "./answers.ts";
import { Bell } from "./bell.ts";
import { Flights } from "./flights.ts";
import type { Followers } from "./followers.ts";
import { Group, lostBy } from "./group.ts";
import { Guesses } from "./guesses.ts";
import { LoadFigures } from "./load-figures.ts";
import { type Outlet, Outlets } from "./outlet.ts";
import { parseOpen, type Request, type RequestLimits } from "./request.ts";
import { type ScoreRequest, Scorer } from "./score.ts";
import { chunkOf, refusal, Sequence } from "./sequence.ts";
import { StepWriter } from "./step-writer.ts";
import { Transcript } from "./transcript.ts";

export type LeaderOptions = {
  engine: Engine;
  tokenizer: Tokenizer;
  speculator: Speculator;
  followers: Followers;
  incarnation: bigint;
  revision: string;
  budget: Budget;
  limits: RequestLimits;
  kvBlocks: number;
  slotsMax: number;
  queueMax: number;
};

/** A row in flight. `computed`: of its sequence after it, accepted guesses aside. */
type Launched = Pick<RowDecision<Sequence>, "sequence" | "count" | "drafts" | "sample"> & {
  readonly isPrefill: boolean;
  readonly computed: number;
};

type Counts = { generated: number; prefilled: number; drafted: number; accepted: number };

export class Leader {
  readonly #options: LeaderOptions;
  readonly #budget: Budget;
  readonly #group: Group;
  readonly #writer: StepWriter;
  readonly #scorer: Scorer;
  readonly #guesses: Guesses;
  readonly #bell = new Bell();
  readonly #outlets = new Outlets();
  readonly #answers: Answers;
  readonly #flights: Flights;
  readonly #figures = new LoadFigures();
  readonly #onIdle: (() => void)[] = [];
  #running: Sequence[] = [];
  #waiting: Sequence[] = [];
  #opening = 0;
  /** Serving and scoring take turns where both want a step. */
  #isScoresTurn = false;
  #isDraining = false;
  #isStopped = false;
  #lost: FaultError | undefined;

  constructor(options: LeaderOptions) {
    this.#options = options;
    // One slot stays free for scoring.
    const runningMax = Math.min(options.budget.runningMax, options.slotsMax - 2);
    this.#budget = { ...options.budget, runningMax: runningLimit({ ...options.budget, runningMax }) };
    this.#group = new Group(options.engine, options.followers);
    this.#guesses = new Guesses(options.speculator, options.limits.vocabSize);
    this.#writer = new StepWriter(options);
    this.#flights = new Flights(this.#group, this.#writer);
    const { limits, tokenizer } = options;
    const end = (sequence: Sequence) => this.#end(sequence);
    this.#answers = new Answers({ outlets: this.#outlets, texts: tokenizer.texts, end });
    this.#scorer = new Scorer({ limits, budget: this.#budget, writer: this.#writer, wake: () => this.#bell.ring() });
  }

  get numericsId(): string {
    return this.#group.numericsId;
  }

  /** Starts a sequence, or answers with a Finish that holds a fault. */
  async open(outlet: Outlet, open: Open): Promise<void> {
    const { id } = open;
    // The first one keeps an id: an answer to the second could not be told apart.
    if (outlet.isClosed || outlet.entries.has(id)) return;
    this.#outlets.all.add(outlet);
    const refused = this.#refusal();
    if (refused !== undefined) return this.#refuse(outlet, id, refused);
    outlet.entries.set(id, "opening");
    this.#opening++;
    let request: Request;
    try {
      request = await parseOpen(open, this.#options.tokenizer, this.#options.limits);
    } catch (error) {
      // A fault of the request; anything else is a broken invariant and ends the process.
      if (error instanceof FaultError) return this.#refuse(outlet, id, error.fault);
      throw error;
    } finally {
      this.#opening--;
      this.#checkIdle();
    }
    const entry = outlet.entries.get(id);
    if (this.#lost !== undefined || entry === undefined) return; // fail() or close() came in between and has answered
    const numericsOf = () => this.#group.numericsId;
    const sequence = new Sequence({ id, outlet, request, numericsOf, transcript: this.#transcript(request) });
    if (entry === "cancelled") this.#finish(sequence, sequence.cancelled());
    else this.#begin(sequence);
  }

  cancel(outlet: Outlet, id: number): void {
    const entry = outlet.entries.get(id);
    if (entry === "opening") outlet.entries.set(id, "cancelled");
    if (entry instanceof Sequence) this.#finish(entry, entry.cancelled());
  }

  /** The gateway is gone: its sequences end; their blocks are free when the launched step is done. */
  close(outlet: Outlet): void {
    for (const entry of outlet.entries.values()) if (entry instanceof Sequence) this.#end(entry);
    this.#outlets.close(outlet);
  }

  /** Resolves when every piece has been emitted. Rejects with FaultError. */
  async score(request: ScoreRequest): Promise<void> {
    if (this.#lost !== undefined) throw this.#lost;
    await this.#scorer.score(request);
  }

  /** Admits nothing new; resolves when all has ended, or cuts what is left after the time (it can go on elsewhere). */
  async drain(timeoutMs: number): Promise<{ ended: number; cut: number }> {
    this.#isDraining = true;
    const before = this.#load;
    if (before > 0) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, timeoutMs);
        this.#onIdle.push(() => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
    const left = [...this.#running, ...this.#waiting];
    const fault = waiting("draining", "the worker stopped before this sequence ended");
    for (const sequence of left) this.#finish(sequence, sequence.faulted(fault));
    this.#outlets.flush();
    return { ended: before - left.length, cut: left.length };
  }

  /** At the next step, to the map that every rank has staged. Rejects with FaultError. */
  switchExperts(version: number): Promise<void> {
    const done = this.#writer.switchExperts(version);
    this.#bell.ring();
    return done;
  }

  /** `epochs`: last step that each worker has finished; pending: one was launched that not all have. */
  readonly progress = () => ({ epochs: this.#group.epochs, isPending: !this.#flights.isEmpty });

  stats(): WorkerStats {
    const { totals, stepMs, waitMs } = this.#figures;
    return {
      ...totals,
      stepMs,
      waitMs,
      running: this.#running.length,
      waiting: this.#waiting.length + this.#opening,
      kvBlocksFree: this.#writer.blocksFree,
      kvBlocksTotal: this.#writer.blocksTotal,
      steps: this.#writer.step,
      draining: this.#isDraining,
      speculating: this.#guesses.isUseful,
      queueMax: this.#options.queueMax,
    };
  }

  /** Ends the loop after the steps in flight. */
  stop(): void {
    this.#isStopped = true;
    this.#bell.ring();
  }

  /** State is gone: every stream ends with this fault and run() rejects with it. */
  fail(error: FaultError): void {
    if (this.#lost !== undefined) return;
    this.#lost = error;
    for (const outlet of this.#outlets.all) {
      for (const [id, entry] of outlet.entries) {
        if (entry instanceof Sequence) this.#finish(entry, entry.faulted(error.fault));
        else this.#refuse(outlet, id, error.fault);
      }
    }
    this.#scorer.fail(error);
    this.#writer.fail(error);
    this.#outlets.flush();
    this.#bell.ring();
  }

  /** The step loop. Resolves after stop(); rejects with a lost fault. */
  async run(): Promise<void> {
    while (this.#lost === undefined) {
      try {
        while (this.#flights.isOpen && (await this.#launch())) {}
        this.#answers.flush();
        if (!this.#flights.isEmpty) await this.#flights.land();
        else if (this.#isStopped) return;
        else await this.#bell.heard();
      } catch (error) {
        this.fail(lostBy(error));
      }
    }
    throw this.#lost;
  }

  // --- requests ---

  get #load(): number {
    return this.#running.length + this.#waiting.length + this.#opening;
  }

  #refusal(): Fault | undefined {
    if (this.#lost !== undefined) return this.#lost.fault;
    if (this.#isDraining) return waiting("draining", "this worker is draining and admits nothing new");
    const { queueMax } = this.#options;
    if (this.#load < queueMax + this.#budget.runningMax) return undefined;
    return waiting("queue_full", `the queue is full: ${queueMax} requests are waiting`);
  }

  #refuse(outlet: Outlet, id: number, fault: Fault): void {
    this.#outlets.push(outlet, refusal(id, fault));
    this.#outlets.flushSoon();
  }

  #transcript(request: Request): Transcript {
    return new Transcript(request, this.#options.tokenizer.detokenizer());
  }

  // Answers with the prompt's ids. Ids that a resume brings are replayed through the same rules that ended them before.
  #begin(sequence: Sequence): void {
    const { request, transcript, outlet, id } = sequence;
    const opened = {
      prompt: [...request.prompt],
      revision: this.#options.revision,
      numericsId: this.#group.numericsId,
    };
    const { text, ending } = transcript.write(request.generated, transcript.take(request.generated, 0));
    const finish = ending && sequence.ended(ending);
    outlet.entries.set(id, sequence);
    this.#outlets.push(outlet, chunkOf(id, { opened, text, finish }));
    this.#outlets.flushSoon();
    if (finish === undefined) {
      this.#waiting.push(sequence);
      this.#bell.ring();
    } else this.#end(sequence);
  }

  #finish(sequence: Sequence, finish: ReturnType<Sequence["cancelled"]>): void {
    this.#end(sequence);
    this.#outlets.push(sequence.outlet, chunkOf(sequence.id, { finish }));
    this.#outlets.flushSoon();
  }

  // Whatever a sequence holds goes back; it is in no list afterwards.
  #end(sequence: Sequence): void {
    if (sequence.state === "ended") return;
    const list = sequence.state === "running" ? this.#running : this.#waiting;
    const index = list.indexOf(sequence);
    if (index >= 0) list.splice(index, 1);
    sequence.state = "ended";
    this.#writer.release(sequence);
    this.#guesses.close(sequence);
    this.#checkIdle();
  }

  #checkIdle(): void {
    if (this.#load === 0) for (const resolve of this.#onIdle.splice(0)) resolve();
  }

  // --- the step ---

  // False where there is nothing to launch, or nothing before the step in flight is done.
  async #launch(): Promise<boolean> {
    if (this.#isStopped || this.#lost !== undefined) return false;
    if (this.#isScoresTurn && this.#launchScore()) return true;
    if (await this.#launchRows()) return true;
    // What serving waits for must end first, or scores would keep it waiting.
    return this.#flights.isEmpty && this.#launchScore();
  }

  async #launchRows(): Promise<boolean> {
    if (this.#guesses.hasQuestions(this.#running)) await this.#guesses.collect(this.#running);
    const { blocksFree, slotsFree } = this.#writer;
    const isAhead = !this.#flights.isEmpty;
    const state = { running: this.#running, waiting: this.#waiting, blocksFree, slotsFree, isAhead };
    const decision = schedule(state, this.#budget);
    if ((decision.rows.length === 0 && !this.#writer.isDue) || this.#lost !== undefined) return false;
    const rows = this.#apply(decision);
    this.#flights.launch(this.#writer.take(), (result) => this.#commit(rows, result));
    this.#isScoresTurn = true;
    return true;
  }

  #launchScore(): boolean {
    const step = this.#scorer.next();
    if (step === undefined) return false;
    this.#flights.launch(step.plan, step.take);
    this.#isScoresTurn = false;
    return true;
  }

  #apply({ preempt, admit, rows }: Decision<Sequence>): Launched[] {
    for (const sequence of preempt) {
      this.#running.splice(this.#running.indexOf(sequence), 1);
      this.#writer.release(sequence);
      this.#guesses.close(sequence);
      sequence.state = "waiting";
      sequence.computed = 0;
      this.#waiting.unshift(sequence);
      this.#figures.totals.preemptions += 1n;
    }
    for (const { sequence, blocks } of admit) this.#admit(sequence, blocks);
    return rows.map((row) => this.#applyRow(row));
  }

  #applyRow({ sequence, count, drafts, sample, grow }: RowDecision<Sequence>): Launched {
    this.#writer.grow(sequence, grow);
    const { logprobs, margins } = sequence.request;
    const details = sample ? { logprobs, margins } : { logprobs: 0, margins: false };
    const guesses = sequence.drafts.slice(0, drafts);
    this.#writer.row(sequence, { count, drafts: guesses, sample, logits: false, ...details });
    const isPrefill = !isDecoding(sequence);
    sequence.computed += count;
    if (sample) sequence.promised++;
    return { sequence, count, drafts, sample, isPrefill, computed: sequence.computed };
  }

  #admit(sequence: Sequence, blocks: number): void {
    const front = this.#waiting.shift();
    if (front !== sequence) throw new Error("the scheduler admitted a sequence that is not at the front of the queue");
    if (!this.#writer.reserve(sequence, blocks)) throw new Error("the scheduler admitted more than the free blocks");
    const { ids, generatedFrom, sampling } = sequence;
    const { seedLow, seedHigh } = sequence.request;
    this.#writer.open(sequence, { ids: [...ids], generatedFrom, seedLow, seedHigh, sampling });
    sequence.state = "running";
    this.#running.push(sequence);
    this.#guesses.open(sequence);
  }

  #commit(rows: readonly Launched[], result: StepResult): void {
    const counts: Counts = { generated: 0, prefilled: 0, drafted: 0, accepted: 0 };
    rows.forEach((row, index) => {
      const { sequence } = row;
      const answer = result.rows[index];
      if (answer === undefined) throw new Error(`the engine answered ${result.rows.length} of ${rows.length} rows`);
      if (row.isPrefill) counts.prefilled += row.count;
      if (sequence.state !== "running") return; // it ended while the step was in flight
      const computed = row.computed + answer.accepted;
      if (answer.computed !== computed)
        throw new Error(`the engine has computed ${answer.computed} ids of a slot that must have ${computed}`);
      sequence.computed += answer.accepted;
      if (row.sample) this.#commitTokens(row, answer, counts);
    });
    this.#figures.addStep(result, counts);
  }

  #commitTokens(row: Launched, answer: RowResult, counts: Counts): void {
    const { sequence } = row;
    const { tokens, details } = answer;
    const taken = sequence.transcript.take(tokens, sequence.ids.length - sequence.generatedFrom);
    const accepted = Math.min(answer.accepted, taken.kept);
    sequence.countStep(row.drafts, accepted);
    sequence.drafts = [];
    sequence.promised--;
    for (let index = 0; index < taken.kept; index++) sequence.ids.push(tokens[index] ?? 0);
    counts.generated += taken.kept;
    counts.drafted += row.drafts;
    counts.accepted += accepted;
    if (taken.ending !== undefined) this.#end(sequence);
    this.#answers.add({ sequence, tokens, taken, details });
    if (sequence.state === "running") this.#guesses.commit(sequence, taken.kept);
  }
}

// The running requests: who is being answered, what their clients must be told, when they end. Owns jobs and their sinks;
// where a choice runs is lane.ts, what an event means for its log is requests.ts. Knows nothing of HTTP.
//
//   S1  A job ends once: done, failed or cancelled; nothing reaches its sink afterwards.
//   S2  One step of a leader is given to all sinks first, then each touched sink is flushed once.
import { invalid, transient, waiting } from "../../proto/fault.ts";
import { Phase } from "../../proto/gen/muster/v1/control.ts";
import type { Chunk, Fault } from "../../proto/gen/muster/v1/worker.ts";
import type { Running, Step } from "./lane.ts";
import { Lane } from "./lane.ts";
import type { LeaderLink } from "./leader.ts";
import type { GatewayLimits } from "./limits.ts";
import type { GatewayMetrics } from "./metrics.ts";
import type { Ask, Choice } from "./requests.ts";
import { bytesOf, contextFault, heldSince, holdFault, makeChoice } from "./requests.ts";
import { drawSeed, seedOfChoice } from "./seed.ts";
import type { ControlView, ModelView } from "./watch.ts";

/** One step in so many has its inter-token latencies recorded: a histogram per token would cost more than the token. */
const ITL_SAMPLE_STEPS = 16;

/** Where the answer goes. */
export interface Sink {
  /** Tokens, text, log-probabilities; the choice's log already holds them. */
  chunk(choice: Choice, chunk: Chunk): void;
  /** One step is complete. */
  flush(): void;
  /** The request is still held. */
  waiting(): void;
  /** Every choice has ended. */
  done(): void;
  failed(fault: Fault): void;
}

export type Job = {
  readonly ask: Ask;
  readonly model: string;
  readonly choices: Choice[];
  readonly running: Running<Job>[];
  readonly sink: Sink;
  readonly startedAt: number;
  readonly bytes: number;
  firstTokenAt: number;
  lastTokenAt: number;
  saidWaitingAt: number;
  left: number;
  over: boolean;
};

export type StreamsOptions = { view: ControlView; metrics: GatewayMetrics; limits: GatewayLimits };

export class Streams {
  readonly view: ControlView;
  readonly limits: GatewayLimits;
  readonly #metrics: GatewayMetrics;
  readonly #lanes = new Map<string, Lane<Job>>();
  readonly #jobs = new Set<Job>();
  #steps = 0;
  #openBytes = 0;
  #tick: NodeJS.Timeout | undefined;
  #idle: (() => void)[] = [];
  #refusal: Fault | undefined;

  constructor(options: StreamsOptions) {
    this.view = options.view;
    this.limits = options.limits;
    this.#metrics = options.metrics;
    this.view.onChange(() => {
      for (const view of this.view.models()) this.#lane(view.served.name);
      for (const lane of this.#lanes.values()) lane.viewChanged();
    });
    this.#metrics.observe({
      held: () => this.#sum((lane) => lane.held.size),
      open: () => this.#jobs.size,
      connected: () => this.view.connected,
      leaders: () => [...this.#lanes.values()].map((lane) => ({ model: lane.model, stats: lane.link?.stats })),
    });
  }

  get isDraining(): boolean {
    return this.#refusal !== undefined;
  }

  /** The model of that name or alias, or why it cannot be had. */
  resolve(name: string): { view: ModelView } | { fault: Fault } {
    const view = this.view.find(name);
    if (view) return { view };
    if (!this.view.told) {
      return { fault: transient("controller_unreachable", `no word from the controller at ${this.view.address} yet`) };
    }
    const names = this.view.models().map((model) => model.served.name);
    const served = names.length > 0 ? `served here: ${names.join(", ")}` : "no model is served here";
    return {
      fault: invalid("model", `the model ${JSON.stringify(name)} does not exist; ${served}`, "model_not_found"),
    };
  }

  /** Starts all choices of a request; a refusal that is known at once comes back as the fault, the rest goes to the sink. */
  start(ask: Ask, sink: Sink): { job: Job } | { fault: Fault } {
    const found = this.resolve(ask.model);
    if ("fault" in found) return found;
    const now = performance.now();
    const fault = this.#refusal ?? this.#admit(ask, found.view, now);
    if (fault) return { fault };
    const job = makeJob(ask, found.view.served.name, sink, now);
    this.#jobs.add(job);
    this.#openBytes += job.bytes;
    const lane = this.#lane(job.model);
    const { downSince } = found.view;
    for (const running of job.running) {
      if (downSince !== undefined) running.choice.heldMs = now - downSince;
      lane.add(running);
    }
    this.#armTick();
    return { job };
  }

  /** The client has gone: every choice is given up at once. */
  cancel(job: Job): void {
    if (!job.over) this.#close(job);
  }

  /** Takes nothing new from now on; resolves when nothing runs any more or the time is over, the rest having been failed. */
  async drain(timeoutMs: number): Promise<void> {
    this.#refusal = transient("shutting_down", "this gateway is shutting down; send the request again");
    if (this.#jobs.size > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#idle.push(resolve);
      const timer = setTimeout(resolve, timeoutMs);
      await promise;
      clearTimeout(timer);
    }
    const cut = transient("shutting_down", "this gateway shut down before the answer was complete");
    for (const job of [...this.#jobs]) this.#fail(job, cut);
  }

  close(): void {
    clearInterval(this.#tick);
    for (const lane of this.#lanes.values()) lane.close();
    this.#lanes.clear();
  }

  /** The ids of a text or of messages, from the model's leader. */
  async tokenize(
    name: string,
    input: Parameters<LeaderLink["tokenize"]>[0],
  ): Promise<{ ids: number[] } | { fault: Fault }> {
    const found = this.resolve(name);
    if ("fault" in found) return found;
    const link = this.#lane(found.view.served.name).connected();
    if (!link) return { fault: transient("model_not_serving", notServing(found.view)) };
    return { ids: await link.tokenize(input) };
  }

  #admit(ask: Ask, { served, downSince }: ModelView, now: number): Fault | undefined {
    const { openRequestsMax, openBytesMax } = this.limits;
    const isFull = this.#jobs.size >= openRequestsMax;
    if (isFull || this.#openBytes + askBytes(ask) > openBytesMax) {
      this.#metrics.queueRefused("gateway");
      const what = isFull ? `${openRequestsMax} requests` : `prompts of ${openBytesMax} bytes`;
      return waiting("queue_full", `${what} are being answered, the most this gateway takes`);
    }
    const limit = served.contextTokens;
    if (limit > 0 && ask.terms.maxTokens > limit) {
      return invalid("max_tokens", `${ask.terms.maxTokens} is more than this model's context of ${limit} tokens`);
    }
    for (const input of ask.inputs) {
      const tooLong = contextFault(input, limit, "prompt");
      if (tooLong) return tooLong;
    }
    if (ask.inputs[0]?.$case === "chat" && !served.hasChatTemplate) {
      return invalid("messages", `${served.name} has no chat template; use /v1/completions`, "no_chat_template");
    }
    const hopeless = served.phase === Phase.INFEASIBLE || served.phase === Phase.STOPPED;
    if (hopeless || (downSince !== undefined && now - downSince >= this.limits.holdMs)) {
      return transient("model_not_serving", notServing({ served }));
    }
    return undefined;
  }

  #lane(model: string): Lane<Job> {
    let lane = this.#lanes.get(model);
    if (!lane) {
      lane = new Lane<Job>(model, this.view, {
        step: (steps, now) => this.#take(steps, now),
        stranded: ({ owner }, fault) => this.#fail(owner, fault),
      });
      this.#lanes.set(model, lane);
    }
    return lane;
  }

  #take(steps: Step<Job>[], now: number): void {
    this.#steps += 1;
    const touched = new Set<Job>();
    for (const step of steps) {
      const job = step.running.owner;
      if (job.over) continue;
      touched.add(job);
      this.#takeOne(job, step, now);
    }
    for (const job of touched) if (!job.over) job.sink.flush();
    for (const job of touched) if (!job.over && job.left === 0) this.#done(job);
  }

  #takeOne(job: Job, { running, chunk, verdict }: Step<Job>, now: number): void {
    const { choice } = running;
    if (chunk.opened && choice.resumes > 0) {
      this.#metrics.resumed(job.model, chunk.opened.numericsId !== choice.origin?.numericsId);
    }
    if (choice.state.kind === "failed") {
      if (choice.state.fault.code === "queue_full") this.#metrics.queueRefused("leader");
      this.#fail(job, choice.state.fault);
      return;
    }
    if (chunk.tokens.length > 0) this.#timeToken(job, now);
    job.sink.chunk(choice, chunk);
    if (verdict === "over") job.left -= 1;
  }

  #timeToken(job: Job, now: number): void {
    if (job.firstTokenAt === 0) {
      job.firstTokenAt = now;
      this.#metrics.firstToken(job.model, now - job.startedAt);
    } else if (this.#steps % ITL_SAMPLE_STEPS === 0) {
      this.#metrics.nextToken(job.model, now - job.lastTokenAt);
    }
    job.lastTokenAt = now;
  }

  #done(job: Job): void {
    this.#forget(job);
    this.#metrics.tokens(job);
    job.sink.done();
  }

  #fail(job: Job, fault: Fault): void {
    if (job.over) return;
    this.#close(job);
    job.sink.failed(fault);
  }

  /** Takes the job's choices off the leader. */
  #close(job: Job): void {
    this.#forget(job);
    this.#metrics.tokens(job);
    const lane = this.#lanes.get(job.model);
    for (const running of job.running) lane?.remove(running);
  }

  #forget(job: Job): void {
    job.over = true;
    this.#jobs.delete(job);
    this.#openBytes -= job.bytes;
    if (this.#jobs.size > 0) return;
    for (const resolve of this.#idle.splice(0)) resolve();
  }

  #sum(count: (lane: Lane<Job>) => number): number {
    let sum = 0;
    for (const lane of this.#lanes.values()) sum += count(lane);
    return sum;
  }

  #armTick(): void {
    const { holdMs, waitingMs } = this.limits;
    this.#tick ??= setInterval(() => this.#tickJobs(), Math.max(10, Math.min(250, waitingMs / 4, holdMs / 8)));
  }

  #tickJobs(): void {
    const now = performance.now();
    for (const job of this.#jobs) {
      const { choices } = job;
      const since = earliest(choices);
      if (since === undefined) continue;
      const fault = choices
        .map((choice) => holdFault(choice, now, this.limits.holdMs))
        .find((each) => each !== undefined);
      if (fault) this.#fail(job, fault);
      else if (now - Math.max(since, job.saidWaitingAt) >= this.limits.waitingMs) {
        job.saidWaitingAt = now;
        job.sink.waiting();
      }
    }
    if (this.#jobs.size > 0) return;
    clearInterval(this.#tick);
    this.#tick = undefined;
  }
}

/** Since when a choice is held that has been held longest; nothing where all have their leader. */
function earliest(choices: readonly Choice[]): number | undefined {
  let first: number | undefined;
  for (const choice of choices) {
    const since = heldSince(choice);
    if (since !== undefined && (first === undefined || since < first)) first = since;
  }
  return first;
}

const askBytes = (ask: Ask): number => ask.inputs.reduce((sum, input) => sum + bytesOf(input), 0);

const notServing = ({ served }: Pick<ModelView, "served">): string =>
  `${served.name} is not serving${served.cause ? `: ${served.cause}` : ""}`;

function makeJob(ask: Ask, model: string, sink: Sink, now: number): Job {
  const choices: Choice[] = [];
  for (const input of ask.inputs) {
    const seed = ask.seed ?? drawSeed();
    for (let i = 0; i < ask.n; i++) {
      choices.push(makeChoice(choices.length, input, seedOfChoice(seed, i), ask.terms, now));
    }
  }
  const job: Job = {
    ask,
    model,
    choices,
    running: [],
    sink,
    startedAt: now,
    bytes: askBytes(ask),
    firstTokenAt: 0,
    lastTokenAt: 0,
    saidWaitingAt: now,
    left: choices.length,
    over: false,
  };
  for (const choice of choices) job.running.push({ owner: job, choice });
  return job;
}

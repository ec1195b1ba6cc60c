// The running requests: who is being answered, what their clients must be told, when they end. Owns jobs and their sinks;
// where a choice runs is lane.ts, what an event means for its log is requests.ts. Knows nothing of HTTP.
//
//   S1  A job ends once: done, failed or cancelled; nothing reaches its sink afterwards.
//   S2  One step of a leader is given to all sinks first, then each touched sink is flushed once.
import { invalid, transient, waiting } from "../../proto/fault.ts";
import type { Fault } from "../../proto/gen/muster/v1/worker.ts";
import { Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { noTrust, type Trust } from "../../proto/trust.ts";
import type { Asked } from "./demand.ts";
import { DemandCount } from "./demand-count.ts";
import { askBytes, earliest, type Job, makeJob, type Sink } from "./job.ts";
import type { Step } from "./lane.ts";
import { Lane } from "./lane.ts";
import type { GatewayLimits } from "./limits.ts";
import type { GatewayMetrics } from "./metrics.ts";
import type { Replica } from "./replica.ts";
import type { Ask } from "./requests.ts";
import { contextFault, holdFault } from "./requests.ts";
import { isHopeless, type ModelsView, type ModelView, waitingText } from "./watch.ts";

/** One step in so many has its inter-token latencies recorded: a histogram per token would cost more than the token. */
const ITL_SAMPLE_STEPS = 16;

export type StreamsOptions = { view: ModelsView; metrics: GatewayMetrics; limits: GatewayLimits; trust?: Trust };

export class Streams {
  readonly view: ModelsView;
  readonly limits: GatewayLimits;
  readonly #metrics: GatewayMetrics;
  readonly #trust: Trust;
  readonly #lanes = new Map<string, Lane<Job>>();
  readonly #counts = new Map<string, DemandCount>();
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
    this.#trust = options.trust ?? noTrust;
    this.view.onChange(() => this.#viewChanged());
    this.#metrics.observe({
      held: () => this.#sum((lane) => lane.held.size),
      open: () => this.#jobs.size,
      connected: () => this.view.told && this.view.feed.trouble === undefined,
      leaders: () =>
        [...this.#lanes.values()].flatMap(({ model, replicas }) =>
          [...replicas].map(({ name: replica, stats }) => ({ model, replica, stats })),
        ),
    });
  }

  get isDraining(): boolean {
    return this.#refusal !== undefined;
  }

  /** The model of that name or alias, or why it cannot be had. */
  resolve(name: string): { view: ModelView } | { fault: Fault } {
    const found = this.view.find(name);
    if (found && "view" in found) return found;
    const asked = JSON.stringify(name);
    if (found) {
      const keys = found.among.map(({ key }) => key).join(", ");
      return { fault: invalid("model", `${asked} is served in several namespaces; ask for one of ${keys}`) };
    }
    if (!this.view.told) {
      const { source, trouble } = this.view.feed;
      const why = trouble === undefined ? "" : `: ${trouble}`;
      return { fault: transient("controller_unreachable", `no word from ${source} yet${why}`) };
    }
    const names = this.view.models().map((model) => model.title);
    const served = names.length > 0 ? `served here: ${names.join(", ")}` : "no model is served here";
    return { fault: invalid("model", `the model ${asked} does not exist; ${served}`, "model_not_found") };
  }

  /** Starts all choices of a request; a refusal that is known at once comes back as the fault, the rest goes to the sink. */
  start(ask: Ask, sink: Sink): { job: Job } | { fault: Fault } {
    const found = this.resolve(ask.model);
    if ("fault" in found) return found;
    const now = performance.now();
    const fault = this.#refusal ?? this.#admit(ask, found.view, now);
    if (fault) return { fault };
    const { key: model, downSince, wakes } = found.view;
    const comingMs = wakes ? this.limits.wakeMs : this.limits.holdMs;
    const job = makeJob({ ask, model, sink, comingMs }, now);
    this.#jobs.add(job);
    this.#openBytes += job.bytes;
    this.#countOf(model).arrived(job.choices.length);
    const lane = this.#lane(model);
    for (const running of job.running) {
      // Who comes while a model is down waits with the others. Waking begins with the first who asks.
      if (downSince !== undefined && !wakes) running.choice.heldMs = now - downSince;
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

  /** What is asked of every model that somebody is to be told of. */
  demand(): Asked[] {
    return this.view.models().flatMap(({ key, deployment, served: { namespace } }) => {
      if (deployment === "") return [];
      const lane = this.#lanes.get(key);
      const [held, running] = [lane?.held.size ?? 0, lane?.running ?? 0];
      return [{ namespace, deployment, held, running, count: this.#countOf(key) }];
    });
  }

  /** The ids of a text or of messages, from one of the model's leaders. */
  async tokenize(
    name: string,
    input: Parameters<Replica<Job>["tokenize"]>[0],
  ): Promise<{ ids: number[] } | { fault: Fault }> {
    const found = this.resolve(name);
    if ("fault" in found) return found;
    const ids = this.#lane(found.view.key).tokenize(input);
    if (!ids) return { fault: transient("model_not_serving", notServing(found.view)) };
    return { ids: await ids };
  }

  #viewChanged(): void {
    for (const { key } of this.view.models()) this.#lane(key);
    for (const [key, lane] of this.#lanes) {
      lane.viewChanged();
      if (this.view.byKey(key) || lane.held.size > 0 || lane.running > 0) continue;
      lane.close();
      this.#lanes.delete(key);
      this.#counts.delete(key);
    }
  }

  #countOf(model: string): DemandCount {
    const known = this.#counts.get(model);
    if (known) return known;
    const made = new DemandCount();
    this.#counts.set(model, made);
    return made;
  }

  #admit(ask: Ask, view: ModelView, now: number): Fault | undefined {
    const { title, served, downSince, wakes } = view;
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
    // Before there is a plan nobody knows.
    if (ask.inputs[0]?.$case === "chat" && !served.hasChatTemplate && served.revision !== "") {
      return invalid("messages", `${title} has no chat template; use /v1/completions`, "no_chat_template");
    }
    const isDown = downSince !== undefined && !wakes && now - downSince >= this.limits.holdMs;
    return isHopeless(served) || isDown ? transient("model_not_serving", notServing(view)) : undefined;
  }

  #lane(model: string): Lane<Job> {
    let lane = this.#lanes.get(model);
    if (!lane) {
      const events = {
        step: (steps: Step<Job>[], now: number) => this.#take(steps, now),
        stranded: ({ owner }: { owner: Job }, fault: Fault) => this.#fail(owner, fault),
        placed: (replica: string) => this.#metrics.placed(model, replica),
      };
      lane = new Lane<Job>({ model, view: this.view, trust: this.#trust, events });
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
    if (chunk.finish?.numericsChanged) this.#metrics.moved(job.model);
    if (choice.state.kind === "failed") {
      if (choice.state.fault.code === "queue_full") this.#metrics.queueRefused("leader");
      this.#fail(job, choice.state.fault);
      return;
    }
    if (chunk.tokens.length > 0) this.#timeToken(job, now);
    // Refused before it has begun: nothing to tell, and the answer may still become an error with a status.
    if (verdict !== "hold" || chunk.tokens.length > 0 || chunk.text !== "") job.sink.chunk(choice, chunk);
    if (verdict === "over") job.left -= 1;
  }

  #timeToken(job: Job, now: number): void {
    if (job.firstTokenAt === 0) {
      job.firstTokenAt = now;
      this.#metrics.firstToken(job.model, now - job.startedAt);
      this.#countOf(job.model).firstToken(now - job.startedAt);
    } else if (this.#steps % ITL_SAMPLE_STEPS === 0) {
      this.#metrics.nextToken(job.model, now - job.lastTokenAt);
      this.#countOf(job.model).nextToken(now - job.lastTokenAt);
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
    // What a client got wrong is no failure of the model.
    if (fault.kind !== Fault_Kind.INVALID) this.#countOf(job.model).failed(job.choices.length);
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
      const why = waitingText(this.view.byKey(job.model));
      const bounds = { comingMs: job.comingMs, holdMs: this.limits.holdMs };
      const fault = choices.map((choice) => holdFault(choice, now, bounds, why)).find((each) => each !== undefined);
      if (fault) this.#fail(job, fault);
      else if (now - Math.max(since, job.saidWaitingAt) >= this.limits.waitingMs) {
        job.saidWaitingAt = now;
        job.sink.waiting(why);
      }
    }
    if (this.#jobs.size > 0) return;
    clearInterval(this.#tick);
    this.#tick = undefined;
  }
}

function notServing(view: ModelView): string {
  const { cause } = view.served;
  return `${view.title} is not serving${cause ? `: ${cause}` : ""}`;
}

// A KubeApi that goes wrong by plan: the network and the moods of a server between a caller and a real (simulated) one.
// Owns what goes wrong and when, from a seed; what happens to objects is the server's.
//
//   N1  lines of one stream keep their order and none is left out while it lives: a break is an error, as over TCP.
//   N2  a reply that is lost was a write that happened, or one that is still to happen.
import {
  type DeleteOptions,
  type KubeApi,
  KubeError,
  type KubeObject,
  type ListOptions,
  type PatchOptions,
  type Resource,
  type WatchLine,
  type WatchOptions,
  type WriteOptions,
} from "../../controller/kube/api/client.ts";
import type { VirtualTime } from "./virtual-time.ts";

/** Chances are for each call or each line; latencies are drawn evenly from [least, most]. */
export type FaultPlan = {
  /** From then on nothing goes wrong any more; latency stays. */
  untilMs: number;
  latencyMs: readonly [number, number];
  /** A call is on its way for `slowMs` before anything happens. */
  slow: number;
  slowMs: readonly [number, number];
  /** 429 or 503 with a Retry-After, or 500 without, before anything has happened. */
  refuse: number;
  /** Code 0, nothing has happened. */
  unreachable: number;
  /** Code 0 after a write has happened. */
  loseReply: number;
  /**
   * Code 0 while a write is still on its way: it happens, if it can, within `slowMs` (N2). Not where pods are created: one that
   * comes to be after another of its name has run and gone is taken for that one by a leader who has seen neither.
   */
  lateWrite: number;
  /** A page that goes on from another is 410. */
  pageGone: number;
  watchBreak: number;
  /** 410 within the stream. */
  watchGone: number;
  watchDuplicate: number;
  /** The stream falls silent for good without ending. */
  watchStall: number;
  watchDelayMs: readonly [number, number];
};

export const calm: FaultPlan = {
  untilMs: 0,
  latencyMs: [0, 0],
  slow: 0,
  slowMs: [0, 0],
  refuse: 0,
  unreachable: 0,
  loseReply: 0,
  lateWrite: 0,
  pageGone: 0,
  watchBreak: 0,
  watchGone: 0,
  watchDuplicate: 0,
  watchStall: 0,
  watchDelayMs: [0, 0],
};

export type FaultyOptions = { time: VirtualTime; random: () => number; plan: FaultPlan };

export class FaultyApi implements KubeApi {
  /** How many of each fault have happened: a test of faults without faults proves nothing. */
  readonly happened = new Map<string, number>();
  plan: FaultPlan;
  /** The server has taken a write, and nobody knows yet. */
  onWritten: (resource: Resource) => void = () => {};
  /** So many patches of pods are late, whatever the plan says: they land within `slowMs`. */
  latePodPatches = 0;
  readonly #api: KubeApi;
  readonly #time: VirtualTime;
  readonly #random: () => number;

  constructor(api: KubeApi, options: FaultyOptions) {
    this.#api = api;
    this.#time = options.time;
    this.#random = options.random;
    this.plan = options.plan;
  }

  get(resource: Resource, name: string, namespace: string | undefined, signal: AbortSignal) {
    return this.#call(() => this.#api.get(resource, name, namespace, signal), signal);
  }

  list(resource: Resource, options: ListOptions, signal: AbortSignal) {
    return this.#call(() => {
      if (options.continue && this.#strikes("pageGone")) throw new KubeError(410, "Expired", "the page is too old");
      return this.#api.list(resource, options, signal);
    }, signal);
  }

  create(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    const isLate = resource.plural === "pods" ? false : undefined;
    return this.#write(resource, signal, (until) => this.#api.create(resource, object, until, options), isLate);
  }

  replace(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#write(resource, signal, (until) => this.#api.replace(resource, object, until, options));
  }

  replaceStatus(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#write(resource, signal, (until) => this.#api.replaceStatus(resource, object, until, options));
  }

  patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ) {
    const isLate = resource.plural === "pods" && this.latePodPatches > 0 ? true : undefined;
    if (isLate) this.latePodPatches -= 1;
    const work = (until: AbortSignal) => this.#api.patch(resource, name, namespace, body, options, until);
    return this.#write(resource, signal, work, isLate);
  }

  delete(resource: Resource, name: string, namespace: string | undefined, options: DeleteOptions, signal: AbortSignal) {
    return this.#write(resource, signal, (until) => this.#api.delete(resource, name, namespace, options, until));
  }

  serves(resource: Resource, signal: AbortSignal) {
    return this.#call(() => this.#api.serves(resource, signal), signal);
  }

  async *watch(resource: Resource, options: WatchOptions, signal: AbortSignal): AsyncGenerator<WatchLine> {
    await this.#latency(this.plan.latencyMs, signal);
    this.#refuse();
    let askedMs = this.#time.nowMs();
    for await (const line of this.#api.watch(resource, options, signal)) {
      // On its way like those that come right behind it: a stream is late, not slow.
      if (this.#time.nowMs() > askedMs) await this.#latency(this.plan.watchDelayMs, signal);
      if (this.#strikes("watchBreak")) throw new KubeError(0, "Unreachable", "the connection was lost");
      if (this.#strikes("watchGone")) {
        yield { type: "ERROR", error: new KubeError(410, "Expired", "too old resource version") };
        return;
      }
      if (this.#strikes("watchStall")) await this.#time.sleep(signal, Number.POSITIVE_INFINITY);
      signal.throwIfAborted();
      yield line;
      if (this.#strikes("watchDuplicate")) yield line;
      askedMs = this.#time.nowMs();
    }
  }

  #write<T>(
    resource: Resource,
    signal: AbortSignal,
    work: (signal: AbortSignal) => Promise<T>,
    /** Undefined: as the plan has it. */
    isLate?: boolean,
  ): Promise<T> {
    const send = async () => {
      if (isLate ?? (this.plan.lateWrite > 0 && this.#strikes("lateWrite"))) {
        void this.#later(resource, work);
        throw new KubeError(0, "Timeout", "no answer in time");
      }
      const answer = await work(signal);
      this.onWritten(resource);
      if (this.#strikes("loseReply")) throw new KubeError(0, "Unreachable", "the reply was lost");
      return answer;
    };
    return this.#call(send, signal);
  }

  /** Whoever has sent it cannot take it back. */
  async #later(resource: Resource, work: (signal: AbortSignal) => Promise<unknown>): Promise<void> {
    const { signal } = new AbortController();
    await this.#latency(this.plan.slowMs, signal);
    try {
      await work(signal);
      this.onWritten(resource);
    } catch (error) {
      if (!(error instanceof KubeError)) throw error;
    }
  }

  async #call<T>(work: () => Promise<T>, signal: AbortSignal): Promise<T> {
    await this.#latency(this.plan.latencyMs, signal);
    if (this.#strikes("slow")) await this.#latency(this.plan.slowMs, signal);
    this.#refuse();
    const answer = await work();
    await this.#latency(this.plan.latencyMs, signal);
    return answer;
  }

  #refuse(): void {
    if (this.#strikes("unreachable")) throw new KubeError(0, "Unreachable", "connection refused");
    if (!this.#strikes("refuse")) return;
    const mood = Math.floor(this.#random() * 3);
    if (mood === 0) throw new KubeError(429, "TooManyRequests", "too many requests", { retryAfterMs: 1000 });
    if (mood === 1) throw new KubeError(503, "ServiceUnavailable", "apiserver not ready", { retryAfterMs: 2000 });
    throw new KubeError(500, "InternalError", "etcdserver: leader changed");
  }

  async #latency([least, most]: readonly [number, number], signal: AbortSignal): Promise<void> {
    if (most > 0) await this.#time.sleep(signal, this.#time.nowMs() + least + this.#random() * (most - least));
    signal.throwIfAborted();
  }

  #strikes(fault: Exclude<keyof FaultPlan, "untilMs" | "latencyMs" | "slowMs" | "watchDelayMs">): boolean {
    if (this.#time.nowMs() >= this.plan.untilMs || this.#random() >= this.plan[fault]) return false;
    this.happened.set(fault, (this.happened.get(fault) ?? 0) + 1);
    return true;
  }
}

// A KubeApi that goes wrong by plan: the network and the moods of a server between a caller and a real (simulated) one.
// Owns what goes wrong and when, from a seed; what happens to objects is the server's.
//
//   N1  lines of one stream keep their order and none is left out while it lives: a break is an error, as over TCP.
//   N2  a reply that is lost was a write that happened.
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
} from "../../controller/kube/client.ts";
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
    return this.#call(() => this.#api.get(resource, name, namespace, signal), signal, false);
  }

  list(resource: Resource, options: ListOptions, signal: AbortSignal) {
    return this.#call(
      () => {
        if (options.continue && this.#strikes("pageGone")) throw new KubeError(410, "Expired", "the page is too old");
        return this.#api.list(resource, options, signal);
      },
      signal,
      false,
    );
  }

  create(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#call(() => this.#api.create(resource, object, signal, options), signal, true);
  }

  replace(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#call(() => this.#api.replace(resource, object, signal, options), signal, true);
  }

  replaceStatus(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#call(() => this.#api.replaceStatus(resource, object, signal, options), signal, true);
  }

  patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ) {
    return this.#call(() => this.#api.patch(resource, name, namespace, body, options, signal), signal, true);
  }

  delete(resource: Resource, name: string, namespace: string | undefined, options: DeleteOptions, signal: AbortSignal) {
    return this.#call(() => this.#api.delete(resource, name, namespace, options, signal), signal, true);
  }

  serves(resource: Resource, signal: AbortSignal) {
    return this.#call(() => this.#api.serves(resource, signal), signal, false);
  }

  async *watch(resource: Resource, options: WatchOptions, signal: AbortSignal): AsyncGenerator<WatchLine> {
    await this.#latency(this.plan.latencyMs, signal);
    this.#refuse();
    for await (const line of this.#api.watch(resource, options, signal)) {
      await this.#latency(this.plan.watchDelayMs, signal);
      if (this.#strikes("watchBreak")) throw new KubeError(0, "Unreachable", "the connection was lost");
      if (this.#strikes("watchGone")) {
        yield { type: "ERROR", error: new KubeError(410, "Expired", "too old resource version") };
        return;
      }
      if (this.#strikes("watchStall")) await this.#time.sleep(signal, Number.POSITIVE_INFINITY);
      signal.throwIfAborted();
      yield line;
      if (this.#strikes("watchDuplicate")) yield line;
    }
  }

  async #call<T>(work: () => Promise<T>, signal: AbortSignal, isWrite: boolean): Promise<T> {
    await this.#latency(this.plan.latencyMs, signal);
    if (this.#strikes("slow")) await this.#latency(this.plan.slowMs, signal);
    this.#refuse();
    const answer = await work();
    if (isWrite && this.#strikes("loseReply")) throw new KubeError(0, "Unreachable", "the reply was lost");
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

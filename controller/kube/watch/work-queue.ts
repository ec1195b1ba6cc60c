// Which keys need a look, when, and how often one that fails is tried. Owns order, waits and retries; what a look is, the
// handler knows. Level-triggered: a key says that something may have changed, not what.
//
//   Q1  a key has at most one turn at a time.
//   Q2  a key added during its turn has another one after it; any number of adds before a turn make one turn.
//   Q3  a turn that throws is tried again after a back-off of its own that doubles, whatever came during it; an add after it
//       is a turn at once; a turn that ends well forgets the failures.
//   Q4  the queue holds at most `keysMax` keys. Beyond that `add` refuses, and `onRelief` is called once there is room again:
//       its owner then adds everything anew, so that nothing is lost for good.
//   Q5  the earliest of several delayed adds counts, and an add without delay counts before all of them.
import type { Clock } from "../api/clock.ts";
import { Deadlines } from "../api/deadlines.ts";
import { backoffMs, TokenBucket } from "../api/rate-limit.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";

export type QueueLimits = {
  keysMax: number;
  backoff: { baseMs: number; maxMs: number };
  /** Retries of all keys together: a fault that hits every key at once must not become a storm. */
  retries: { perSecond: number; burst: number };
};

export const defaultQueueLimits: QueueLimits = {
  keysMax: 200_000,
  backoff: { baseMs: 5, maxMs: 300_000 },
  retries: { perSecond: 10, burst: 100 },
};

export type QueueOptions = {
  name: string;
  clock: Clock;
  /** In [0, 1). */
  random: () => number;
  limits?: Partial<QueueLimits>;
  metrics?: KubeMetrics;
  /** After an overflow, when the queue is half empty again (Q4). */
  onRelief?: () => void;
};

/** When to look at the key again even if nobody adds it; undefined: not before somebody does. */
export type Handler = (key: string, signal: AbortSignal) => Promise<{ againMs?: number } | undefined>;

export type WorkOptions = {
  /** Turns at a time. */
  concurrency: number;
  /** A turn has thrown; it will be tried again at `againMs`. */
  onFailure?: (key: string, error: unknown, againMs: number) => void;
};

/** A reason of one's own: without one each add would make an error with its stack. */
const WOKEN = "woken";

export class WorkQueue {
  readonly #options: QueueOptions;
  readonly #limits: QueueLimits;
  /** Due, in the order of becoming due; value: since when. */
  readonly #ready = new Map<string, number>();
  readonly #delayed = new Deadlines();
  readonly #running = new Set<string>();
  /** Added during their turn. */
  readonly #again = new Map<string, number>();
  readonly #failures = new Map<string, number>();
  readonly #retries: TokenBucket;
  #wake = new AbortController();
  #hasOverflowed = false;
  #isClosed = false;

  constructor(options: QueueOptions) {
    this.#options = options;
    this.#limits = { ...defaultQueueLimits, ...options.limits };
    this.#retries = new TokenBucket(this.#limits.retries, options.clock.nowMs());
    const labels = { queue: options.name };
    options.metrics?.gauge("muster_queue_depth", labels, () => this.#ready.size + this.#again.size);
  }

  /** Keys that wait or have their turn; one that has its turn and waits for another is counted twice. */
  get size(): number {
    return this.#ready.size + this.#delayed.size + this.#running.size;
  }

  /** Answers whether it was taken (Q4); no key is taken after `close`. */
  add(key: string): boolean {
    if (!this.#admits(key)) return false;
    const nowMs = this.#options.clock.nowMs();
    this.#delayed.delete(key);
    if (this.#running.has(key)) this.#again.set(key, this.#again.get(key) ?? nowMs);
    else if (!this.#ready.has(key)) {
      this.#ready.set(key, nowMs);
      this.#wake.abort(WOKEN);
    }
    return true;
  }

  /** Not before `atMs`, unless something else asks for it earlier. */
  addAt(key: string, atMs: number): boolean {
    const nowMs = this.#options.clock.nowMs();
    if (atMs <= nowMs) return this.add(key);
    if (!this.#admits(key)) return false;
    if (this.#ready.has(key) || this.#again.has(key)) return true;
    if (atMs < (this.#delayed.of(key) ?? Number.POSITIVE_INFINITY)) {
      this.#delayed.set(key, atMs);
      this.#wake.abort(WOKEN);
    }
    return true;
  }

  /** No more keys; `work` resolves when the running turns have ended. */
  close(): void {
    this.#isClosed = true;
    this.#ready.clear();
    this.#delayed.clear();
    this.#again.clear();
    this.#wake.abort(WOKEN);
  }

  /** Gives keys their turns until closed or aborted. To be called once. */
  async work(handler: Handler, options: WorkOptions, signal: AbortSignal): Promise<void> {
    const onAbort = () => this.close();
    if (signal.aborted) onAbort();
    signal.addEventListener("abort", onAbort, { once: true });
    const turns = new Set<Promise<void>>();
    while (!this.#isClosed) {
      this.#wake = new AbortController();
      const nextMs = this.#promote();
      while (turns.size < options.concurrency) {
        const key = this.#take();
        if (key === undefined) break;
        const turn: Promise<void> = this.#turn(key, { handler, options, signal }).finally(() => {
          turns.delete(turn);
          this.#wake.abort(WOKEN);
        });
        turns.add(turn);
      }
      const isFull = turns.size >= options.concurrency;
      await this.#options.clock.sleep(this.#wake.signal, isFull ? Number.POSITIVE_INFINITY : nextMs);
    }
    await Promise.all(turns);
    signal.removeEventListener("abort", onAbort);
  }

  async #turn(
    key: string,
    { handler, options, signal }: { handler: Handler; options: WorkOptions; signal: AbortSignal },
  ): Promise<void> {
    const { clock, random, metrics, name } = this.#options;
    const begunMs = clock.nowMs();
    let againMs: number | undefined;
    let isFailed = false;
    try {
      againMs = (await handler(key, signal))?.againMs;
      this.#failures.delete(key);
    } catch (error) {
      const failures = (this.#failures.get(key) ?? 0) + 1;
      this.#failures.set(key, failures);
      isFailed = true;
      const waitMs = backoffMs(failures, this.#limits.backoff, random);
      againMs = Math.max(clock.nowMs() + waitMs, this.#retries.reserve(clock.nowMs()) ?? 0);
      if (!signal.aborted) {
        metrics?.count("muster_queue_retries_total", { queue: name });
        options.onFailure?.(key, error, againMs);
      }
    }
    metrics?.observe("muster_reconcile_seconds", { queue: name }, (clock.nowMs() - begunMs) / 1000);
    this.#end(key, againMs, isFailed);
  }

  #end(key: string, againMs: number | undefined, isFailed: boolean): void {
    this.#running.delete(key);
    const sinceMs = this.#again.get(key);
    this.#again.delete(key);
    if (this.#isClosed) return;
    if (sinceMs !== undefined && !isFailed) {
      this.#delayed.delete(key);
      this.#ready.set(key, sinceMs);
    } else if (againMs !== undefined) this.addAt(key, againMs);
    if (this.#hasOverflowed && this.size <= this.#limits.keysMax / 2) {
      this.#hasOverflowed = false;
      this.#options.onRelief?.();
    }
  }

  /** Makes due what has waited long enough; answers when the next will be. */
  #promote(): number {
    const nowMs = this.#options.clock.nowMs();
    for (let due = this.#delayed.take(nowMs); due !== undefined; due = this.#delayed.take(nowMs)) {
      if (this.#running.has(due.key)) this.#again.set(due.key, due.atMs);
      else this.#ready.set(due.key, due.atMs);
    }
    return this.#delayed.nextMs();
  }

  #take(): string | undefined {
    const first = this.#ready.entries().next();
    if (first.done) return undefined;
    const [key, sinceMs] = first.value;
    this.#ready.delete(key);
    this.#running.add(key);
    const { metrics, name, clock } = this.#options;
    metrics?.observe("muster_queue_seconds", { queue: name }, (clock.nowMs() - sinceMs) / 1000);
    return key;
  }

  #admits(key: string): boolean {
    if (this.#isClosed) return false;
    if (this.#running.has(key) || this.#ready.has(key) || this.#delayed.has(key)) return true;
    if (this.size < this.#limits.keysMax) return true;
    this.#hasOverflowed = true;
    this.#options.metrics?.count("muster_queue_overflows_total", { queue: this.#options.name });
    return false;
  }
}

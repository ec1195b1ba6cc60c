// When a status is written: a change of headline (phase, cause) at once, numbers seldom, all together within a budget. Owns
// the waits and the last word for each object; what a status says is the caller's.
//
//   S1  only the newest status of an object is ever written, and none that the server has already.
//   S2  a new headline waits for the budget alone; the rest waits until `numbersMs` after the object's last write.
//   S3  a status is a replacement that names the version it was decided on: where somebody has written since it is dropped,
//       and `onConflict` asks for another look. An ex-leader overwrites nothing.
//   S4  headlines go before numbers, older before newer.
//   S5  a status that holds no more when its turn comes is dropped: what made it untrue has another look, which offers anew.

import { isDeepStrictEqual } from "node:util";
import {
  isConflict,
  isNotFound,
  isTransient,
  type KubeApi,
  KubeError,
  type KubeObject,
  keyOf,
  type Resource,
} from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { backoffMs, type Rate, TokenBucket } from "../api/rate-limit.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";

export type StatusLimits = { numbersMs: number; writes: Rate; backoff: { baseMs: number; maxMs: number } };

export const defaultStatusLimits: StatusLimits = {
  numbersMs: 10_000,
  writes: { perSecond: 20, burst: 20 },
  backoff: { baseMs: 200, maxMs: 30_000 },
};

export type StatusWriterOptions = {
  api: KubeApi;
  resource: Resource;
  clock: Clock;
  random: () => number;
  /** What of a status people wait for: two statuses with the same headline differ in numbers only. */
  headlineOf: (status: unknown) => string;
  /** Asked right before a status is sent (S5). Default: it does. */
  holds?: (object: KubeObject, status: unknown) => boolean;
  /** The object as the server has it now; to be learned by the store, so that the next look is not a conflict. */
  onWritten: (object: KubeObject) => void;
  /** Decided on an old state: look again. */
  onConflict: (key: string) => void;
  /** The server will not have it, now or later. */
  onRefused: (key: string, error: KubeError) => void;
  limits?: Partial<StatusLimits>;
  metrics?: KubeMetrics;
};

type Wanted = { object: KubeObject; status: unknown; sinceMs: number; isHeadline: boolean; notBeforeMs: number };

/** A reason of one's own: without one each offer would make an error with its stack. */
const WOKEN = "woken";

export class StatusWriter {
  readonly #options: StatusWriterOptions;
  readonly #limits: StatusLimits;
  readonly #budget: TokenBucket;
  readonly #wanted = new Map<string, Wanted>();
  readonly #failures = new Map<string, number>();
  /** Last write of each object; bounded by forgetting those older than `numbersMs`. */
  readonly #writtenMs = new Map<string, number>();
  #wake = new AbortController();

  constructor(options: StatusWriterOptions) {
    this.#options = options;
    this.#limits = { ...defaultStatusLimits, ...options.limits };
    this.#budget = new TokenBucket(this.#limits.writes, options.clock.nowMs());
    const labels = { resource: options.resource.plural };
    options.metrics?.gauge("muster_status_pending", labels, () => this.#wanted.size);
  }

  /** `object`: as it was looked at when the status was decided. */
  offer(object: KubeObject, status: unknown): void {
    const key = keyOf(object);
    const { headlineOf, clock } = this.#options;
    if (isDeepStrictEqual(object.status, status)) {
      this.#wanted.delete(key);
      return;
    }
    const before = this.#wanted.get(key);
    const isHeadline = headlineOf(object.status) !== headlineOf(status);
    this.#wanted.set(key, {
      object,
      status,
      isHeadline,
      sinceMs: before?.isHeadline === isHeadline ? before.sinceMs : clock.nowMs(),
      notBeforeMs: before?.notBeforeMs ?? 0,
    });
    this.#wake.abort(WOKEN);
  }

  /** The object has gone. */
  forget(key: string): void {
    this.#wanted.delete(key);
    this.#failures.delete(key);
    this.#writtenMs.delete(key);
  }

  /** Writes one at a time until aborted: the budget is small and order is worth more than speed. */
  async run(signal: AbortSignal): Promise<void> {
    const { clock } = this.#options;
    const onAbort = () => this.#wake.abort(WOKEN);
    signal.addEventListener("abort", onAbort, { once: true });
    while (!signal.aborted) {
      this.#wake = new AbortController();
      const nowMs = clock.nowMs();
      const { key, atMs } = this.#next(nowMs);
      if (key !== undefined && atMs <= nowMs && this.#budget.take(nowMs)) await this.#write(key, signal);
      else {
        const untilMs = key !== undefined && atMs <= nowMs ? this.#budget.nextMs(nowMs) : atMs;
        await clock.sleep(AbortSignal.any([signal, this.#wake.signal]), untilMs);
      }
    }
    signal.removeEventListener("abort", onAbort);
  }

  /** The first to be written of those that are due; else when the next will be. */
  #next(nowMs: number): { key: string | undefined; atMs: number } {
    let first: { key: string; wanted: Wanted } | undefined;
    let soonestMs = Number.POSITIVE_INFINITY;
    for (const [key, wanted] of this.#wanted) {
      const dueMs = this.#dueMs(key, wanted);
      if (dueMs > nowMs) soonestMs = Math.min(soonestMs, dueMs);
      else if (first === undefined || isBefore(wanted, first.wanted)) first = { key, wanted };
    }
    return first === undefined ? { key: undefined, atMs: soonestMs } : { key: first.key, atMs: nowMs };
  }

  #dueMs(key: string, wanted: Wanted): number {
    const writtenMs = this.#writtenMs.get(key);
    const calmMs = wanted.isHeadline || writtenMs === undefined ? 0 : writtenMs + this.#limits.numbersMs;
    return Math.max(wanted.notBeforeMs, calmMs);
  }

  async #write(key: string, signal: AbortSignal): Promise<void> {
    const wanted = this.#wanted.get(key);
    if (wanted === undefined) return;
    this.#wanted.delete(key);
    const { api, resource, clock, onWritten, onConflict, onRefused, metrics, holds } = this.#options;
    const { object, status } = wanted;
    if (holds?.(object, status) === false) {
      metrics?.count("muster_status_writes_total", { outcome: "dropped" });
      return;
    }
    // Anew, so that the oldest stands first.
    this.#writtenMs.delete(key);
    this.#writtenMs.set(key, clock.nowMs());
    try {
      const written = await api.replaceStatus(resource, { ...object, status }, signal);
      this.#failures.delete(key);
      metrics?.count("muster_status_writes_total", { outcome: "written" });
      this.#rebase(key, object, written);
      onWritten(written);
    } catch (error) {
      if (signal.aborted) return;
      if (isTransient(error)) {
        metrics?.count("muster_status_writes_total", { outcome: "failed" });
        this.#tryAgain(key, wanted, error);
      } else if (isConflict(error)) {
        metrics?.count("muster_status_writes_total", { outcome: "conflict" });
        // What was offered meanwhile was decided on the same old state or a newer one; the next look tells.
        if (this.#wanted.get(key)?.object.metadata.resourceVersion === object.metadata.resourceVersion)
          this.forget(key);
        onConflict(key);
      } else if (isNotFound(error)) this.forget(key);
      else if (error instanceof KubeError) {
        metrics?.count("muster_status_writes_total", { outcome: "refused" });
        onRefused(key, error);
      } else throw error;
    }
    this.#forgetOld(clock.nowMs());
  }

  /** Offered while the write was on its way, from the same state: that state is ours, so it is as good for the new one. */
  #rebase(key: string, from: KubeObject, written: KubeObject): void {
    const wanted = this.#wanted.get(key);
    if (wanted === undefined || wanted.object.metadata.resourceVersion !== from.metadata.resourceVersion) return;
    this.#wanted.delete(key);
    this.offer(written, wanted.status);
  }

  /** A newer offer stays, but waits as well: the server is in trouble, not the status. */
  #tryAgain(key: string, wanted: Wanted, error: KubeError): void {
    const { clock, random } = this.#options;
    const failures = (this.#failures.get(key) ?? 0) + 1;
    this.#failures.set(key, failures);
    const waitMs = Math.max(backoffMs(failures, this.#limits.backoff, random), error.retryAfterMs ?? 0);
    const latest = this.#wanted.get(key) ?? wanted;
    this.#wanted.set(key, { ...latest, notBeforeMs: clock.nowMs() + waitMs });
  }

  #forgetOld(nowMs: number): void {
    for (const [key, writtenMs] of this.#writtenMs) {
      if (writtenMs + this.#limits.numbersMs > nowMs) break;
      this.#writtenMs.delete(key);
    }
  }
}

function isBefore(one: Wanted, other: Wanted): boolean {
  return one.isHeadline === other.isHeadline ? one.sinceMs < other.sinceMs : one.isHeadline;
}

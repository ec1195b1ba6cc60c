// How often something may be done: a token bucket on a clock given from outside. Owns no timer.
//
//   T1  in any span of t seconds at most burst + t * perSecond are let through.
//   T2  who waits is served in the order of asking; nobody is asked to wait beyond `waitMsMax`, but refused.
import type { Clock } from "./clock.ts";

export type Rate = { perSecond: number; burst: number };

export class TokenBucket {
  readonly #rate: Rate;
  /** May be negative: promised to those who wait. */
  #tokens: number;
  #asOfMs: number;

  constructor(rate: Rate, nowMs: number) {
    this.#rate = rate;
    this.#tokens = rate.burst;
    this.#asOfMs = nowMs;
  }

  /** Takes a token if there is one. */
  take(nowMs: number): boolean {
    this.#fill(nowMs);
    if (this.#tokens < 1) return false;
    this.#tokens -= 1;
    return true;
  }

  /** Takes the next token and answers from when it is valid; undefined, and nothing is taken, where that is too far off. */
  reserve(nowMs: number, waitMsMax: number = Number.POSITIVE_INFINITY): number | undefined {
    this.#fill(nowMs);
    const waitMs = this.#tokens >= 1 ? 0 : ((1 - this.#tokens) / this.#rate.perSecond) * 1000;
    if (waitMs > waitMsMax) return undefined;
    this.#tokens -= 1;
    return nowMs + waitMs;
  }

  /** When `take` will say yes, if nobody else asks before; whole milliseconds, so that it is later than now. */
  nextMs(nowMs: number): number {
    this.#fill(nowMs);
    const dueMs = nowMs + ((1 - this.#tokens) / this.#rate.perSecond) * 1000;
    return this.#tokens >= 1 ? nowMs : Math.max(nowMs + 1, Math.ceil(dueMs));
  }

  #fill(nowMs: number): void {
    // A clock that steps back gives nothing and takes nothing.
    const passedMs = Math.max(0, nowMs - this.#asOfMs);
    this.#asOfMs = Math.max(this.#asOfMs, nowMs);
    this.#tokens = Math.min(this.#rate.burst, this.#tokens + (passedMs / 1000) * this.#rate.perSecond);
  }
}

/** Waits for its token; answers false where the wait would be too long or the signal aborts. */
export async function waitForToken(
  bucket: TokenBucket,
  clock: Clock,
  signal: AbortSignal,
  waitMsMax: number,
): Promise<boolean> {
  const atMs = bucket.reserve(clock.nowMs(), waitMsMax);
  if (atMs === undefined) return false;
  await clock.sleep(signal, atMs);
  return !signal.aborted;
}

/** How long to wait after the n-th failure in a row (from 1): doubling from base to max, and a random half of it. */
export function backoffMs(failures: number, bounds: { baseMs: number; maxMs: number }, random: () => number): number {
  const whole = Math.min(bounds.maxMs, bounds.baseMs * 2 ** Math.min(Math.max(failures, 1) - 1, 30));
  return whole * (0.5 + random() / 2);
}

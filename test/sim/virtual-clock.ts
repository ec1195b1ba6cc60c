// Time that goes on only when told to. Between two moments everything that can run has run, so that one seed gives one run.
//
//   V1  timers of one moment run in the order they were set.
//   V2  time does not go on while promises of the moment are still being settled.
//   V3  with a step, whatever is waited for comes at a whole step, never early: what falls into one step is one moment.
import type { Clock } from "../../controller/kube/api/clock.ts";

type Timer = { atMs: number; order: number; run: (() => void) | undefined };

/** Lets every promise that can settle do so. */
const turn = (): Promise<void> => new Promise((done) => setImmediate(done));

export class VirtualClock implements Clock {
  #now: number;
  #order = 0;
  /** A binary heap by (atMs, order). */
  readonly #timers: Timer[] = [];
  readonly #stepMs: number;

  /** Begins at a moment that is a valid date. `stepMs` 0: moments lie as close as they are asked for. */
  constructor(startMs: number = Date.UTC(2026, 0, 1), stepMs = 0) {
    this.#now = startMs;
    this.#stepMs = stepMs;
  }

  nowMs(): number {
    return this.#now;
  }

  sleep(signal: AbortSignal, untilMs: number): Promise<void> {
    if (signal.aborted || untilMs <= this.#now) return Promise.resolve();
    return new Promise((done) => {
      const wake = () => {
        cancel();
        signal.removeEventListener("abort", wake);
        done();
      };
      const cancel = this.at(untilMs, wake);
      signal.addEventListener("abort", wake, { once: true });
    });
  }

  /** Answers how to cancel it. */
  at(atMs: number, run: () => void): () => void {
    const step = this.#stepMs;
    const timer: Timer = {
      atMs: Math.max(step > 0 ? Math.ceil(atMs / step) * step : atMs, this.#now),
      order: this.#order++,
      run,
    };
    this.#push(timer);
    return () => {
      timer.run = undefined;
    };
  }

  /** Goes on to that moment. */
  async runUntil(untilMs: number): Promise<void> {
    await turn();
    for (let next = this.#timers[0]; next !== undefined && next.atMs <= untilMs; next = this.#timers[0]) {
      if (!this.#runFirst()) continue;
      while (this.#stepMs > 0 && this.#timers[0] !== undefined && this.#timers[0].atMs <= this.#now) this.#runFirst();
      await turn();
    }
    this.#now = Math.max(this.#now, untilMs);
  }

  /** Answers false where it was cancelled. */
  #runFirst(): boolean {
    const [first] = this.#timers;
    this.#pop();
    if (first?.run === undefined) return false;
    this.#now = Math.max(this.#now, first.atMs);
    first.run();
    return true;
  }

  async runFor(ms: number): Promise<void> {
    await this.runUntil(this.#now + ms);
  }

  /** Goes on until it is so; throws, naming what was awaited, where it is not so after `boundMs`. */
  async runTill(isTrue: () => boolean, what: string, boundMs = 600_000): Promise<void> {
    const endMs = this.#now + boundMs;
    await turn();
    while (!isTrue()) {
      const next = this.#timers[0];
      if (next === undefined || next.atMs > endMs)
        throw new Error(`waited ${boundMs} virtual ms in vain until ${what}`);
      await this.runUntil(next.atMs);
    }
  }

  /** Goes on until the promise is settled. */
  async finish<T>(promise: Promise<T>, boundMs = 600_000): Promise<T> {
    let isSettled = false;
    const settle = () => {
      isSettled = true;
    };
    promise.then(settle, settle);
    await this.runTill(() => isSettled, "a promise is settled", boundMs);
    return promise;
  }

  #push(timer: Timer): void {
    const heap = this.#timers;
    let at = heap.push(timer) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!isBefore(timer, heap[parent])) break;
      swap(heap, at, parent);
      at = parent;
    }
  }

  #pop(): void {
    const heap = this.#timers;
    const last = heap.pop();
    if (last === undefined || heap.length === 0) return;
    heap[0] = last;
    let at = 0;
    for (;;) {
      const left = 2 * at + 1;
      const child = isBefore(heap[left + 1], heap[left]) ? left + 1 : left;
      if (!isBefore(heap[child], heap[at])) return;
      swap(heap, at, child);
      at = child;
    }
  }
}

function isBefore(one: Timer | undefined, other: Timer | undefined): boolean {
  if (one === undefined || other === undefined) return false;
  return one.atMs < other.atMs || (one.atMs === other.atMs && one.order < other.order);
}

function swap(heap: Timer[], one: number, other: number): void {
  const first = heap[one];
  const second = heap[other];
  if (first === undefined || second === undefined) return;
  heap[one] = second;
  heap[other] = first;
}

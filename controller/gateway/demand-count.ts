// What clients have asked of one model since the gateway began: counters that only grow, and latencies since they were last
// taken. Owns nothing that grows: latencies are the last WINDOW_MAX.

/** A second's worth of a busy model; of more, the last ones say as much. */
const WINDOW_MAX = 512;
const PERCENTILE = 0.9;

export type Latencies = { ttftMs: number; itlMs: number };

export class DemandCount {
  arrivals = 0;
  failures = 0;
  #ttft = new Window();
  #itl = new Window();

  /** A request with so many sequences. */
  arrived(sequences: number): void {
    this.arrivals += sequences;
  }

  failed(sequences: number): void {
    this.failures += sequences;
  }

  firstToken(ms: number): void {
    this.#ttft.add(ms);
  }

  nextToken(ms: number): void {
    this.#itl.add(ms);
  }

  /** 90th percentiles since the last call; 0 where nothing was. */
  takeLatencies(): Latencies {
    return { ttftMs: this.#ttft.take(), itlMs: this.#itl.take() };
  }
}

class Window {
  #values: number[] = [];
  #next = 0;

  add(value: number): void {
    this.#values[this.#next] = value;
    this.#next = (this.#next + 1) % WINDOW_MAX;
  }

  take(): number {
    const sorted = this.#values.toSorted((one, other) => one - other);
    this.#values = [];
    this.#next = 0;
    return sorted[Math.ceil(PERCENTILE * sorted.length) - 1] ?? 0;
  }
}

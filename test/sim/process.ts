// A process of its own in the simulation: its clock is set and runs differently, and it is stopped at times, as by a debugger,
// a full disk or a live migration. What it has sent goes on without it; what comes back waits for it.
import type { KubeApi, WatchLine } from "../../controller/kube/api/client.ts";
import type { Clock } from "../../controller/kube/api/clock.ts";
import type { VirtualTime } from "./virtual-time.ts";

export type Pause = { fromMs: number; untilMs: number };

export type SimProcessOptions = {
  /** What its clock shows too much. */
  offsetMs: number;
  /** How fast its clock runs; 1 is right. */
  rate: number;
  /** In true time; one without an end is the death of the process. May grow. */
  pauses: readonly Pause[];
};

export class SimProcess implements Clock {
  readonly #time: VirtualTime;
  readonly #options: SimProcessOptions;
  readonly #beginMs: number;
  /** Its own: a process that never wakes goes with everything that waits for it. */
  readonly #never = new AbortController().signal;

  constructor(time: VirtualTime, options: SimProcessOptions) {
    this.#time = time;
    this.#options = options;
    this.#beginMs = time.nowMs();
  }

  isPaused(): boolean {
    return this.#pauseEndMs() !== undefined;
  }

  nowMs(): number {
    return this.#beginMs + this.#options.offsetMs + (this.#time.nowMs() - this.#beginMs) * this.#options.rate;
  }

  async sleep(signal: AbortSignal, untilMs: number): Promise<void> {
    // A timer never fires early by the clock it was set by.
    while (!signal.aborted && this.nowMs() < untilMs) {
      const leftMs = (untilMs - this.nowMs()) / this.#options.rate;
      await this.#time.sleep(signal, this.#time.nowMs() + Math.max(leftMs, 0.001));
    }
    await this.awake();
  }

  /** Resolves while the process runs. */
  async awake(): Promise<void> {
    for (let endMs = this.#pauseEndMs(); endMs !== undefined; endMs = this.#pauseEndMs()) {
      await this.#time.sleep(this.#never, endMs);
    }
  }

  /** The API as this process sees it. */
  see(api: KubeApi): KubeApi {
    const here = async <T>(call: () => Promise<T>): Promise<T> => {
      await this.awake();
      try {
        return await call();
      } finally {
        await this.awake();
      }
    };
    const awake = () => this.awake();
    return {
      get: (...call) => here(() => api.get(...call)),
      list: (...call) => here(() => api.list(...call)),
      create: (...call) => here(() => api.create(...call)),
      replace: (...call) => here(() => api.replace(...call)),
      replaceStatus: (...call) => here(() => api.replaceStatus(...call)),
      patch: (...call) => here(() => api.patch(...call)),
      delete: (...call) => here(() => api.delete(...call)),
      serves: (...call) => here(() => api.serves(...call)),
      watch: async function* (...call): AsyncGenerator<WatchLine> {
        await awake();
        for await (const line of api.watch(...call)) {
          await awake();
          yield line;
        }
      },
    };
  }

  #pauseEndMs(): number | undefined {
    const nowMs = this.#time.nowMs();
    return this.#options.pauses.find(({ fromMs, untilMs }) => fromMs <= nowMs && nowMs < untilMs)?.untilMs;
  }
}

// What a worker tells about itself: phase, bytes, numerics id, the fault that ended it. Owns the value and who watches it.
import type { Fault, LoadProgress, WorkerPhase } from "../../proto/gen/muster/v1/worker.ts";

export class Life {
  #now: LoadProgress;
  readonly #watchers = new Set<(now: LoadProgress) => void>();

  constructor(phase: WorkerPhase) {
    this.#now = { phase, bytesLoaded: 0n, bytesTotal: 0n, numericsId: "", fault: undefined };
  }

  get now(): LoadProgress {
    return this.#now;
  }

  change(change: Partial<Omit<LoadProgress, "fault">> & { fault?: Fault }): void {
    this.#now = { ...this.#now, ...change };
    for (const watcher of [...this.#watchers]) watcher(this.#now);
  }

  /** Calls at once and on every change; returns how to end it. */
  watch(watcher: (now: LoadProgress) => void): () => void {
    this.#watchers.add(watcher);
    watcher(this.#now);
    return () => void this.#watchers.delete(watcher);
  }
}

// A wake-up of one's own: one is on its way at a time, the earliest that was asked for.
import type { Clock } from "../api/clock.ts";

export class Alarm {
  readonly #clock: Clock;
  readonly #ended: AbortSignal;
  readonly #ring: () => void;
  #ringsMs = Number.POSITIVE_INFINITY;

  constructor(clock: Clock, ended: AbortSignal, ring: () => void) {
    this.#clock = clock;
    this.#ended = ended;
    this.#ring = ring;
  }

  at(atMs: number): void {
    if (atMs >= this.#ringsMs || atMs === Number.POSITIVE_INFINITY) return;
    this.#ringsMs = atMs;
    void this.#clock.sleep(this.#ended, atMs).then(() => {
      if (this.#ringsMs !== atMs) return;
      this.#ringsMs = Number.POSITIVE_INFINITY;
      this.#ring();
    });
  }
}

// When to wait for drafts at all: they must arrive in time and they must be of use. Both are moving averages over rounds; one
// below its floor opens the breaker: no waiting, and only every PROBE_ROUNDS-th round tries again. Pure: rounds are the clock.
//
//   B1  an open breaker never makes a step wait.    B2  an open breaker is probed for ever: no permanent switch-off.

const DECAY = 0.9; // about the last 10 rounds
const ARRIVAL_MIN = 0.4;
const ACCEPTED_MIN = 0.15; // accepted tokens for each verified round: below that verification costs more than it gives
const PROBE_ROUNDS = 32;

export class Breaker {
  #arrival = 1;
  #accepted = 1;
  #rounds = 0;

  get isOpen(): boolean {
    return this.#arrival < ARRIVAL_MIN || this.#accepted < ACCEPTED_MIN;
  }

  /** Whether this round may wait for a hint; counts the round. */
  mayWait(): boolean {
    this.#rounds++;
    return !this.isOpen || this.#rounds % PROBE_ROUNDS === 0;
  }

  /** Whether a hint that is there may be verified: a useless draft is only probed. */
  mayVerify(): boolean {
    return this.#accepted >= ACCEPTED_MIN || this.#rounds % PROBE_ROUNDS === 0;
  }

  waited(hasArrived: boolean): void {
    // One arrival after a closed spell is news: the probe counts more than an ordinary round.
    const decay = hasArrived && this.#arrival < ARRIVAL_MIN ? 0.5 : DECAY;
    this.#arrival = decay * this.#arrival + (1 - decay) * (hasArrived ? 1 : 0);
  }

  verified(accepted: number): void {
    const decay = accepted > 0 && this.#accepted < ACCEPTED_MIN ? 0.5 : DECAY;
    this.#accepted = decay * this.#accepted + (1 - decay) * accepted;
  }
}

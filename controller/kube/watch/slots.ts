// A fixed number of places: who finds none waits in line, or is told so.

export class Slots {
  #free: number;
  readonly #line: (() => void)[] = [];

  constructor(count: number) {
    this.#free = count;
  }

  /** Answers how to leave, or undefined where every place is taken. */
  tryEnter(): (() => void) | undefined {
    if (this.#free === 0) return undefined;
    this.#free -= 1;
    return this.#leaver();
  }

  /** Waits for a place; rejects with the signal's reason. */
  async enter(signal: AbortSignal): Promise<() => void> {
    signal.throwIfAborted();
    const place = this.tryEnter();
    if (place !== undefined) return place;
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const onAbort = () => {
      const at = this.#line.indexOf(resolve);
      // Not in line any more: a place has been handed over already, and is used.
      if (at < 0) return;
      this.#line.splice(at, 1);
      reject(signal.reason);
    };
    this.#line.push(resolve);
    signal.addEventListener("abort", onAbort, { once: true });
    await promise.finally(() => signal.removeEventListener("abort", onAbort));
    return this.#leaver();
  }

  #leaver(): () => void {
    let isIn = true;
    return () => {
      if (!isIn) return;
      isIn = false;
      const next = this.#line.shift();
      if (next === undefined) this.#free += 1;
      else next();
    };
  }
}

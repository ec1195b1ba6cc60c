// Finds stop strings in a text that arrives in pieces. Owns the characters that may still turn out to begin a stop string.
//
//   T1  the match that is complete first wins; of those complete at the same character, the longest. So the result does not
//       depend on how the text was cut into pieces.
//   T2  text before the match is sent, the match and what follows are not.
//   T3  text is held only while it is a proper prefix of a stop string: the longest such suffix, no more.
export type Scan = { readonly text: string; readonly stop: string | undefined };

export class StopScanner {
  readonly #stops: readonly string[];
  readonly #longest: number;
  readonly #firsts: ReadonlySet<number>;
  #held = "";

  /** `stops` must not hold the empty string. */
  constructor(stops: readonly string[]) {
    this.#stops = stops;
    this.#longest = stops.reduce((longest, stop) => Math.max(longest, stop.length), 0);
    this.#firsts = new Set(stops.map((stop) => stop.charCodeAt(0)));
  }

  /** Text that may leave now, and the stop string that ended the text. After a match nothing more may be pushed. */
  push(piece: string): Scan {
    if (this.#stops.length === 0) return { text: piece, stop: undefined };
    if (piece === "") return { text: "", stop: undefined };
    const text = this.#held + piece;
    const match = this.#match(text);
    if (match !== undefined) {
      this.#held = "";
      return { text: text.slice(0, match.end - match.stop.length), stop: match.stop };
    }
    const keep = this.#holdFrom(text);
    this.#held = text.slice(keep);
    return { text: text.slice(0, keep), stop: undefined };
  }

  /** What was held back, when nothing follows. */
  end(): string {
    const text = this.#held;
    this.#held = "";
    return text;
  }

  #match(text: string): { end: number; stop: string } | undefined {
    let best: { end: number; stop: string } | undefined;
    for (const stop of this.#stops) {
      const start = text.indexOf(stop);
      if (start < 0) continue;
      const end = start + stop.length;
      const isBetter = best === undefined || end < best.end || (end === best.end && stop.length > best.stop.length);
      if (isBetter) best = { end, stop };
    }
    return best;
  }

  #holdFrom(text: string): number {
    for (let start = Math.max(0, text.length - this.#longest + 1); start < text.length; start++) {
      if (!this.#firsts.has(text.charCodeAt(start))) continue;
      const suffix = text.slice(start);
      if (this.#stops.some((stop) => stop.length > suffix.length && stop.startsWith(suffix))) return start;
    }
    return text.length;
  }
}

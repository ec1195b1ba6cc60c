// The hint table: hash of a prefix -> the tokens that a draft guesses next. Bounded, least recently put goes first.
//
//   H1  what is put under a hash replaces what was there: duplicates and reordering are harmless.
//   H2  nothing here is trusted: a hint is a guess to be verified, so a forged or stale one costs time only.
import { extend, type PrefixHash } from "./prefix-hash.ts";

/** Hints kept; at 4 tokens each with their suffixes about 1,000 live rounds. */
export const HINTS_MAX = 4096;

type Entry = { low: number; tokens: readonly number[] };

export class HintTable {
  readonly #entries = new Map<number, Entry>();
  readonly #max: number;

  constructor(max = HINTS_MAX) {
    this.#max = max;
  }

  get size(): number {
    return this.#entries.size;
  }

  /**
   * Keeps `tokens` under `hash`, and what is left of them under the hash after each of them, so that a hint that is late by
   * some tokens is a shorter hint instead of a miss.
   */
  put(hash: PrefixHash, tokens: readonly number[]): void {
    for (let i = 0; i < tokens.length; i++) {
      const key = keyOf(hash);
      const old = this.#entries.get(key);
      // A suffix never replaces a longer hint of its own root.
      if (i === 0 || !old || old.low !== hash.low || old.tokens.length < tokens.length - i) {
        this.#entries.delete(key);
        this.#entries.set(key, { low: hash.low, tokens: tokens.slice(i) });
      }
      hash = extend(hash, tokens[i] ?? 0);
    }
    while (this.#entries.size > this.#max) {
      const oldest = this.#entries.keys().next();
      if (oldest.done) break;
      this.#entries.delete(oldest.value);
    }
  }

  /** The tokens guessed after that prefix; undefined where nothing is known. */
  get(hash: PrefixHash): readonly number[] | undefined {
    const entry = this.#entries.get(keyOf(hash));
    return entry?.low === hash.low ? entry.tokens : undefined;
  }
}

// 52 bits as a number are a faster key than 64 as a bigint; the entry holds the low word whole.
const keyOf = (hash: PrefixHash) => hash.high * 0x100000 + (hash.low & 0xfffff);

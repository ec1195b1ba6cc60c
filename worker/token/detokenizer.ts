// Streaming detokeniser: ids in, text out, a code point never split. Owns the bytes that may still become a character.
//
//   D1  the concatenation of all pieces and end() is the UTF-8 decoding of all bytes, however the ids were split.
//   D2  at most 3 bytes are held: an unfinished but so far valid sequence. Everything else leaves at once.
//   D3  ill-formed bytes become U+FFFD as TextDecoder does it (one for each maximal subpart).
import type { Vocabulary } from "./vocabulary.ts";

const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const NOTHING = new Uint8Array(0);

/** How many bytes at the end of `bytes` begin a sequence that more bytes could finish (0..3). */
export function unfinishedTail(bytes: Uint8Array): number {
  const end = bytes.length;
  for (let back = 1; back <= 3 && back <= end; back++) {
    const lead = bytes[end - back] ?? 0;
    if (lead < 0x80) return 0;
    if (lead < 0xc0) continue; // a continuation byte: the lead is further back
    const length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    if (length <= back) return 0;
    if (back === 1) return 1;
    const second = bytes[end - back + 1] ?? 0;
    const low = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
    const high = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
    return second >= low && second <= high ? back : 0;
  }
  return 0;
}

/** Text of whole tokens, by id: most tokens are complete characters, so most steps are one look-up. */
export class TokenTexts {
  readonly vocabulary: Vocabulary;
  /** Decoded text where a token stands alone; null where it ends or begins inside a character. */
  readonly #whole: (string | null | undefined)[] = [];

  constructor(vocabulary: Vocabulary) {
    this.vocabulary = vocabulary;
  }

  bytes(id: number): Uint8Array {
    return this.vocabulary.bytes[id] ?? NOTHING;
  }

  /** The token's text where its bytes are well-formed on their own, else null. */
  whole(id: number): string | null {
    const known = this.#whole[id];
    if (known !== undefined) return known;
    const bytes = this.bytes(id);
    const text = decoder.decode(bytes);
    return (this.#whole[id] =
      new TextEncoder().encode(text).length === bytes.length && !text.includes("\ufffd") ? text : null);
  }

  /** For showing one token by itself: special tokens by name, broken bytes as U+FFFD. */
  label(id: number): string {
    return this.vocabulary.special.get(id) ?? this.whole(id) ?? decoder.decode(this.bytes(id));
  }
}

export class Detokenizer {
  readonly #texts: TokenTexts;
  #held: Uint8Array = NOTHING;

  constructor(texts: TokenTexts) {
    this.#texts = texts;
  }

  /** The text that this token completes; often all of its own, empty while a character is unfinished. */
  push(id: number): string {
    if (this.#held.length === 0) {
      const whole = this.#texts.whole(id);
      if (whole !== null) return whole;
    }
    const bytes = this.#texts.bytes(id);
    if (bytes.length === 0) return "";
    const all = new Uint8Array(this.#held.length + bytes.length);
    all.set(this.#held);
    all.set(bytes, this.#held.length);
    const cut = all.length - unfinishedTail(all);
    this.#held = all.subarray(cut);
    return decoder.decode(all.subarray(0, cut));
  }

  /** What is left when nothing follows. */
  end(): string {
    const text = decoder.decode(this.#held);
    this.#held = NOTHING;
    return text;
  }
}

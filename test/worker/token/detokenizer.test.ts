import { readFileSync } from "node:fs";
import fc from "fast-check";
import { Tokenizer as Library } from "tokenizers";
import { describe, expect, test } from "vitest";
import { FaultError } from "../../../proto/fault.ts";
import { Detokenizer, TokenTexts, unfinishedTail } from "../../../worker/token/detokenizer.ts";
import { parseVocabulary } from "../../../worker/token/vocabulary.ts";

const path = new URL("../../models/nano-maverick/tokenizer.json", import.meta.url).pathname;
const json = readFileSync(path, "utf8");
const nano = new TokenTexts(parseVocabulary(json, path));
const library = Library.fromString(json);

function stream(texts: TokenTexts, ids: readonly number[]): string {
  const detokenizer = new Detokenizer(texts);
  return ids.map((id) => detokenizer.push(id)).join("") + detokenizer.end();
}

const whole = (texts: TokenTexts, ids: readonly number[]): string =>
  new TextDecoder("utf-8", { ignoreBOM: true }).decode(Buffer.concat(ids.map((id) => texts.bytes(id))));

/** A vocabulary of single bytes: id = byte. */
const bytes = new TokenTexts({
  bytes: Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte)),
  special: new Map(),
  added: new Map(),
});
/** Bytes that begin, continue and break sequences, more often than chance would have them. */
const awkward = fc.oneof(
  fc.constantFrom(
    0x41,
    0x7f,
    0x80,
    0xbf,
    0xc0,
    0xc1,
    0xc2,
    0xdf,
    0xe0,
    0xa0,
    0x9f,
    0xed,
    0xef,
    0xbb,
    0xf0,
    0x90,
    0x8f,
    0xf4,
    0xf5,
    0xff,
  ),
  fc.nat(255),
);

describe("detokenizer", () => {
  test("D1, D3: any bytes in any order read as TextDecoder reads them", () => {
    fc.assert(
      fc.property(fc.array(awkward, { maxLength: 40 }), (ids) => {
        expect(stream(bytes, ids)).toBe(whole(bytes, ids));
      }),
      { numRuns: 5_000 },
    );
  });

  test("D1: every sequence of up to three awkward bytes", () => {
    const set = [
      0x41, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xed, 0xef, 0xf0, 0xf1, 0xf4, 0xf5,
    ];
    for (const a of set)
      for (const b of set) for (const c of set) expect(stream(bytes, [a, b, c])).toBe(whole(bytes, [a, b, c]));
  });

  test("D2: a character leaves with its last byte, not before, and never in halves", () => {
    const detokenizer = new Detokenizer(bytes);
    expect([0xf0, 0x9f, 0x98, 0x80, 0x21].map((id) => detokenizer.push(id))).toEqual(["", "", "", "\u{1F600}", "!"]);
    expect([0xe2, 0x82, 0x41].map((id) => detokenizer.push(id))).toEqual(["", "", "\ufffdA"]);
    fc.assert(
      fc.property(fc.string({ unit: "binary", maxLength: 30 }), (text) => {
        const streamed = new Detokenizer(bytes);
        const pieces = [...new TextEncoder().encode(text)].map((id) => streamed.push(id));
        expect(pieces.filter((piece) => piece !== "")).toEqual([...text.toWellFormed()]);
        expect(streamed.end()).toBe("");
      }),
      { numRuns: 300 },
    );
    expect(unfinishedTail(Uint8Array.of(0xf0, 0x9f, 0x98))).toBe(3);
    expect(unfinishedTail(Uint8Array.of(0xed, 0xa0))).toBe(0); // a surrogate: ill-formed at once
  });

  test("agrees with the library on any ids of the nano vocabulary, special tokens skipped", async () => {
    const ids = fc.array(fc.nat(2047), { maxLength: 60 });
    await fc.assert(
      fc.asyncProperty(ids, async (given) => {
        expect(stream(nano, given)).toBe(await library.decode(given, true));
      }),
      { numRuns: 300 },
    );
  });

  test("special tokens write nothing but have a label", () => {
    expect(stream(nano, [2042, 44, 2043])).toBe("M");
    expect(nano.label(2042)).toBe("<|begin_of_text|>");
    expect(nano.label(44)).toBe("M");
    expect(nano.label(1_000_000)).toBe("");
  });
});

describe("a SentencePiece vocabulary with byte fallback", () => {
  const vocab = {
    "<unk>": 0,
    "<s>": 1,
    "\u2581Hello": 2,
    "\u2581world": 3,
    "<0xE2>": 4,
    "<0x82>": 5,
    "<0xAC>": 6,
    "!": 7,
    "\u2581": 8,
  };
  const decoder = {
    type: "Sequence",
    decoders: [
      { type: "Replace", pattern: { String: "\u2581" }, content: " " },
      { type: "ByteFallback" },
      { type: "Fuse" },
    ],
  };
  const model = { type: "BPE", vocab, merges: [], unk_token: "<unk>", byte_fallback: true };
  const added_tokens = ["<unk>", "<s>"].map((content, id) => ({
    id,
    content,
    special: true,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
  }));
  const text = JSON.stringify({
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens,
    normalizer: null,
    pre_tokenizer: null,
    post_processor: null,
    decoder,
    model,
  });
  const texts = new TokenTexts(parseVocabulary(text, "spm.json"));

  test("agrees with the library on well-formed text", async () => {
    const units = fc.array(fc.constantFrom([1], [2], [3], [4, 5, 6], [7], [8]), { maxLength: 20 });
    const spm = Library.fromString(text);
    await fc.assert(
      fc.asyncProperty(units, async (given) => {
        const ids = given.flat();
        expect(stream(texts, ids)).toBe(await spm.decode(ids, true));
      }),
    );
  });

  test("bytes of a character may come in several tokens", () => {
    const detokenizer = new Detokenizer(texts);
    expect([2, 3, 8, 4, 5, 6, 7].map((id) => detokenizer.push(id))).toEqual([
      " Hello",
      " world",
      " ",
      "",
      "",
      "€",
      "!",
    ]);
  });
});

describe("a tokenizer.json that cannot be used", () => {
  const cases: [string, string, RegExp][] = [
    ["no JSON", "{", /t\.json: not JSON/],
    ["no object", "[]", /expected a JSON object/],
    ["no decoder", '{"model":{"vocab":{}}}', /decoder: only ByteLevel/],
    ["no vocabulary", '{"decoder":{"type":"ByteLevel"},"model":{}}', /model\.vocab/],
    ["an id that is no number", '{"decoder":{"type":"ByteLevel"},"model":{"vocab":{"a":"b"}}}', /found "b"/],
    ["an id out of all bounds", '{"decoder":{"type":"ByteLevel"},"model":{"vocab":{"a":1e12}}}', /expected ids in/],
    ["a piece that is none", '{"decoder":{"type":"Metaspace"},"model":{"vocab":[[1,2]]}}', /model\.vocab\[0\]/],
    [
      "an added token without content",
      '{"decoder":{"type":"ByteLevel"},"model":{"vocab":{}},"added_tokens":[{"id":1}]}',
      /added_tokens/,
    ],
  ];
  test.each(cases)("%s: the fault names the place", (_, text, message) => {
    expect(() => parseVocabulary(text, "t.json")).toThrow(message);
    expect(() => parseVocabulary(text, "t.json")).toThrow(FaultError);
  });
});

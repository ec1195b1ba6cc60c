// Tokenizers: conversions from GGUF are checked against the library that will use them.
import { readFileSync } from "node:fs";
import { Tokenizer } from "tokenizers";
import { expect, test } from "vitest";
import { convertGgufTokenizer } from "../../../controller/model/gguf-tokenizer.ts";
import type { Json } from "../../../controller/model/json.ts";
import { Keys } from "../../../controller/model/keys.ts";
import { readModel } from "../../../controller/model/model.ts";
import { vocabHash } from "../../../controller/model/tokenizer.ts";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import { cacheDir } from "./craft.ts";

const NANO = ["nano-maverick", "nano-maverick-q4_k_m", "nano-maverick-q8_0", "nano-draft", "nano-draft-q8_0"];
const read = (name: string): Promise<ModelSpec> => readModel(`builtin://${name}`, { cacheDir });
const load = (spec: ModelSpec) => Tokenizer.fromString(readFileSync(spec.tokenizer?.jsonPath ?? "", "utf8"));

test("all nano models have one vocabulary, whatever they are stored as", async () => {
  const hashes = await Promise.all(NANO.map(async (name) => (await read(name)).tokenizer?.vocabHash));
  expect(new Set(hashes).size).toBe(1);
  expect(hashes[0]).toBeGreaterThan(0n);
});

test("the vocabulary hash sees ids and texts, not their order", () => {
  const table = new Map([
    [0, "a"],
    [1, "b"],
  ]);
  expect(vocabHash(new Map([...table].toReversed()))).toBe(vocabHash(table));
  expect(vocabHash(new Map([...table, [2, "c"]]))).not.toBe(vocabHash(table));
  expect(
    vocabHash(
      new Map([
        [0, "b"],
        [1, "a"],
      ]),
    ),
  ).not.toBe(vocabHash(table));
});

for (const name of NANO) {
  test(`${name} encodes the golden prompts to their ids`, async () => {
    const tokenizer = load(await read(name));
    const golden = JSON.parse(readFileSync(`test/models/${name.replace(/-q.*/, "")}/golden.json`, "utf8"));
    expect(golden.greedy.length).toBeGreaterThan(0);
    for (const { prompt, prompt_ids, text, greedy } of golden.greedy) {
      expect((await tokenizer.encode(prompt)).getIds()).toEqual(prompt_ids);
      if (text !== undefined) expect((await tokenizer.decode(greedy, true)).trim()).toBe(String(text).trim());
    }
  });
}

test("a converted tokenizer encodes any text as the original does", async () => {
  const [original, converted] = [load(await read("nano-maverick")), load(await read("nano-draft-q8_0"))];
  const texts = [
    "Fellow-Citizens of the Senate:",
    "  two  spaces\tand\ttabs\n\n\nlines",
    "it's 12345 they'RE; naïve façade 日本語 🎉",
    "<|eot|><|begin_of_text|>x<|end_of_text|>",
    "",
    "\u0000\u0001",
  ];
  for (const text of texts)
    expect((await converted.encode(text)).getIds(), text).toEqual((await original.encode(text)).getIds());
});

test("template and special tokens come from both containers alike", async () => {
  const [hf, gguf] = [(await read("nano-maverick")).tokenizer, (await read("nano-maverick-q8_0")).tokenizer];
  for (const key of ["chatTemplate", "bosToken", "eosToken", "addBos"] as const) expect(gguf?.[key]).toEqual(hf?.[key]);
  expect(hf).toMatchObject({ bosToken: "<|begin_of_text|>", eosToken: "<|end_of_text|>", addBos: true });
});

function ggufKeys(values: Record<string, Json>): Keys {
  const entries = Object.entries(values).map(
    ([key, value]) => [`tokenizer.ggml.${key}`, { value, offset: 0 }] as const,
  );
  return new Keys("x.gguf", new Map(entries));
}

const SPM_TOKENS = [
  "<unk>",
  "<s>",
  "</s>",
  "<0x0A>",
  "<0xC3>",
  "<0xA9>",
  "\u2581",
  "a",
  "b",
  "ab",
  "\u2581a",
  "\u2581ab",
];
const SPM_TYPES = [2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1];
const SPM_SCORES = [0, 0, 0, 0, 0, 0, -10, -11, -12, -1, -2, -3];
const spm = (changes: Record<string, Json> = {}) => ({
  ...{ model: "llama", tokens: SPM_TOKENS, token_type: SPM_TYPES, scores: SPM_SCORES },
  ...{ bos_token_id: 1, eos_token_id: 2, unknown_token_id: 0, ...changes },
});

test("SentencePiece: best score merges first, unknown characters become bytes, a space goes before", async () => {
  const converted = convertGgufTokenizer(ggufKeys(spm()));
  const tokenizer = Tokenizer.fromString(converted?.json ?? "");
  const ids = async (text: string) => (await tokenizer.encode(text)).getIds();
  expect(await ids("ab")).toEqual([1, 11]);
  expect(await ids("aba")).toEqual([1, 11, 7]);
  expect(await ids("b\né")).toEqual([1, 6, 8, 3, 4, 5]);
  expect(await tokenizer.decode([11, 10], true)).toBe("ab a");
});

test("control tokens keep their ids wherever in the table they stand", async () => {
  const tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "\u0120", "<|last|>"];
  const keys = { model: "gpt2", pre: "default", tokens, token_type: [3, 3, 3, 1, 1, 1, 1, 3], merges: ["a b"] };
  const converted = convertGgufTokenizer(ggufKeys({ ...keys, bos_token_id: 1, eos_token_id: 2 }));
  const tokenizer = Tokenizer.fromString(converted?.json ?? "");
  for (const [id, token] of tokens.entries()) expect(tokenizer.tokenToId(token), token).toBe(id);
  const encoding = await tokenizer.encode("<|im_start|>ab<|im_end|> a<|last|>", null, { addSpecialTokens: false });
  expect(encoding.getIds()).toEqual([1, 5, 2, 6, 3, 7]);
});

test("end tokens are those that keys name and those that files forget", () => {
  const tokens = ["x", "<|im_end|>", "<|endoftext|>", "y"];
  const converted = convertGgufTokenizer(
    ggufKeys({ ...{ model: "gpt2", tokens, token_type: [1, 3, 3, 1], merges: [] }, eos_token_id: 3, eot_token_id: 1 }),
  );
  expect(converted?.stopIds).toEqual([3, 1, 2]);
});

const REFUSED: [string, Record<string, Json>, string][] = [
  ["another engine", spm({ model: "t5" }), 'tokenizer.ggml.model: tokenizer "t5" is not supported'],
  ["an unknown pre-tokenizer", spm({ model: "gpt2", pre: "tekken", merges: [] }), 'pre-tokenizer "tekken"'],
  ["too few types", spm({ token_type: [1] }), "has 1 items for 12 tokens"],
  ["too few scores", spm({ scores: [0] }), "tokenizer.ggml.scores: has 1 items"],
  ["a score that is text", spm({ scores: SPM_SCORES.map((s, i) => (i === 7 ? "x" : s)) }), "item 7 must be a number"],
  ["a merge without a space", spm({ model: "gpt2", merges: ["ab"] }), "merges: item 0 has no space"],
  ["a begin token beyond the vocabulary", spm({ bos_token_id: 12 }), "bos_token_id: must be an integer of 0..11"],
];
for (const [what, keys, message] of REFUSED)
  test(`a GGUF tokenizer with ${what} is refused by name`, () => {
    expect(() => convertGgufTokenizer(ggufKeys(keys))).toThrow(message);
  });

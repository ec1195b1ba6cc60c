// A GGUF file's tokenizer keys as a Hugging Face tokenizer.json: pure. Two engines exist: byte-level BPE ("gpt2"), told apart
// by its pre-tokenizer name, and SentencePiece BPE with byte fallback ("llama"), whose merges follow from the scores.
import type { Keys } from "./keys.ts";

const TOKENS_MAX = 1_000_000;
const PIECE_LENGTH_MAX = 512;
const TYPES = { min: 0, max: 6 };
const UNKNOWN = 2;
const CONTROL = 3;
const USER_DEFINED = 4;
const UNUSED = 5;
const NORMAL = 1;
const SPACE = "\u2581";

/** End-of-turn tokens that files forget to name in a key. */
const END_TEXTS: ReadonlySet<string> = new Set([
  "<|eot_id|>",
  "<|im_end|>",
  "<|end|>",
  "<end_of_turn>",
  "<|endoftext|>",
  "<|eom_id|>",
  "<|eot|>",
  "<|eom|>",
  "<|end_of_text|>",
]);

const CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const SPACES = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const LLAMA3 = `${CONTRACTIONS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${SPACES}`;
const QWEN2 = LLAMA3.replace("\\p{N}{1,3}", "\\p{N}");
const UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
const O200K = [
  `[^\\r\\n\\p{L}\\p{N}]?${UPPER}*${LOWER}+${CONTRACTIONS}?`,
  `[^\\r\\n\\p{L}\\p{N}]?${UPPER}+${LOWER}*${CONTRACTIONS}?`,
  "\\p{N}{1,3}",
  " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*",
  SPACES,
].join("|");

type PreTokenizer = { regex?: string; digits?: boolean; nfc?: boolean; wholeWords?: boolean };
const GPT2: PreTokenizer = {};
const DIGITS_GPT2: PreTokenizer = { digits: true };
const LLAMA3_WHOLE: PreTokenizer = { regex: LLAMA3, wholeWords: true };
/** `wholeWords` (ignore_merges): a pre-token that is in the vocabulary is one token whatever the merges say. */
const PRE_TOKENIZERS: ReadonlyMap<string, PreTokenizer> = new Map([
  ["default", GPT2],
  ["gpt-2", GPT2],
  ["olmo", GPT2],
  ["phi-2", GPT2],
  ["smollm", DIGITS_GPT2],
  ["starcoder", DIGITS_GPT2],
  ["refact", DIGITS_GPT2],
  ["llama-bpe", LLAMA3_WHOLE],
  ["llama3", LLAMA3_WHOLE],
  ["llama-v3", LLAMA3_WHOLE],
  ["dbrx", { regex: LLAMA3 }],
  ["smaug-bpe", { regex: LLAMA3 }],
  ["llama4", { regex: O200K }],
  ["gpt-4o", { regex: O200K }],
  ["qwen2", { regex: QWEN2, nfc: true }],
  ["deepseek-r1-qwen", { regex: QWEN2, nfc: true }],
]);

export type GgufTokenizer = {
  /** The text of a tokenizer.json. */
  json: string;
  /** id -> text, for the vocabulary hash. */
  texts: Map<number, string>;
  chatTemplate: string;
  bosId: number | undefined;
  bosToken: string;
  eosToken: string;
  addBos: boolean;
  stopIds: number[];
};

type Vocabulary = { tokens: string[]; types: number[] };

/** `keys` without a prefix. Undefined where the file has no tokenizer. */
export function convertGgufTokenizer(keys: Keys): GgufTokenizer | undefined {
  const ggml = keys.prefixed("tokenizer.ggml.");
  if (!ggml.has("tokens")) return undefined;
  const tokens = ggml.texts("tokens", TOKENS_MAX) ?? [];
  const types = ggml.integers("token_type", TOKENS_MAX, TYPES) ?? tokens.map(() => NORMAL);
  if (types.length !== tokens.length)
    ggml.reject("token_type", `has ${types.length} items for ${tokens.length} tokens`);
  const vocabulary = { tokens, types };
  const id = (key: string) => {
    const value = ggml.has(key) ? ggml.integer(key, { min: 0, max: Math.max(0, tokens.length - 1) }) : undefined;
    return value;
  };
  const engine = ggml.text("model");
  const isBytes = engine === "gpt2";
  if (!isBytes && engine !== "llama")
    ggml.unsupported("model", `tokenizer "${engine}" is not supported; gpt2 and llama are`);
  const bosId = id("bos_token_id");
  const eosId = id("eos_token_id");
  // Where no key says: SentencePiece models and the Llama byte-level ones begin with it.
  const addBos =
    ggml.flag("add_bos_token", !isBytes || ggml.text("pre", "").startsWith("llama")) && bosId !== undefined;
  const model = isBytes ? byteLevel(ggml, vocabulary) : sentencePiece(ggml, vocabulary);
  const bos = bosId === undefined ? "" : (tokens[bosId] ?? "");
  const rest = { truncation: null, padding: null, added_tokens: addedTokens(vocabulary) };
  const json = JSON.stringify({
    version: "1.0",
    ...rest,
    ...model,
    post_processor: addBos ? prefixing(bos, bosId) : null,
  });
  const texts = new Map([...tokens.entries()].filter(([i]) => types[i] !== UNUSED));
  const ends = [...tokens.entries()].filter(([i, text]) => types[i] === CONTROL && END_TEXTS.has(text)).map(([i]) => i);
  const named = [eosId, id("eot_token_id"), id("eom_token_id")].filter((end) => end !== undefined);
  return {
    ...{ json, texts, bosId, bosToken: bos, addBos },
    chatTemplate: keys.text("tokenizer.chat_template", ""),
    eosToken: eosId === undefined ? "" : (tokens[eosId] ?? ""),
    stopIds: [...new Set([...named, ...ends])],
  };
}

const isAdded = (type: number | undefined): boolean => type === CONTROL || type === USER_DEFINED || type === UNKNOWN;

function addedTokens({ tokens, types }: Vocabulary): object[] {
  const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false };
  return [...tokens.entries()]
    .filter(([id]) => isAdded(types[id]))
    .map(([id, content]) => ({ id, content, ...flags, special: types[id] !== USER_DEFINED }));
}

/** Puts the begin token before a text, as the model was trained. */
function prefixing(token: string, id: number | undefined): object {
  const first = { SpecialToken: { id: token, type_id: 0 } };
  const sequence = (name: string, type: number) => ({ Sequence: { id: name, type_id: type } });
  return {
    type: "TemplateProcessing",
    single: [first, sequence("A", 0)],
    pair: [first, sequence("A", 0), sequence("B", 1)],
    special_tokens: { [token]: { id: token, ids: [id], tokens: [token] } },
  };
}

function byteLevel(ggml: Keys, { tokens, types }: Vocabulary): object {
  const name = ggml.text("pre", "default");
  const pre = PRE_TOKENIZERS.get(name);
  if (!pre) {
    const known = [...PRE_TOKENIZERS.keys()].join(", ");
    ggml.unsupported("pre", `pre-tokenizer "${name}" is not supported; ${known} are`);
  }
  const merges = (ggml.texts("merges", 4 * TOKENS_MAX) ?? []).map((merge, i) => {
    const cut = merge.indexOf(" ", 1);
    return cut > 0 ? [merge.slice(0, cut), merge.slice(cut + 1)] : ggml.reject("merges", `item ${i} has no space`);
  });
  const bytes = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: pre.regex === undefined };
  const split = { type: "Split", pattern: { Regex: pre.regex }, behavior: "Isolated", invert: false };
  const steps = [
    ...(pre.digits ? [{ type: "Digits", individual_digits: true }] : []),
    ...(pre.regex ? [split] : []),
    bytes,
  ];
  // Control tokens stay in the table: the library gives an added token that it does not find there a new id.
  const kept = [...tokens.entries()].filter(([id]) => types[id] !== UNUSED);
  return {
    normalizer: pre.nfc ? { type: "NFC" } : null,
    pre_tokenizer: { type: "Sequence", pretokenizers: steps },
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      ...{ type: "BPE", dropout: null, unk_token: null, continuing_subword_prefix: null, end_of_word_suffix: null },
      ...{ fuse_unk: false, byte_fallback: false, ignore_merges: pre.wholeWords ?? false },
      vocab: vocabularyJson(kept),
      merges,
    },
  };
}

function sentencePiece(ggml: Keys, { tokens, types }: Vocabulary): object {
  const scores = ggml.list("scores", TOKENS_MAX) ?? ggml.reject("scores", "is missing");
  if (scores.length !== tokens.length) ggml.reject("scores", `has ${scores.length} items for ${tokens.length} tokens`);
  const unknown = ggml.integer("unknown_token_id", { min: 0, max: tokens.length - 1 }, 0);
  const prefix = ggml.flag("add_space_prefix", true);
  const kept = [...tokens.entries()].filter(([id]) => types[id] !== UNUSED);
  const toSpace = { type: "Replace", pattern: { String: " " }, content: SPACE };
  const fromSpace = { type: "Replace", pattern: { String: SPACE }, content: " " };
  const steps = [fromSpace, { type: "ByteFallback" }, { type: "Fuse" }];
  return {
    normalizer: { type: "Sequence", normalizers: prefix ? [{ type: "Prepend", prepend: SPACE }, toSpace] : [toSpace] },
    pre_tokenizer: null,
    decoder: {
      type: "Sequence",
      decoders: prefix ? [...steps, { type: "Strip", content: " ", start: 1, stop: 0 }] : steps,
    },
    model: {
      ...{ type: "BPE", dropout: null, unk_token: tokens[unknown] ?? null, continuing_subword_prefix: null },
      ...{ end_of_word_suffix: null, fuse_unk: true, byte_fallback: true, ignore_merges: false },
      vocab: vocabularyJson(kept),
      merges: mergesOf(ggml, { tokens, types }, scores),
    },
  };
}

/** A plain object without a prototype, so that a token "__proto__" is a token. */
function vocabularyJson(entries: [number, string][]): Record<string, number> {
  const vocabulary: Record<string, number> = Object.create(null);
  for (const [id, text] of entries) vocabulary[text] = id;
  return vocabulary;
}

/** Every way to build a piece from two others, best score first: what SentencePiece's greedy rule does. */
function mergesOf(ggml: Keys, { tokens, types }: Vocabulary, scores: readonly unknown[]): [string, string][] {
  const ids = new Map([...tokens.entries()].filter(([id]) => types[id] === NORMAL).map(([id, text]) => [text, id]));
  const merges: { left: string; right: string; score: number; order: number }[] = [];
  for (const [id, piece] of tokens.entries()) {
    const score = scores[id];
    if (typeof score !== "number") ggml.reject("scores", `item ${id} must be a number`);
    if (types[id] !== NORMAL) continue;
    if (piece.length > PIECE_LENGTH_MAX) ggml.reject("tokens", `item ${id} is longer than ${PIECE_LENGTH_MAX}`);
    const characters = [...piece];
    for (let cut = 1; cut < characters.length; cut++) {
      const left = characters.slice(0, cut).join("");
      const right = characters.slice(cut).join("");
      if (ids.has(left) && ids.has(right)) merges.push({ left, right, score, order: ids.get(left) ?? 0 });
    }
  }
  merges.sort((a, b) => b.score - a.score || b.left.length - a.left.length || a.order - b.order);
  return merges.map(({ left, right }) => [left, right]);
}

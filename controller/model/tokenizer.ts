// What the model says about its tokenizer: where its tokenizer.json lies, template, special tokens, and the hash that tells
// whether two models may speculate together.
import { createHash } from "node:crypto";
import type { TokenizerSpec } from "../../proto/gen/muster/v1/plan.ts";
import { readWhole } from "./byte-source.ts";
import { type Json, JsonObject, parseJsonObject } from "./json.ts";
import { Keys } from "./keys.ts";
import { reject } from "./reject.ts";
import type { Source } from "./sources/source.ts";

/** The largest published tokenizer.json (256,000 ids with merges) has 34 MB. */
export const TOKENIZER_BYTES_MAX = 128 * 1024 * 1024;
const CONFIG_BYTES_MAX = 16 * 1024 * 1024;
const TEMPLATE_BYTES_MAX = 1024 * 1024;
const TOKENIZER = "tokenizer.json";

/** First 8 bytes (big-endian) of sha256 over each id ascending: id and text length as u32 little-endian, text as UTF-8. */
export function vocabHash(texts: ReadonlyMap<number, string>): bigint {
  const hash = createHash("sha256");
  for (const id of [...texts.keys()].sort((a, b) => a - b)) {
    const text = Buffer.from(texts.get(id) ?? "", "utf8");
    const head = Buffer.alloc(8);
    head.writeUInt32LE(id, 0);
    head.writeUInt32LE(text.length, 4);
    hash.update(head).update(text);
  }
  return hash.digest().readBigUInt64BE(0);
}

/** Undefined where the source has no tokenizer.json. */
export async function readHfTokenizer(source: Source): Promise<TokenizerSpec | undefined> {
  const bytes = await readOptional(source, TOKENIZER, TOKENIZER_BYTES_MAX);
  if (!bytes) return undefined;
  const tokenizer = new Keys(TOKENIZER, parseJsonObject(bytes, TOKENIZER).entries);
  const config = await readConfig(source);
  const bosToken = specialToken(config, "bos_token");
  const addsBos = bosToken !== "" && templateAdds(tokenizer, bosToken);
  const [jsonPath = ""] = await source.fetch([TOKENIZER]);
  return {
    jsonPath,
    chatTemplate: await chatTemplate(source, config),
    bosToken,
    eosToken: specialToken(config, "eos_token"),
    addBos: config?.has("add_bos_token") ? bosToken !== "" && config.flag("add_bos_token", false) : addsBos,
    vocabHash: vocabHash(vocabularyOf(tokenizer)),
  };
}

async function readOptional(source: Source, name: string, bytesMax: number): Promise<Buffer | undefined> {
  const file = await source.open(name);
  if (!file) return undefined;
  try {
    return await readWhole(file, bytesMax);
  } finally {
    await file.close();
  }
}

async function readConfig(source: Source): Promise<Keys | undefined> {
  const name = "tokenizer_config.json";
  const bytes = await readOptional(source, name, CONFIG_BYTES_MAX);
  return bytes && new Keys(name, parseJsonObject(bytes, name).entries);
}

/** A string, or an object with `content`. */
function specialToken(config: Keys | undefined, key: string): string {
  const value = config?.raw(key);
  if (value === undefined || !config) return "";
  if (typeof value === "string") return value;
  return config.child(key)?.text("content") ?? "";
}

async function chatTemplate(source: Source, config: Keys | undefined): Promise<string> {
  const file = await readOptional(source, "chat_template.jinja", TEMPLATE_BYTES_MAX);
  if (file) return file.toString("utf8");
  const value = config?.raw("chat_template");
  if (value === undefined || !config) return "";
  if (!Array.isArray(value)) return config.text("chat_template");
  for (const item of value) {
    if (!(item instanceof JsonObject)) return config.reject("chat_template", "its items must be objects");
    const named = new Keys(config.file, item.entries, { path: "chat_template." });
    if (named.text("name") === "default") return named.text("template");
  }
  return "";
}

/** Whether the post-processor puts the token before a text. */
function templateAdds(tokenizer: Keys, token: string): boolean {
  const mentions = (value: Json): boolean => {
    if (Array.isArray(value)) return value.some(mentions);
    if (!(value instanceof JsonObject)) return false;
    const id = value.entries.get("SpecialToken")?.value;
    if (id instanceof JsonObject && id.entries.get("id")?.value === token) return true;
    return [...value.entries].some(([key, entry]) => key !== "pair" && mentions(entry.value));
  };
  const processor = tokenizer.child("post_processor") && tokenizer.raw("post_processor");
  return processor instanceof JsonObject && mentions(processor);
}

/** id -> text of every token, model and added ones. */
function vocabularyOf(tokenizer: Keys): Map<number, string> {
  const texts = new Map<number, string>();
  const model = tokenizer.child("model") ?? tokenizer.reject("model", "is missing");
  const vocabulary = model.raw("vocab");
  if (vocabulary instanceof JsonObject) {
    for (const [text, { value, offset }] of vocabulary.entries) {
      if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value > 0xffff_ffff)
        reject(`${TOKENIZER}/model.vocab`, "ids must be integers", offset);
      texts.set(value, text);
    }
  } else if (Array.isArray(vocabulary)) {
    for (const [id, item] of vocabulary.entries())
      if (Array.isArray(item) && typeof item[0] === "string") texts.set(id, item[0]);
      else model.reject("vocab", `item ${id} must be [text, score]`);
  } else model.reject("vocab", "must be an object or an array");
  for (const item of tokenizer.list("added_tokens", 1_000_000) ?? []) {
    if (!(item instanceof JsonObject)) return tokenizer.reject("added_tokens", "its items must be objects");
    const added = new Keys(TOKENIZER, item.entries, { path: "added_tokens." });
    texts.set(added.integer("id", { min: 0, max: 0xffff_ffff }), added.text("content"));
  }
  return texts;
}

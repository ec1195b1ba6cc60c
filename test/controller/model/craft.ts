// Builds small model files byte by byte, so that each test can break exactly one thing.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { FaultError } from "../../../proto/fault.ts";
import { Fault_Kind } from "../../../proto/gen/muster/v1/worker.ts";

const root = mkdtempSync(join(tmpdir(), "muster-model-"));
afterAll(() => rmSync(root, { recursive: true, force: true }));
let folders = 0;

export const cacheDir = join(root, "cache");

/** Writes files into a new directory and answers its path. */
export function folder(files: Record<string, string | Uint8Array>): string {
  const path = mkdtempSync(join(root, `${++folders}-`));
  for (const [name, bytes] of Object.entries(files)) writeFileSync(join(path, name), bytes);
  return path;
}

/** What readModel says against the source: "field: detail". Fails where it reads it, or throws anything but a FaultError. */
export async function refusal(source: string): Promise<string> {
  try {
    await readModel(source, { cacheDir });
  } catch (error) {
    if (!(error instanceof FaultError)) throw error;
    expect(error.fault.kind).toBe(Fault_Kind.INVALID);
    expect(error.fault.field).not.toBe("");
    return error.message;
  }
  throw new Error("the model was read, though it is broken");
}

type Info = { dtype: string; shape: number[]; data_offsets: [number, number] };
export type SafetensorsHeader = Record<string, Info | Record<string, unknown>>;

/** A safetensors file from a header object or from header text as it stands. */
export function safetensors(
  header: SafetensorsHeader | string | Uint8Array,
  dataBytes: number,
  length?: bigint,
): Buffer {
  const text = typeof header === "string" || header instanceof Uint8Array ? header : JSON.stringify(header);
  const bytes = Buffer.from(text);
  const head = Buffer.alloc(8);
  head.writeBigUInt64LE(length ?? BigInt(bytes.length));
  return Buffer.concat([head, bytes, Buffer.alloc(dataBytes)]);
}

export const TINY = { hidden: 8, ffn: 16, heads: 2, vocab: 12 };

export const tinyConfig: Record<string, unknown> = {
  architectures: ["LlamaForCausalLM"],
  model_type: "llama",
  hidden_size: TINY.hidden,
  intermediate_size: TINY.ffn,
  num_attention_heads: TINY.heads,
  num_key_value_heads: 1,
  num_hidden_layers: 1,
  vocab_size: TINY.vocab,
  rms_norm_eps: 1e-5,
  max_position_embeddings: 64,
  eos_token_id: 2,
};

export const TINY_SHAPES: readonly [string, number[]][] = [
  ["model.embed_tokens.weight", [12, 8]],
  ["model.norm.weight", [8]],
  ["lm_head.weight", [12, 8]],
  ["model.layers.0.input_layernorm.weight", [8]],
  ["model.layers.0.post_attention_layernorm.weight", [8]],
  ["model.layers.0.self_attn.q_proj.weight", [8, 8]],
  ["model.layers.0.self_attn.k_proj.weight", [4, 8]],
  ["model.layers.0.self_attn.v_proj.weight", [4, 8]],
  ["model.layers.0.self_attn.o_proj.weight", [8, 8]],
  ["model.layers.0.mlp.gate_proj.weight", [16, 8]],
  ["model.layers.0.mlp.up_proj.weight", [16, 8]],
  ["model.layers.0.mlp.down_proj.weight", [8, 16]],
];

/** Header and data length of a whole tiny model in F32. */
export function tinyHeader(shapes: readonly [string, number[]][] = TINY_SHAPES): {
  header: Record<string, Info>;
  bytes: number;
} {
  const header: Record<string, Info> = {};
  let at = 0;
  for (const [name, shape] of shapes) {
    const bytes = shape.reduce((a, b) => a * b, 4);
    header[name] = { dtype: "F32", shape, data_offsets: [at, at + bytes] };
    at += bytes;
  }
  return { header, bytes: at };
}

export function tinyFolder(config: Record<string, unknown> = {}, file?: Uint8Array): string {
  const { header, bytes } = tinyHeader();
  return folder({
    "config.json": JSON.stringify({ ...tinyConfig, ...config }),
    "model.safetensors": file ?? safetensors(header, bytes),
  });
}

/** One GGUF value with its type id, as it goes into the file. */
export type GgufValue = { type: number; bytes: Buffer };
export const u32 = (value: number): GgufValue => ({ type: 4, bytes: le32(value) });
export const f32 = (value: number): GgufValue => {
  const bytes = Buffer.alloc(4);
  bytes.writeFloatLE(value);
  return { type: 6, bytes };
};
export const bool = (value: boolean): GgufValue => ({ type: 7, bytes: Buffer.from([value ? 1 : 0]) });
export const text = (value: string): GgufValue => ({ type: 8, bytes: ggufString(value) });
export const u64 = (value: bigint): GgufValue => ({ type: 10, bytes: le64(value) });
export function array(itemType: number, items: Buffer[], count?: bigint): GgufValue {
  return { type: 9, bytes: Buffer.concat([le32(itemType), le64(count ?? BigInt(items.length)), ...items]) };
}

export function le32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}
export function le64(value: bigint | number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}
export const ggufString = (value: string): Buffer =>
  Buffer.concat([le64(Buffer.byteLength(value)), Buffer.from(value)]);

export type GgufTensor = { name: string; ne: (number | bigint)[]; type?: number; offset?: number; bytes?: number };
export type GgufParts = {
  magic?: string;
  version?: number;
  keys: [string, GgufValue][];
  tensors: GgufTensor[];
  tensorCount?: bigint;
  keyCount?: bigint;
  /** Data bytes; what the tensors need where it is left out. */
  dataBytes?: number;
};

export function gguf(parts: GgufParts): Buffer {
  const out: Buffer[] = [Buffer.from(parts.magic ?? "GGUF"), le32(parts.version ?? 3)];
  out.push(le64(parts.tensorCount ?? BigInt(parts.tensors.length)), le64(parts.keyCount ?? BigInt(parts.keys.length)));
  for (const [key, { type, bytes }] of parts.keys) out.push(ggufString(key), le32(type), bytes);
  let at = 0;
  for (const { name, ne, type = 0, offset, bytes } of parts.tensors) {
    out.push(ggufString(name), le32(ne.length), ...ne.map(le64), le32(type), le64(offset ?? at));
    at = Math.ceil((at + (bytes ?? ne.reduce<number>((a, b) => a * Number(b), 4))) / 32) * 32;
  }
  const header = Buffer.concat(out);
  const padding = (32 - (header.length % 32)) % 32;
  return Buffer.concat([header, Buffer.alloc(padding + (parts.dataBytes ?? at))]);
}

export const tinyKeys: [string, GgufValue][] = [
  ["general.architecture", text("llama")],
  ["llama.block_count", u32(1)],
  ["llama.context_length", u32(64)],
  ["llama.embedding_length", u32(8)],
  ["llama.feed_forward_length", u32(16)],
  ["llama.attention.head_count", u32(2)],
  ["llama.attention.head_count_kv", u32(1)],
  ["llama.attention.layer_norm_rms_epsilon", f32(1e-5)],
  ["llama.vocab_size", u32(12)],
];

export const tinyTensors: GgufTensor[] = [
  { name: "token_embd.weight", ne: [8, 12] },
  { name: "output_norm.weight", ne: [8] },
  { name: "blk.0.attn_norm.weight", ne: [8] },
  { name: "blk.0.attn_q.weight", ne: [8, 8] },
  { name: "blk.0.attn_k.weight", ne: [8, 4] },
  { name: "blk.0.attn_v.weight", ne: [8, 4] },
  { name: "blk.0.attn_output.weight", ne: [8, 8] },
  { name: "blk.0.ffn_norm.weight", ne: [8] },
  { name: "blk.0.ffn_gate.weight", ne: [8, 16] },
  { name: "blk.0.ffn_up.weight", ne: [8, 16] },
  { name: "blk.0.ffn_down.weight", ne: [16, 8] },
];

/** The tiny GGUF with keys set, replaced or (undefined) left out. */
export function withKeys(changes: Record<string, GgufValue | undefined>): [string, GgufValue][] {
  const kept = tinyKeys.filter(([key]) => !(key in changes));
  const set = Object.entries(changes).flatMap(([key, value]): [string, GgufValue][] => (value ? [[key, value]] : []));
  return [...kept, ...set];
}

/** The tiny GGUF's tensors, one of them changed. */
export const withTensor = (name: string, change: Partial<GgufTensor>): GgufTensor[] =>
  tinyTensors.map((tensor) => (tensor.name === name ? { ...tensor, ...change } : tensor));

export const ggufFile = (bytes: Uint8Array): string => `file://${folder({ "x.gguf": bytes })}/x.gguf`;

// Grouped-query attention as most families have it: its dimensions from either kind of header, and its planes.
import { TensorRole } from "../../proto/gen/muster/v1/plan.ts";
import { BLOCKS_MAX, type Origin } from "./family.ts";
import { DIMENSION, type Keys } from "./keys.ts";
import type { TensorTable } from "./tensor-table.ts";

export type GqaShape = {
  vocab: number;
  hidden: number;
  blocks: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  contextTokens: number;
  eps: number;
  /** undefined where the container says it by the absence of a head. */
  tied: boolean | undefined;
};

const HEADS = { min: 1, max: 4096 };
const HEAD_DIM = { min: 2, max: 4096 };
const BLOCKS = { min: 1, max: BLOCKS_MAX };
const CONTEXT = { min: 1, max: 1_000_000_000 };
const EPS = { min: 0, max: 0.1 };

/** Refuses by name what would change the answers if it were ignored. */
export function rejectUnsupportedKeys(config: Keys, family: string, biases: readonly string[]): void {
  for (const key of biases)
    if (config.flag(key, false)) config.unsupported(key, `biases are not supported in family ${family}`);
  const activation = config.text("hidden_act", "silu");
  if (activation !== "silu" && activation !== "swish")
    config.unsupported("hidden_act", `activation "${activation}" is not supported in family ${family}, silu is`);
}

export function hfGqaShape(config: Keys, defaults: { eps: number; contextTokens: number }): GqaShape {
  const hidden = config.integer("hidden_size", DIMENSION);
  const heads = config.integer("num_attention_heads", HEADS);
  const shape = {
    vocab: config.integer("vocab_size", DIMENSION),
    hidden,
    blocks: config.integer("num_hidden_layers", BLOCKS),
    heads,
    kvHeads: config.integer("num_key_value_heads", HEADS, heads),
    headDim: config.integer("head_dim", HEAD_DIM, hidden % heads === 0 ? hidden / heads : undefined),
    contextTokens: config.integer("max_position_embeddings", CONTEXT, defaults.contextTokens),
    eps: config.number("rms_norm_eps", EPS, defaults.eps),
    tied: config.flag("tie_word_embeddings", false),
  };
  checkHeads(config, shape, { heads: "num_key_value_heads", dim: "head_dim" });
  return shape;
}

export function ggufGqaShape(keys: Keys): GqaShape {
  const hidden = keys.integer("embedding_length", DIMENSION);
  const heads = keys.integer("attention.head_count", HEADS);
  const tokens = keys.prefixed("").list("tokenizer.ggml.tokens", 16_777_216);
  const headDim = keys.integer("attention.key_length", HEAD_DIM, hidden % heads === 0 ? hidden / heads : undefined);
  if (keys.integer("attention.value_length", HEAD_DIM, headDim) !== headDim)
    keys.unsupported("attention.value_length", "values of another width than keys are not supported");
  const shape = {
    vocab: keys.integer("vocab_size", DIMENSION, tokens?.length),
    hidden,
    blocks: keys.integer("block_count", BLOCKS),
    heads,
    kvHeads: keys.integer("attention.head_count_kv", HEADS, heads),
    headDim,
    contextTokens: keys.integer("context_length", CONTEXT),
    eps: keys.number("attention.layer_norm_rms_epsilon", EPS),
    tied: undefined,
  };
  checkHeads(keys, shape, { heads: "attention.head_count_kv", dim: "attention.key_length" });
  return shape;
}

function checkHeads(
  keys: Keys,
  shape: { heads: number; kvHeads: number; headDim: number },
  names: { heads: string; dim: string },
): void {
  if (shape.heads % shape.kvHeads !== 0)
    keys.reject(names.heads, `${shape.heads} query heads do not divide over ${shape.kvHeads} kv heads`);
  if (shape.headDim % 2 !== 0) keys.reject(names.dim, `the head dimension must be even, is ${shape.headDim}`);
}

/** Embedding, final norm and head. Answers whether the head is the embedding. */
export function globalPlanes(table: TensorTable, shape: GqaShape, origin: Origin): boolean {
  const { vocab, hidden } = shape;
  table.linear(TensorRole.EMBEDDING, [vocab, hidden]);
  table.vector(TensorRole.FINAL_NORM, hidden);
  if (table.has(TensorRole.ROPE_FACTORS) && origin.kind === "gguf")
    table.vector(TensorRole.ROPE_FACTORS, origin.ropeFactors?.length ?? 0);
  const tied = shape.tied ?? !table.has(TensorRole.HEAD);
  if (!tied) table.linear(TensorRole.HEAD, [vocab, hidden]);
  else table.ignore(/(^|\.)lm_head\.weight$/);
  return tied;
}

/** The norms and projections of one block's attention, and the norm before its MLP. */
export function gqaPlanes(table: TensorTable, shape: GqaShape, block: number): void {
  const { hidden } = shape;
  const queries = shape.heads * shape.headDim;
  const keys = shape.kvHeads * shape.headDim;
  table.vector(TensorRole.ATTENTION_NORM, hidden, block);
  table.linear(TensorRole.QUERY, [queries, hidden], block);
  table.linear(TensorRole.KEY, [keys, hidden], block);
  table.linear(TensorRole.VALUE, [keys, hidden], block);
  table.linear(TensorRole.OUTPUT, [hidden, queries], block);
  table.vector(TensorRole.MLP_NORM, hidden, block);
}

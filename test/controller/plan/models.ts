// Hand-built ModelSpecs of any shape, with a tensor table as real checkpoints have it.
import {
  type BlockSpec,
  MaskSpec_Kind,
  type ModelSpec,
  MoeSpec_Score,
  RopeSpec_Layout,
  ShardRule,
  StoredType,
  TensorRole,
  type TensorSpec,
} from "../../../proto/gen/muster/v1/plan.ts";

export type ModelShape = {
  layers: number;
  hidden: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  vocab: number;
  ffn: number;
  /** 0: a dense model. */
  experts: number;
  topK: number;
  expertFfn: number;
  sharedFfn: number;
  contextTokens: number;
  /** Stored bytes of one value; 2 is BF16, 1 FP8. */
  valueBytes: 1 | 2;
  tied: boolean;
};

/** SmolLM2-135M: nine heads, which no even number of ranks can cut. */
export const NINE_HEADS: ModelShape = {
  layers: 30,
  hidden: 576,
  heads: 9,
  kvHeads: 3,
  headDim: 64,
  vocab: 49_152,
  ffn: 1536,
  experts: 0,
  topK: 0,
  expertFfn: 0,
  sharedFfn: 0,
  contextTokens: 8192,
  valueBytes: 2,
  tied: true,
};

export function modelSpec(shape: ModelShape, name = "hand-built"): ModelSpec {
  const tensors: TensorSpec[] = [];
  const add = (
    role: TensorRole,
    rule: ShardRule,
    size: [rows: number, cols: number],
    place: { block?: number; expert?: number } = {},
  ) => {
    const [rows, cols] = size;
    const { block = -1, expert = -1 } = place;
    tensors.push({
      name: `${block}.${role}.${expert}`,
      role,
      rule,
      type: shape.valueBytes === 2 ? StoredType.BF16 : StoredType.F8_E4M3,
      block,
      expert,
      file: 0,
      offset: 0n,
      rows,
      cols,
      transposed: false,
      rowsStored: rows,
      rowFirst: 0,
      bytes: BigInt(rows * cols * shape.valueBytes),
    });
  };
  const { hidden, heads, kvHeads, headDim, vocab } = shape;
  add(TensorRole.EMBEDDING, ShardRule.VOCAB, [vocab, hidden]);
  add(TensorRole.FINAL_NORM, ShardRule.REPLICATE, [1, hidden]);
  if (!shape.tied) add(TensorRole.HEAD, ShardRule.VOCAB, [vocab, hidden]);
  for (let block = 0; block < shape.layers; block++) {
    add(TensorRole.ATTENTION_NORM, ShardRule.REPLICATE, [1, hidden], { block });
    add(TensorRole.QUERY, ShardRule.HEADS, [heads * headDim, hidden], { block });
    add(TensorRole.KEY, ShardRule.KV_HEADS, [kvHeads * headDim, hidden], { block });
    add(TensorRole.VALUE, ShardRule.KV_HEADS, [kvHeads * headDim, hidden], { block });
    add(TensorRole.OUTPUT, ShardRule.HEAD_ROWS, [hidden, heads * headDim], { block });
    add(TensorRole.MLP_NORM, ShardRule.REPLICATE, [1, hidden], { block });
    if (shape.experts === 0) {
      add(TensorRole.GATE, ShardRule.COLUMNS, [shape.ffn, hidden], { block });
      add(TensorRole.UP, ShardRule.COLUMNS, [shape.ffn, hidden], { block });
      add(TensorRole.DOWN, ShardRule.ROWS, [hidden, shape.ffn], { block });
      continue;
    }
    add(TensorRole.ROUTER, ShardRule.REPLICATE, [shape.experts, hidden], { block });
    for (let expert = 0; expert < shape.experts; expert++) {
      add(TensorRole.EXPERT_GATE, ShardRule.EXPERT, [shape.expertFfn, hidden], { block, expert });
      add(TensorRole.EXPERT_UP, ShardRule.EXPERT, [shape.expertFfn, hidden], { block, expert });
      add(TensorRole.EXPERT_DOWN, ShardRule.EXPERT, [hidden, shape.expertFfn], { block, expert });
    }
    if (shape.sharedFfn === 0) continue;
    add(TensorRole.SHARED_GATE, ShardRule.COLUMNS, [shape.sharedFfn, hidden], { block });
    add(TensorRole.SHARED_UP, ShardRule.COLUMNS, [shape.sharedFfn, hidden], { block });
    add(TensorRole.SHARED_DOWN, ShardRule.ROWS, [hidden, shape.sharedFfn], { block });
  }
  return { ...described(shape, name), tensors, ...parameters(shape, tensors) };
}

/** Of all planes, and of those one token uses. */
function parameters(
  shape: ModelShape,
  tensors: readonly TensorSpec[],
): Pick<ModelSpec, "parameters" | "parametersActive"> {
  let total = 0;
  let experts = 0;
  for (const { rows, cols, rule } of tensors) {
    total += rows * cols;
    if (rule === ShardRule.EXPERT) experts += rows * cols;
  }
  const active = total - experts + (shape.experts === 0 ? 0 : (experts * shape.topK) / shape.experts);
  return { parameters: BigInt(total), parametersActive: BigInt(Math.round(active)) };
}

function blockOf(shape: ModelShape): BlockSpec {
  const { heads, kvHeads, headDim, experts, topK, expertFfn, sharedFfn } = shape;
  const attention = {
    heads,
    kvHeads,
    headDim,
    scale: headDim ** -0.5,
    rope: { layout: RopeSpec_Layout.HALF, dims: headDim, theta: 10_000, frequencies: [] },
    mask: { kind: MaskSpec_Kind.FULL, span: 0 },
    qkUnitNorm: false,
    temperatureScale: 0,
    temperatureFloor: 0,
    kvGroup: 0,
  };
  if (experts === 0) return { attention, mlp: { $case: "dense", value: { ffn: shape.ffn } } };
  const rest = { score: MoeSpec_Score.SOFTMAX, normTopK: true, scale: 1, groups: 1, groupsUsed: 1, bias: false };
  return { attention, mlp: { $case: "moe", value: { experts, topK, expertFfn, sharedFfn, ...rest } } };
}

function described(shape: ModelShape, name: string): ModelSpec {
  const blocks = Array.from({ length: shape.layers }, () => blockOf(shape));
  const { kvHeads, headDim } = shape;
  return {
    name,
    family: "hand-built",
    source: `test://${name}`,
    digest: JSON.stringify(shape),
    vocabSize: shape.vocab,
    hiddenSize: shape.hidden,
    contextTokens: shape.contextTokens,
    normEps: 1e-5,
    tiedHead: shape.tied,
    blocks,
    kvGroups: [
      { blocks: blocks.map((_, index) => index), live: { kind: MaskSpec_Kind.FULL, span: 0 }, kvHeads, headDim },
    ],
    tensors: [],
    files: [],
    tokenizer: undefined,
    stopIds: [],
    bosId: 0,
    planOnly: "",
    projected: false,
    format: "hand-built",
    parameters: 0n,
    parametersActive: 0n,
  };
}

// Family llama: Llama 2 and 3.x and what shares their shape. Pre-norm RMS, grouped-query attention, rotary over the head,
// SwiGLU. HF checkpoints rotate in halves, GGUF ones were permuted to interleaved pairs.
import { type BlockSpec, MaskSpec_Kind, type RopeSpec, RopeSpec_Layout } from "../../../proto/gen/muster/v1/plan.ts";
import { type Described, type Family, type Origin, oneKvGroup } from "../family.ts";
import { denseFfnPlanes } from "../ffn.ts";
import { type GqaShape, ggufGqaShape, globalPlanes, gqaPlanes, hfGqaShape, rejectUnsupportedKeys } from "../gqa.ts";
import { DIMENSION, type Keys } from "../keys.ts";
import { ggufNaming, hfNaming } from "../names.ts";
import { frequencies, ggufRope, ropeRule } from "../rope.ts";
import { plainSynthetic, syntheticOf } from "../synthetic.ts";
import { SCALES, TensorTable } from "../tensor-table.ts";

type Shape = GqaShape & { ffn: number; rope: RopeSpec };

const HF_NAMES = { prefix: "", mlp: "mlp", router: "gate", shared: "shared_expert" };
const EXTRA_TENSORS_IGNORED = /\.rotary_emb\.inv_freq$/;

function hfShape(config: Keys): Shape {
  rejectUnsupportedKeys(config, "llama", ["attention_bias", "mlp_bias"]);
  const shape = hfGqaShape(config, { eps: 1e-6, contextTokens: 2048 });
  const rule = ropeRule(config, 10_000);
  const partial = config.number("partial_rotary_factor", { min: 0.01, max: 1 }, 1);
  const dims = Math.floor((shape.headDim * partial) / 2) * 2;
  return {
    ...shape,
    ffn: config.integer("intermediate_size", DIMENSION),
    rope: { layout: RopeSpec_Layout.HALF, dims, theta: rule.theta, frequencies: frequencies(dims, rule) },
  };
}

function ggufShape(keys: Keys, ropeFactors: number[] | undefined): Shape {
  if (keys.integer("expert_count", { min: 0, max: 4096 }, 0) > 0)
    keys.unsupported("expert_count", "mixture-of-experts models of architecture llama (Mixtral) are not supported");
  const shape = ggufGqaShape(keys);
  const dims = keys.integer("rope.dimension_count", { min: 2, max: shape.headDim }, shape.headDim);
  return {
    ...shape,
    ffn: keys.integer("feed_forward_length", DIMENSION),
    rope: ggufRope(keys, dims, ropeFactors),
  };
}

function blocksOf(shape: Shape): BlockSpec[] {
  return Array.from({ length: shape.blocks }, () => ({
    attention: {
      heads: shape.heads,
      kvHeads: shape.kvHeads,
      headDim: shape.headDim,
      scale: shape.headDim ** -0.5,
      rope: shape.rope,
      mask: { kind: MaskSpec_Kind.FULL, span: 0 },
      qkUnitNorm: false,
      temperatureScale: 0,
      temperatureFloor: 0,
      kvGroup: 0,
    },
    mlp: { $case: "dense", value: { ffn: shape.ffn } },
  }));
}

function describe(origin: Origin): Described {
  const shape = origin.kind === "hf" ? hfShape(origin.config) : ggufShape(origin.keys, origin.ropeFactors);
  const naming = origin.kind === "hf" ? hfNaming(HF_NAMES) : ggufNaming;
  const synthetic = origin.kind === "hf" ? syntheticOf(origin.config) : plainSynthetic;
  const table = new TensorTable(origin.checkpoint, naming, synthetic);
  const tiedHead = globalPlanes(table, shape, origin);
  for (let block = 0; block < shape.blocks; block++) {
    gqaPlanes(table, shape, block);
    denseFfnPlanes(table, [shape.hidden, shape.ffn], block);
  }
  table.ignore(EXTRA_TENSORS_IGNORED);
  table.others(SCALES);
  table.finish("llama");
  const blocks = blocksOf(shape);
  return {
    vocabSize: shape.vocab,
    hiddenSize: shape.hidden,
    contextTokens: shape.contextTokens,
    normEps: shape.eps,
    tiedHead,
    blocks,
    kvGroups: oneKvGroup(blocks, shape.kvHeads, shape.headDim),
    table,
    topK: 0,
    planOnly: "",
  };
}

export const llama: Family = {
  name: "llama",
  modelTypes: ["llama"],
  architectures: ["LlamaForCausalLM"],
  ggufArchitectures: ["llama"],
  describe,
};

// Family llama4: Scout and Maverick (text). Interleaved rotary on three layers of four, with chunked attention; every fourth
// layer has none, full attention and position-dependent query temperature. Experts are chosen by logit, the sigmoid of the
// logit scales the expert's input; a shared expert is added.
import {
  type AttentionSpec,
  type BlockSpec,
  type MaskSpec,
  MaskSpec_Kind,
  MoeSpec_Score,
  type RopeSpec,
  RopeSpec_Layout,
  TensorRole,
} from "../../../proto/gen/muster/v1/plan.ts";
import { type Described, EXPERTS_MAX, type Family, type Origin, oneKvGroup } from "../family.ts";
import {
  denseFfnPlanes,
  type ExpertShape,
  fusedExpertPlanes,
  separateExpertPlanes,
  sharedExpertPlanes,
  stackedExpertPlanes,
} from "../ffn.ts";
import { type GqaShape, ggufGqaShape, globalPlanes, gqaPlanes, hfGqaShape, rejectUnsupportedKeys } from "../gqa.ts";
import { DIMENSION, type Keys } from "../keys.ts";
import { ggufNaming, hfNaming } from "../names.ts";
import { frequencies, ggufRope, ropeRule } from "../rope.ts";
import { plainSynthetic, syntheticOf } from "../synthetic.ts";
import { SCALES, TensorTable } from "../tensor-table.ts";

/** What differs from layer to layer. */
type Layer = { usesRope: boolean; mask: MaskSpec; isMoe: boolean };
type Shape = GqaShape & {
  layers: Layer[];
  rope: RopeSpec;
  qkNorm: boolean;
  temperatureScale: number;
  temperatureFloor: number;
  denseFfn: number;
  expertFfn: number;
  sharedFfn: number;
  experts: number;
  topK: number;
};

const FULL: MaskSpec = { kind: MaskSpec_Kind.FULL, span: 0 };
const SPAN = { min: 1, max: 1_000_000_000 };
const EXPERTS = { min: 1, max: EXPERTS_MAX };
const SWITCH = { min: 0, max: 1 };
/** Constants of the GGUF architecture: no key carries them. */
const GGUF_CHUNK = 8192;
const GGUF_TEMPERATURE = { scale: 0.1, floor: 8192 };
const GGUF_NO_ROPE_INTERVAL = 4;
const GGUF_EXPERTS_WITHOUT_QK_NORM = 128;
const VISION = /^(vision_model|multi_modal_projector)\./;

function hfLayers(config: Keys, blocks: number): Layer[] {
  const interval = config.integer("no_rope_layer_interval", { min: 1, max: 1024 }, 4);
  const ropeList = config.integers("no_rope_layers", blocks, SWITCH) ?? [];
  if (ropeList.length !== 0 && ropeList.length !== blocks)
    config.reject("no_rope_layers", `must have one item for each of ${blocks} layers, has ${ropeList.length}`);
  const moeList = config.integers("moe_layers", blocks, { min: 0, max: blocks - 1 });
  const step = config.integer("interleave_moe_layer_step", { min: 1, max: 1024 }, 1);
  const types = config.texts("layer_types", blocks);
  if (types && types.length !== blocks)
    config.reject("layer_types", `must have one item for each of ${blocks} layers, has ${types.length}`);
  const span = config.integer("attention_chunk_size", SPAN, 8192);
  return Array.from({ length: blocks }, (_, i) => {
    // The list's name says the opposite: 1 means that the layer uses rope.
    const usesRope = ropeList.length ? ropeList[i] === 1 : (i + 1) % interval !== 0;
    const type = types?.[i] ?? (usesRope ? "chunked_attention" : "full_attention");
    if (type !== "chunked_attention" && type !== "full_attention")
      config.unsupported("layer_types", `layer ${i} is "${type}"; chunked_attention and full_attention are supported`);
    const mask = type === "chunked_attention" ? { kind: MaskSpec_Kind.CHUNKED, span } : FULL;
    return { usesRope, mask, isMoe: moeList ? moeList.includes(i) : (i + 1) % step === 0 };
  });
}

function hfShape(outer: Keys): Shape {
  const config = outer.child("text_config") ?? outer;
  rejectUnsupportedKeys(config, "llama4", ["attention_bias"]);
  const shape = hfGqaShape(config, { eps: 1e-5, contextTokens: 131_072 });
  const rule = ropeRule(config, 500_000);
  const ffn = config.integer("intermediate_size", DIMENSION);
  return {
    ...shape,
    tied: config.flag("tie_word_embeddings", outer.flag("tie_word_embeddings", false)),
    layers: hfLayers(config, shape.blocks),
    rope: {
      layout: RopeSpec_Layout.INTERLEAVED,
      dims: shape.headDim,
      theta: rule.theta,
      frequencies: frequencies(shape.headDim, rule),
    },
    qkNorm: config.flag("use_qk_norm", true),
    temperatureScale: config.truthy("attn_temperature_tuning", true)
      ? config.number("attn_scale", { min: 0, max: 100 }, 0.1)
      : 0,
    temperatureFloor: config.integer("floor_scale", SPAN, 8192),
    denseFfn: config.integer("intermediate_size_mlp", DIMENSION, ffn),
    expertFfn: ffn,
    sharedFfn: ffn,
    experts: config.integer("num_local_experts", EXPERTS, 16),
    topK: config.integer("num_experts_per_tok", EXPERTS, 1),
  };
}

function ggufShape(keys: Keys, ropeFactors: number[] | undefined): Shape {
  const shape = ggufGqaShape(keys);
  const experts = keys.integer("expert_count", EXPERTS);
  const step = keys.integer("interleave_moe_layer_step", { min: 1, max: 1024 }, 1);
  const expertFfn = keys.integer("expert_feed_forward_length", DIMENSION);
  const dims = keys.integer("rope.dimension_count", { min: 2, max: shape.headDim }, shape.headDim);
  const layers = Array.from({ length: shape.blocks }, (_, i) => {
    const usesRope = (i + 1) % GGUF_NO_ROPE_INTERVAL !== 0;
    const mask = usesRope ? { kind: MaskSpec_Kind.CHUNKED, span: GGUF_CHUNK } : FULL;
    return { usesRope, mask, isMoe: (i + 1) % step === 0 };
  });
  if (keys.integer("expert_shared_count", { min: 0, max: 64 }, 1) !== 1)
    keys.unsupported("expert_shared_count", "exactly one shared expert is supported");
  return {
    ...shape,
    layers,
    rope: ggufRope(keys, dims, ropeFactors),
    qkNorm: experts !== GGUF_EXPERTS_WITHOUT_QK_NORM,
    temperatureScale: GGUF_TEMPERATURE.scale,
    temperatureFloor: GGUF_TEMPERATURE.floor,
    denseFfn: keys.integer("feed_forward_length", DIMENSION),
    expertFfn,
    sharedFfn: keys.integer("expert_shared_feed_forward_length", DIMENSION, expertFfn),
    experts,
    topK: keys.integer("expert_used_count", EXPERTS),
  };
}

function attentionOf(shape: Shape, layer: Layer): AttentionSpec {
  const { heads, kvHeads, headDim, rope, temperatureScale, temperatureFloor } = shape;
  const none: RopeSpec = { layout: RopeSpec_Layout.NONE, dims: 0, theta: 0, frequencies: [] };
  const isTempered = !layer.usesRope && temperatureScale > 0;
  return {
    ...{ heads, kvHeads, headDim, scale: headDim ** -0.5, kvGroup: 0, mask: layer.mask },
    rope: layer.usesRope ? rope : none,
    qkUnitNorm: layer.usesRope && shape.qkNorm,
    temperatureScale: isTempered ? temperatureScale : 0,
    temperatureFloor: isTempered ? temperatureFloor : 0,
  };
}

function blockOf(shape: Shape, layer: Layer): BlockSpec {
  const attention = attentionOf(shape, layer);
  if (!layer.isMoe) return { attention, mlp: { $case: "dense", value: { ffn: shape.denseFfn } } };
  const { experts, topK, expertFfn, sharedFfn } = shape;
  const score = MoeSpec_Score.SIGMOID_INPUT;
  const plain = { normTopK: false, scale: 1, groups: 1, groupsUsed: 1, bias: false };
  return { attention, mlp: { $case: "moe", value: { experts, topK, expertFfn, sharedFfn, score, ...plain } } };
}

function expertPlanes(
  table: TensorTable,
  expert: ExpertShape,
  place: { block: number; origin: Origin; prefix: string },
): void {
  const { block, origin, prefix } = place;
  const path = `${prefix}model.layers.${block}.feed_forward.experts`;
  if (origin.kind === "gguf") stackedExpertPlanes(table, expert, block);
  else if (table.stored(`${path}.gate_up_proj`)) fusedExpertPlanes(table, expert, { block, path });
  else separateExpertPlanes(table, expert, block);
}

function describe(origin: Origin): Described {
  const shape = origin.kind === "hf" ? hfShape(origin.config) : ggufShape(origin.keys, origin.ropeFactors);
  if (shape.topK > shape.experts) {
    const [keys, key] =
      origin.kind === "hf" ? [origin.config, "num_experts_per_tok"] : [origin.keys, "expert_used_count"];
    keys.reject(key, `${shape.topK} experts per token, but there are ${shape.experts}`);
  }
  const isNested = origin.checkpoint?.tensors.has("language_model.model.embed_tokens.weight") ?? false;
  const prefix = isNested ? "language_model." : "";
  const hf = hfNaming({ prefix, mlp: "feed_forward", router: "router", shared: "shared_expert" });
  const synthetic = origin.kind === "hf" ? syntheticOf(origin.config) : plainSynthetic;
  const table = new TensorTable(origin.checkpoint, origin.kind === "hf" ? hf : ggufNaming, synthetic);
  const tiedHead = globalPlanes(table, shape, origin);
  const { hidden, experts } = shape;
  for (const [block, layer] of shape.layers.entries()) {
    gqaPlanes(table, shape, block);
    if (!layer.isMoe) {
      denseFfnPlanes(table, [hidden, shape.denseFfn], block);
      continue;
    }
    table.linear(TensorRole.ROUTER, [experts, hidden], block);
    sharedExpertPlanes(table, [hidden, shape.sharedFfn], block);
    expertPlanes(table, { hidden, ffn: shape.expertFfn, experts }, { block, origin, prefix });
  }
  table.others(VISION);
  table.others(SCALES);
  table.finish("llama4");
  const blocks = shape.layers.map((layer) => blockOf(shape, layer));
  return {
    vocabSize: shape.vocab,
    hiddenSize: hidden,
    contextTokens: shape.contextTokens,
    normEps: shape.eps,
    tiedHead,
    blocks,
    kvGroups: oneKvGroup(blocks, shape.kvHeads, shape.headDim),
    table,
    topK: shape.topK,
    planOnly: "",
  };
}

export const llama4: Family = {
  name: "llama4",
  modelTypes: ["llama4", "llama4_text"],
  architectures: ["Llama4ForConditionalGeneration", "Llama4ForCausalLM"],
  ggufArchitectures: ["llama4"],
  describe,
};

// Family deepseek_v3 (V3, R1, V3.1): plan-only. Latent attention (MLA), a few dense layers, then experts routed by sigmoid
// scores with a selection bias and groups, one shared expert. The multi-token-prediction layer is not counted.
import {
  type BlockSpec,
  MaskSpec_Kind,
  MoeSpec_Score,
  RopeSpec_Layout,
  ShardRule,
  TensorRole,
} from "../../../proto/gen/muster/v1/plan.ts";
import { BLOCKS_MAX, type Described, EXPERTS_MAX, type Family, type Origin, oneKvGroup } from "../family.ts";
import { denseFfnPlanes, separateExpertPlanes, sharedExpertPlanes } from "../ffn.ts";
import { rejectUnsupportedKeys } from "../gqa.ts";
import { DIMENSION, type Keys } from "../keys.ts";
import { hfNaming } from "../names.ts";
import { unsupported } from "../reject.ts";
import { syntheticOf } from "../synthetic.ts";
import { SCALES, TensorTable } from "../tensor-table.ts";

type Shape = {
  vocab: number;
  hidden: number;
  blocks: number;
  heads: number;
  denseFfn: number;
  expertFfn: number;
  sharedFfn: number;
  experts: number;
  topK: number;
  groups: number;
  groupsUsed: number;
  denseBlocks: number;
  routedScale: number;
  normTopK: boolean;
  qRank: number;
  kvRank: number;
  nope: number;
  rope: number;
  value: number;
  theta: number;
  scale: number;
};

const COUNT = { min: 1, max: EXPERTS_MAX };
const PLAN_ONLY = "family deepseek_v3 can be planned but is not served yet: latent attention (MLA) has no kernels here";
/** The next-token-prediction layers come after the last one and repeat the embedding and the head. */
const PREDICTION_LAYERS = (blocks: number) => new RegExp(`^model\\.layers\\.(${blocks})\\.`);

function shapeOf(config: Keys): Shape {
  rejectUnsupportedKeys(config, "deepseek_v3", ["attention_bias"]);
  const blocks = config.integer("num_hidden_layers", { min: 1, max: BLOCKS_MAX });
  const expertFfn = config.integer("moe_intermediate_size", DIMENSION);
  const ropeKeys = config.child("rope_parameters");
  const nope = config.integer("qk_nope_head_dim", DIMENSION);
  const rope = config.integer("qk_rope_head_dim", { min: 2, max: 4096 });
  return {
    vocab: config.integer("vocab_size", DIMENSION),
    hidden: config.integer("hidden_size", DIMENSION),
    blocks,
    heads: config.integer("num_attention_heads", { min: 1, max: 4096 }),
    denseFfn: config.integer("intermediate_size", DIMENSION),
    expertFfn,
    sharedFfn: expertFfn * config.integer("n_shared_experts", { min: 0, max: 64 }, 0),
    experts: config.integer("n_routed_experts", COUNT),
    topK: config.integer("num_experts_per_tok", COUNT),
    groups: config.integer("n_group", COUNT, 1),
    groupsUsed: config.integer("topk_group", COUNT, 1),
    denseBlocks: config.integer("first_k_dense_replace", { min: 0, max: blocks }, 0),
    routedScale: config.number("routed_scaling_factor", { min: 0, max: 1000 }, 1),
    normTopK: config.flag("norm_topk_prob", false),
    qRank: config.integer("q_lora_rank", DIMENSION),
    kvRank: config.integer("kv_lora_rank", DIMENSION),
    nope,
    rope,
    scale: (nope + rope) ** -0.5 * scaleStretch(config),
    value: config.integer("v_head_dim", DIMENSION),
    theta: (ropeKeys ?? config).number("rope_theta", { min: 1, max: 1e12 }, 10_000),
  };
}

/** YaRN stretches the scores as well as the frequencies. */
function scaleStretch(config: Keys): number {
  const scaling = config.child("rope_parameters") ?? config.child("rope_scaling");
  const all = scaling?.number("mscale_all_dim", { min: 0, max: 100 }, 0) ?? 0;
  const factor = scaling?.number("factor", { min: 1e-6, max: 1e6 }, 1) ?? 1;
  return factor <= 1 ? 1 : (0.1 * all * Math.log(factor) + 1) ** 2;
}

function blockOf(shape: Shape, index: number): BlockSpec {
  const { heads, nope, rope, experts, topK, expertFfn, sharedFfn, groups, groupsUsed } = shape;
  const attention = {
    ...{ heads, kvHeads: 1, headDim: nope + rope, scale: shape.scale, kvGroup: 0 },
    rope: { layout: RopeSpec_Layout.INTERLEAVED, dims: rope, theta: shape.theta, frequencies: [] },
    mask: { kind: MaskSpec_Kind.FULL, span: 0 },
    ...{ qkUnitNorm: false, temperatureScale: 0, temperatureFloor: 0 },
  };
  if (index < shape.denseBlocks) return { attention, mlp: { $case: "dense", value: { ffn: shape.denseFfn } } };
  const score = MoeSpec_Score.SIGMOID;
  const choice = { normTopK: shape.normTopK, scale: shape.routedScale, groups, groupsUsed, bias: true };
  return { attention, mlp: { $case: "moe", value: { experts, topK, expertFfn, sharedFfn, score, ...choice } } };
}

/** Low-rank projections down are replicated, those up are cut by heads. */
function latentPlanes(table: TensorTable, shape: Shape, block: number): void {
  const { hidden, heads, qRank, kvRank, nope, rope, value } = shape;
  const path = `model.layers.${block}.self_attn`;
  const other = (name: string, size: readonly [rows: number, cols: number], rule: ShardRule) =>
    table.plane({ role: TensorRole.OTHER, rows: size[0], cols: size[1], block, name: `${path}.${name}.weight`, rule });
  table.vector(TensorRole.ATTENTION_NORM, hidden, block);
  other("q_a_proj", [qRank, hidden], ShardRule.LATENT);
  other("q_a_layernorm", [1, qRank], ShardRule.LATENT);
  other("q_b_proj", [heads * (nope + rope), qRank], ShardRule.HEADS);
  other("kv_a_proj_with_mqa", [kvRank + rope, hidden], ShardRule.LATENT);
  other("kv_a_layernorm", [1, kvRank], ShardRule.LATENT);
  other("kv_b_proj", [heads * (nope + value), kvRank], ShardRule.HEADS);
  table.linear(TensorRole.OUTPUT, [hidden, heads * value], block);
  table.vector(TensorRole.MLP_NORM, hidden, block);
}

function moePlanes(table: TensorTable, shape: Shape, block: number): void {
  const { hidden, experts } = shape;
  const name = `model.layers.${block}.mlp.gate.e_score_correction_bias`;
  table.linear(TensorRole.ROUTER, [experts, hidden], block);
  table.plane({ role: TensorRole.OTHER, rows: 1, cols: experts, block, name, rule: ShardRule.REPLICATE });
  separateExpertPlanes(table, { hidden, ffn: shape.expertFfn, experts }, block);
  if (shape.sharedFfn) sharedExpertPlanes(table, [hidden, shape.sharedFfn], block);
}

function describe(origin: Origin): Described {
  if (origin.kind === "gguf") unsupported(origin.keys.file, "GGUF files of family deepseek_v3 are not supported");
  const { config, checkpoint } = origin;
  const shape = shapeOf(config);
  const { vocab, hidden, kvRank, rope } = shape;
  const naming = hfNaming({ prefix: "", mlp: "mlp", router: "gate", shared: "shared_experts" });
  const table = new TensorTable(checkpoint, naming, syntheticOf(config));
  const tiedHead = config.flag("tie_word_embeddings", false);
  table.linear(TensorRole.EMBEDDING, [vocab, hidden]);
  table.vector(TensorRole.FINAL_NORM, hidden);
  if (!tiedHead) table.linear(TensorRole.HEAD, [vocab, hidden]);
  for (let block = 0; block < shape.blocks; block++) {
    latentPlanes(table, shape, block);
    if (block < shape.denseBlocks) denseFfnPlanes(table, [hidden, shape.denseFfn], block);
    else moePlanes(table, shape, block);
  }
  table.others(PREDICTION_LAYERS(shape.blocks));
  table.others(SCALES);
  table.finish("deepseek_v3");
  const blocks = Array.from({ length: shape.blocks }, (_, i) => blockOf(shape, i));
  return {
    vocabSize: vocab,
    hiddenSize: hidden,
    contextTokens: config.integer("max_position_embeddings", { min: 1, max: 1e9 }, 4096),
    normEps: config.number("rms_norm_eps", { min: 0, max: 0.1 }, 1e-6),
    tiedHead,
    blocks,
    // A token's latent and its rotated key, kvRank + rope values, stand for key and value together: half of them each.
    kvGroups: oneKvGroup(blocks, 1, (kvRank + rope) / 2),
    table,
    topK: shape.topK,
    planOnly: PLAN_ONLY,
  };
}

export const deepseekV3: Family = {
  name: "deepseek_v3",
  modelTypes: ["deepseek_v3"],
  architectures: ["DeepseekV3ForCausalLM"],
  ggufArchitectures: [],
  describe,
};

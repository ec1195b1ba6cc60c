// Family qwen3_moe: plan-only. Grouped-query attention with a weighted norm on each head's query and key, softmax routing
// without a shared expert.
import {
  type BlockSpec,
  MaskSpec_Kind,
  MoeSpec_Score,
  RopeSpec_Layout,
  ShardRule,
  TensorRole,
} from "../../../proto/gen/muster/v1/plan.ts";
import { type Described, EXPERTS_MAX, type Family, type Origin, oneKvGroup } from "../family.ts";
import { denseFfnPlanes, separateExpertPlanes } from "../ffn.ts";
import { type GqaShape, globalPlanes, gqaPlanes, hfGqaShape, rejectUnsupportedKeys } from "../gqa.ts";
import { DIMENSION, type Keys } from "../keys.ts";
import { hfNaming } from "../names.ts";
import { unsupported } from "../reject.ts";
import { syntheticOf } from "../synthetic.ts";
import { TensorTable } from "../tensor-table.ts";

type Shape = GqaShape & {
  denseFfn: number;
  expertFfn: number;
  experts: number;
  topK: number;
  normTopK: boolean;
  isMoe: boolean[];
  theta: number;
};

const COUNT = { min: 1, max: EXPERTS_MAX };
const PLAN_ONLY =
  "family qwen3_moe can be planned but is not served yet: its per-head query and key norms have no kernels here";

function shapeOf(config: Keys): Shape {
  rejectUnsupportedKeys(config, "qwen3_moe", ["attention_bias", "use_sliding_window"]);
  const shape = hfGqaShape(config, { eps: 1e-6, contextTokens: 32_768 });
  const step = config.integer("decoder_sparse_step", { min: 1, max: 1024 }, 1);
  const dense = config.integers("mlp_only_layers", shape.blocks, { min: 0, max: shape.blocks - 1 }) ?? [];
  return {
    ...shape,
    denseFfn: config.integer("intermediate_size", DIMENSION),
    expertFfn: config.integer("moe_intermediate_size", DIMENSION),
    // Newer writers use the second name.
    experts: config.integer(config.has("num_experts") ? "num_experts" : "num_local_experts", COUNT),
    topK: config.integer("num_experts_per_tok", COUNT),
    normTopK: config.flag("norm_topk_prob", false),
    isMoe: Array.from({ length: shape.blocks }, (_, i) => !dense.includes(i) && (i + 1) % step === 0),
    theta: (config.child("rope_parameters") ?? config).number("rope_theta", { min: 1, max: 1e12 }, 10_000),
  };
}

function blockOf(shape: Shape, isMoe: boolean): BlockSpec {
  const { heads, kvHeads, headDim, experts, topK, expertFfn, normTopK } = shape;
  const attention = {
    ...{ heads, kvHeads, headDim, scale: headDim ** -0.5, kvGroup: 0 },
    rope: { layout: RopeSpec_Layout.HALF, dims: headDim, theta: shape.theta, frequencies: [] },
    mask: { kind: MaskSpec_Kind.FULL, span: 0 },
    ...{ qkUnitNorm: false, temperatureScale: 0, temperatureFloor: 0 },
  };
  if (!isMoe) return { attention, mlp: { $case: "dense", value: { ffn: shape.denseFfn } } };
  const score = MoeSpec_Score.SOFTMAX;
  const plain = { sharedFfn: 0, scale: 1, groups: 1, groupsUsed: 1, bias: false };
  return { attention, mlp: { $case: "moe", value: { experts, topK, expertFfn, score, normTopK, ...plain } } };
}

function headNormPlanes(table: TensorTable, headDim: number, block: number): void {
  for (const norm of ["q_norm", "k_norm"]) {
    const name = `model.layers.${block}.self_attn.${norm}.weight`;
    table.plane({ role: TensorRole.OTHER, rows: 1, cols: headDim, block, name, rule: ShardRule.REPLICATE });
  }
}

function describe(origin: Origin): Described {
  if (origin.kind === "gguf") unsupported(origin.keys.file, "GGUF files of family qwen3_moe are not supported");
  const { config, checkpoint } = origin;
  const shape = shapeOf(config);
  const { hidden, experts } = shape;
  const naming = hfNaming({ prefix: "", mlp: "mlp", router: "gate", shared: "shared_expert" });
  const table = new TensorTable(checkpoint, naming, syntheticOf(config));
  const tiedHead = globalPlanes(table, shape, origin);
  for (const [block, isMoe] of shape.isMoe.entries()) {
    gqaPlanes(table, shape, block);
    headNormPlanes(table, shape.headDim, block);
    if (!isMoe) {
      denseFfnPlanes(table, [hidden, shape.denseFfn], block);
      continue;
    }
    table.linear(TensorRole.ROUTER, [experts, hidden], block);
    separateExpertPlanes(table, { hidden, ffn: shape.expertFfn, experts }, block);
  }
  table.finish("qwen3_moe");
  const blocks = shape.isMoe.map((isMoe) => blockOf(shape, isMoe));
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
    planOnly: PLAN_ONLY,
  };
}

export const qwen3Moe: Family = {
  name: "qwen3_moe",
  modelTypes: ["qwen3_moe"],
  architectures: ["Qwen3MoeForCausalLM"],
  ggufArchitectures: [],
  describe,
};

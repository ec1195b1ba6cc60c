// Stored types of a model of which only config.json is there: what the released checkpoint stores, as `torch_dtype` and
// `quantization_config` say it.
import { StoredType, TensorRole } from "../../proto/gen/muster/v1/plan.ts";
import type { Keys } from "./keys.ts";
import type { Synthetic } from "./tensor-table.ts";

/** Everything in BF16. */
export const plainSynthetic: Synthetic = {
  typeOf: () => StoredType.BF16,
  scaleShape: () => undefined,
};

const EXPERTS: ReadonlySet<TensorRole> = new Set([
  TensorRole.EXPERT_GATE,
  TensorRole.EXPERT_UP,
  TensorRole.EXPERT_DOWN,
]);
/** Roles that block-quantised releases keep in BF16 (DeepSeek's README_WEIGHTS; Qwen follows it). */
const KEPT_PLAIN: ReadonlySet<TensorRole> = new Set([
  TensorRole.EMBEDDING,
  TensorRole.HEAD,
  TensorRole.FINAL_NORM,
  TensorRole.ATTENTION_NORM,
  TensorRole.MLP_NORM,
  TensorRole.ROUTER,
]);
const FACTORS = TensorRole.ROPE_FACTORS;

/** FP8 of routed experts only, one f32 scale for each output channel (compressed-tensors "float-quantized"). */
export const expertsFp8: Synthetic = {
  typeOf: (role) => (EXPERTS.has(role) ? StoredType.F8_E4M3 : role === FACTORS ? StoredType.F32 : StoredType.BF16),
  scaleShape: (role, rows) => (EXPERTS.has(role) ? [rows, 1] : undefined),
};

/** FP8 of every projection in blocks, one f32 scale for each block; vectors stay plain. */
export function blockFp8([blockRows, blockCols]: readonly [number, number]): Synthetic {
  return {
    typeOf: (role, rows) => {
      if (role === FACTORS) return StoredType.F32;
      return KEPT_PLAIN.has(role) || rows === 1 ? StoredType.BF16 : StoredType.F8_E4M3;
    },
    scaleShape: (role, rows, cols) =>
      KEPT_PLAIN.has(role) || rows === 1 ? undefined : [Math.ceil(rows / blockRows), Math.ceil(cols / blockCols)],
  };
}

/** What `quantization_config` says; plain where there is none. */
export function syntheticOf(config: Keys): Synthetic {
  const quantization = config.child("quantization_config");
  if (!quantization) return plainSynthetic;
  const method = quantization.text("quant_method");
  const blocks = quantization.integers("weight_block_size", 2, { min: 1, max: 65_536 });
  if (method === "fp8" && blocks) {
    const [rows, cols] = blocks;
    if (rows !== undefined && cols !== undefined) return blockFp8([rows, cols]);
    quantization.reject("weight_block_size", "must be two integers");
  }
  if (method === "compressed-tensors" || method === "fbgemm_fp8" || method === "fp8") return expertsFp8;
  return quantization.unsupported("quant_method", `quantisation "${method}" cannot be planned; fp8 can`);
}

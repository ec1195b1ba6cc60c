// What tensors are called: one naming for Hugging Face checkpoints of decoders, one for GGUF.
import { TensorRole } from "../../proto/gen/muster/v1/plan.ts";

export type Place = { block: number; expert: number };
/** The checkpoint's name of a plane; undefined where the naming has none for that role. */
export type Naming = (role: TensorRole, place: Place) => string | undefined;

const HF_BLOCK: ReadonlyMap<TensorRole, string> = new Map([
  [TensorRole.ATTENTION_NORM, "input_layernorm.weight"],
  [TensorRole.QUERY, "self_attn.q_proj.weight"],
  [TensorRole.KEY, "self_attn.k_proj.weight"],
  [TensorRole.VALUE, "self_attn.v_proj.weight"],
  [TensorRole.OUTPUT, "self_attn.o_proj.weight"],
  [TensorRole.MLP_NORM, "post_attention_layernorm.weight"],
]);
const HF_MLP: ReadonlyMap<TensorRole, string> = new Map([
  [TensorRole.GATE, "gate_proj.weight"],
  [TensorRole.UP, "up_proj.weight"],
  [TensorRole.DOWN, "down_proj.weight"],
]);
const HF_EXPERT: ReadonlyMap<TensorRole, string> = new Map([
  [TensorRole.EXPERT_GATE, "gate_proj.weight"],
  [TensorRole.EXPERT_UP, "up_proj.weight"],
  [TensorRole.EXPERT_DOWN, "down_proj.weight"],
]);
const HF_SHARED: ReadonlyMap<TensorRole, string> = new Map([
  [TensorRole.SHARED_GATE, "gate_proj.weight"],
  [TensorRole.SHARED_UP, "up_proj.weight"],
  [TensorRole.SHARED_DOWN, "down_proj.weight"],
]);

/** `prefix` is "" or "language_model."; the other names are those that families choose for themselves. */
export function hfNaming(family: { prefix: string; mlp: string; router: string; shared: string }): Naming {
  const { prefix, mlp, router, shared } = family;
  return (role, { block, expert }) => {
    const layer = `${prefix}model.layers.${block}`;
    if (role === TensorRole.EMBEDDING) return `${prefix}model.embed_tokens.weight`;
    if (role === TensorRole.FINAL_NORM) return `${prefix}model.norm.weight`;
    if (role === TensorRole.HEAD) return `${prefix}lm_head.weight`;
    if (role === TensorRole.ROUTER) return `${layer}.${mlp}.${router}.weight`;
    const own = HF_BLOCK.get(role);
    if (own) return `${layer}.${own}`;
    const dense = HF_MLP.get(role);
    if (dense) return `${layer}.${mlp}.${dense}`;
    const experts = HF_EXPERT.get(role);
    if (experts) return `${layer}.${mlp}.experts.${expert}.${experts}`;
    const together = HF_SHARED.get(role);
    return together && `${layer}.${mlp}.${shared}.${together}`;
  };
}

const GGUF_GLOBAL: ReadonlyMap<TensorRole, string> = new Map([
  [TensorRole.EMBEDDING, "token_embd.weight"],
  [TensorRole.FINAL_NORM, "output_norm.weight"],
  [TensorRole.HEAD, "output.weight"],
  [TensorRole.ROPE_FACTORS, "rope_freqs.weight"],
]);
const GGUF_BLOCK: ReadonlyMap<TensorRole, string> = new Map([
  [TensorRole.ATTENTION_NORM, "attn_norm.weight"],
  [TensorRole.QUERY, "attn_q.weight"],
  [TensorRole.KEY, "attn_k.weight"],
  [TensorRole.VALUE, "attn_v.weight"],
  [TensorRole.OUTPUT, "attn_output.weight"],
  [TensorRole.MLP_NORM, "ffn_norm.weight"],
  [TensorRole.GATE, "ffn_gate.weight"],
  [TensorRole.UP, "ffn_up.weight"],
  [TensorRole.DOWN, "ffn_down.weight"],
  [TensorRole.ROUTER, "ffn_gate_inp.weight"],
  [TensorRole.EXPERT_GATE, "ffn_gate_exps.weight"],
  [TensorRole.EXPERT_UP, "ffn_up_exps.weight"],
  [TensorRole.EXPERT_DOWN, "ffn_down_exps.weight"],
  [TensorRole.SHARED_GATE, "ffn_gate_shexp.weight"],
  [TensorRole.SHARED_UP, "ffn_up_shexp.weight"],
  [TensorRole.SHARED_DOWN, "ffn_down_shexp.weight"],
]);

export const ggufNaming: Naming = (role, { block }) => {
  const global = GGUF_GLOBAL.get(role);
  if (global) return global;
  const own = GGUF_BLOCK.get(role);
  return own && `blk.${block}.${own}`;
};

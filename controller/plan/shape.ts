// The few sizes of a model that the planner asks for by name. All blocks of a served family agree on them.
import type { ModelSpec, MoeSpec } from "../../proto/gen/muster/v1/plan.ts";

/** Of the first block with experts; undefined for a dense model. */
export function moeOf(spec: ModelSpec): MoeSpec | undefined {
  for (const { mlp } of spec.blocks) if (mlp?.$case === "moe") return mlp.value;
  return undefined;
}

export function kvHeadsOf(spec: ModelSpec): number {
  return Math.max(0, ...spec.blocks.map((block) => block.attention?.kvHeads ?? 0));
}

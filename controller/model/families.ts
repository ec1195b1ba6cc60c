// The list of families and which one a header names.

import { deepseekV3 } from "./families/deepseek-v3.ts";
import { llama } from "./families/llama.ts";
import { llama4 } from "./families/llama4.ts";
import { qwen3Moe } from "./families/qwen3-moe.ts";
import type { Family } from "./family.ts";
import type { Keys } from "./keys.ts";
import { shown } from "./reject.ts";

const FAMILIES: readonly Family[] = [llama, llama4, deepseekV3, qwen3Moe];

/** By `architectures[0]`, then by `model_type`. */
export function familyOfConfig(config: Keys): Family {
  const [architecture] = config.texts("architectures", 16) ?? [];
  const named = FAMILIES.find((family) => architecture !== undefined && family.architectures.includes(architecture));
  if (named) return named;
  const type = config.text("model_type");
  const found = FAMILIES.find((family) => family.modelTypes.includes(type));
  if (found && architecture === undefined) return found;
  const what = architecture === undefined ? `model_type ${shown(type)}` : `architecture ${shown(architecture)}`;
  const key = architecture === undefined ? "model_type" : "architectures";
  const known = FAMILIES.map((family) => family.name).join(", ");
  return config.unsupported(key, `${what} is not supported; families are ${known}`);
}

export function familyOfGguf(keys: Keys): Family {
  const key = "general.architecture";
  const architecture = keys.text(key);
  const found = FAMILIES.find((family) => family.ggufArchitectures.includes(architecture));
  const known = FAMILIES.flatMap((family) => family.ggufArchitectures).join(", ");
  return found ?? keys.unsupported(key, `architecture ${shown(architecture)} is not supported; ${known} are`);
}

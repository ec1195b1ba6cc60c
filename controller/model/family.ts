// What a family file is handed and what it answers. A new family is one file in families/ and one line in the list below.
import type { BlockSpec, KvGroupSpec } from "../../proto/gen/muster/v1/plan.ts";
import { MaskSpec_Kind } from "../../proto/gen/muster/v1/plan.ts";
import type { Keys } from "./keys.ts";
import type { Checkpoint } from "./stored.ts";
import type { TensorTable } from "./tensor-table.ts";

/** Layers a model may have; the largest planned here has 126. */
export const BLOCKS_MAX = 1024;
export const EXPERTS_MAX = 4096;

export type Origin =
  | {
      kind: "hf";
      config: Keys;
      /** Absent where there is only a config.json: the table is synthesised. */
      checkpoint: Checkpoint | undefined;
    }
  | {
      kind: "gguf";
      keys: Keys;
      checkpoint: Checkpoint;
      /** The values of rope_freqs.weight, where the file has it. */
      ropeFactors: number[] | undefined;
    };

/** What a family finds out; model.ts adds source, files, tokenizer and digest. */
export type Described = {
  vocabSize: number;
  hiddenSize: number;
  contextTokens: number;
  normEps: number;
  tiedHead: boolean;
  blocks: BlockSpec[];
  kvGroups: KvGroupSpec[];
  table: TensorTable;
  /** Experts that a token uses. */
  topK: number;
  /** Why the family can be planned but not served; empty where it can be served. */
  planOnly: string;
};

export type Family = {
  name: string;
  /** `model_type` values of config.json. */
  modelTypes: readonly string[];
  /** `architectures[0]` values, looked at first. */
  architectures: readonly string[];
  /** `general.architecture` values of GGUF. */
  ggufArchitectures: readonly string[];
  describe(origin: Origin): Described;
};

/** One KV group over all layers: every layer's block has the same shape, and a token stays while any layer may read it. */
export function oneKvGroup(blocks: readonly BlockSpec[], kvHeads: number, headDim: number): KvGroupSpec[] {
  return [{ blocks: blocks.map((_, i) => i), live: { kind: MaskSpec_Kind.FULL, span: 0 }, kvHeads, headDim }];
}

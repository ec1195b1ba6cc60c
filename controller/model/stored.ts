// Stored tensors as containers describe them, before anybody asks what they mean; and the table of stored types.
import { StoredType } from "../../proto/gen/muster/v1/plan.ts";
import type { ByteSource } from "./byte-source.ts";

export type StoredTensor = {
  name: string;
  /** As the container calls it: "BF16", "Q4_K", "IQ4_XS". */
  typeName: string;
  /** UNSPECIFIED where the type is well-formed but nothing here computes with it. */
  type: StoredType;
  /** Outermost first, as PyTorch writes it; GGUF's order is turned round. */
  shape: number[];
  file: number;
  /** Absolute, in the file. */
  offset: number;
  bytes: number;
  /** Where the header tells of it. */
  headerOffset: number;
};

export type Checkpoint = {
  container: "safetensors" | "gguf";
  files: ByteSource[];
  tensors: Map<string, StoredTensor>;
};

/** Elements and bytes of one stored block. */
export type Block = { elements: number; bytes: number };

const FLOAT_BYTES: ReadonlyMap<StoredType, number> = new Map([
  [StoredType.F32, 4],
  [StoredType.F16, 2],
  [StoredType.BF16, 2],
  [StoredType.F8_E4M3, 1],
]);

const BLOCKS: ReadonlyMap<StoredType, Block> = new Map([
  [StoredType.Q8_0, { elements: 32, bytes: 34 }],
  [StoredType.Q4_0, { elements: 32, bytes: 18 }],
  [StoredType.Q4_1, { elements: 32, bytes: 20 }],
  [StoredType.Q4_K, { elements: 256, bytes: 144 }],
  [StoredType.Q5_K, { elements: 256, bytes: 176 }],
  [StoredType.Q6_K, { elements: 256, bytes: 210 }],
]);

/** The block of a stored type; a float is a block of one. */
export function blockOf(type: StoredType): Block {
  return BLOCKS.get(type) ?? { elements: 1, bytes: FLOAT_BYTES.get(type) ?? 0 };
}

export const isFloat = (type: StoredType): boolean => FLOAT_BYTES.has(type);

export const shapeText = (shape: readonly number[]): string => `[${shape.join(", ")}]`;

/** Product of a shape; undefined where it is no exact integer. */
export function elementsOf(shape: readonly number[]): number | undefined {
  let product = 1;
  for (const size of shape) product *= size;
  return Number.isSafeInteger(product) ? product : undefined;
}

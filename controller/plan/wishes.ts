// What is asked of a plan. Owns defaults and their reasons.
import type { Inventory, InventoryNode } from "./hardware.ts";
import { CALIBRATION_START } from "./roofline.ts";

/** What the asker has fixed; undefined leaves it to the planner. */
export type Pins = {
  tp?: number | undefined;
  dp?: number | undefined;
  ep?: number | undefined;
  etp?: number | undefined;
  pp?: number | undefined;
  /** World: ranks of the group. */
  ranks?: number | undefined;
  /** Nodes the group is spread over; a worker has one node's ranks. */
  workers?: number | undefined;
};

export type Wishes = {
  /** Tokens one sequence may have; undefined: what the model allows, lowered to what fits. */
  contextTokens: number | undefined;
  /** Sequences that run at once. */
  concurrency: number;
  pins: Pins;
  /** KV bytes of each rank, exactly; undefined: what context and concurrency need, as far as it fits. */
  kvBytes: number | undefined;
  kvBlockTokens: number;
  /** Copies of busy experts in each layer, besides the first of each; over all ep slots. */
  expertCopies: number;
  /** What the deployment has measured of itself; 0.8 before it has. */
  calibration: number;
};

const KV_BLOCK_TOKENS = 16;
export const CONCURRENCY_DEFAULT = 16;
export const CONCURRENCY_MAX = 65_536;
/** Asked for where nobody says: long enough for a chat, short enough that every model fits somewhere. */
export const CONTEXT_DEFAULT = { gpu: 32_768, cpu: 8_192 };
/** A CPU shares its memory with everything else: without a pin KV takes no more than this, or one full context. */
export const CPU_KV_BYTES_MAX = 256 * 1024 * 1024;

export function wishesOf(changes: Partial<Wishes> = {}): Wishes {
  return {
    contextTokens: undefined,
    concurrency: CONCURRENCY_DEFAULT,
    pins: {},
    kvBytes: undefined,
    kvBlockTokens: KV_BLOCK_TOKENS,
    expertCopies: 0,
    calibration: CALIBRATION_START,
    ...changes,
  };
}

/** Bounds of one step, from which every buffer is sized. */
export type StepBounds = { tokensMax: number; rowsMax: number };

export function stepBounds(kind: InventoryNode["kind"], concurrency: number): StepBounds {
  const base = kind === "gpu" ? { tokensMax: 8192, rowsMax: 256 } : { tokensMax: 512, rowsMax: 64 };
  return { ...base, rowsMax: Math.max(base.rowsMax, Math.min(concurrency, base.tokensMax)) };
}

export function inventoryKind(inventory: Inventory): InventoryNode["kind"] {
  return inventory.nodes[0]?.kind ?? "cpu";
}

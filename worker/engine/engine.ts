// The TypeScript face of the native engine (native/include/muster/engine.h). One object for all ranks of a worker.
// Owns nothing of requests: it computes the StepPlans it is handed, in order.
//
//   E1  launch checks the whole plan before anything is computed; results come in launch order.
//   E3  after a lost or internal fault the engine only answers close().
import type { ExpertMap, ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import type { EngineOptions, StepPlan, TensorSlice } from "../../proto/gen/muster/v1/worker.ts";

/** One choice of a sampled row, where log-probabilities or margins were asked. Natural logarithms of the raw logits' softmax. */
export type TokenDetail = {
  logprob: number;
  top: { id: number; logprob: number }[];
  scoreGap: number;
  routerGap: number;
};

export type RowResult = {
  slot: number;
  /** Accepted drafts, then one own token; empty for rows that did not sample. */
  tokens: number[];
  accepted: number;
  /** The slot's computed length after the step, in tokens. */
  computed: number;
  /** One for each token, where asked. */
  details: TokenDetail[];
  /** [positions computed, vocab], where asked; else empty. */
  logits: Float32Array;
};

export type StepResult = {
  step: bigint;
  rows: RowResult[];
  /** Over (slot, accepted, tokens) of every sampled row; equal on all workers of a group. */
  digest: bigint;
  stepMs: number;
  waitMs: number;
};

/** Bytes of one rank by ledger class. */
export type RankMemory = { weights: number; kv: number; activations: number; communication: number };

/** What native code answers instead of a result. */
export type EngineFault = {
  code: "invalid" | "unsupported" | "out_of_memory" | "lost" | "internal";
  field: string;
  detail: string;
  /** lost: the rank that did not arrive, or -1. */
  rank: number;
};

export class EngineError extends Error {
  readonly fault: EngineFault;
  constructor(fault: EngineFault) {
    super(`${fault.code}: ${fault.field}: ${fault.detail}`);
    this.name = "EngineError";
    this.fault = fault;
  }
}

export interface Engine {
  /** Backend, build, instruction set, mode, cut, map of experts: equal ids give equal bits. Changes with a step that switches. */
  readonly numericsId: string;
  /** The map of experts in use; undefined: the plan's own. */
  readonly experts: ExpertMap | undefined;
  /** Resolves when the step is computed; rejects with EngineError. At most `inFlightMax` (2) at once. */
  launch(plan: StepPlan): Promise<StepResult>;
  memory(): RankMemory[];
  /**
   * Brings, beside the steps, what the map adds to this worker's ranks; then one step may switch to it. `slices` are of that and
   * nothing else. Rejects with EngineError and nothing is staged then.
   */
  stage(map: ExpertMap, slices: readonly TensorSlice[]): Promise<void>;
  /** Tokens by block and expert, of this worker's first rank; empty lists for dense blocks. */
  expertTokens(): number[][];
  /** Bounded and idempotent. */
  close(): Promise<void>;
}

/** A listening socket for collectives, opened before the group is known. */
export interface CommListener {
  readonly address: string;
}

export type EngineRequest = {
  plan: ShardPlan;
  worker: number;
  slices: TensorSlice[];
  options: EngineOptions;
  /** Needed where the plan has several workers. */
  comm?: { listener: CommListener; addresses: string[]; incarnation: bigint };
  onProgress?: (phase: "loading" | "connecting" | "warming", bytesDone: number, bytesTotal: number) => void;
  signal?: AbortSignal;
};

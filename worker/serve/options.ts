// What a Load leaves open, filled in. The engine's own defaults stand in native/include/muster/engine.h; the leader must plan
// with the same numbers, so they are decided here and handed down.

import { FaultError, invalid } from "../../proto/fault.ts";
import type { ModelSpec, ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { EngineOptions, type ServeLimits } from "../../proto/gen/muster/v1/worker.ts";
import type { Budget } from "../schedule/schedule.ts";
import type { RequestLimits } from "./request.ts";

export type ResolvedEngineOptions = EngineOptions;

/** Requests waiting for a place: at a few seconds each a longer queue is a time-out, not a service. */
const QUEUE_MAX = 256;
const RUNNING_MAX = 64;

export function engineOptionsOf(given: EngineOptions | undefined): ResolvedEngineOptions {
  const wish = given ?? EngineOptions.create();
  return {
    ...wish,
    rowsMax: wish.rowsMax || 64,
    tokensMax: wish.tokensMax || 512,
    verifyMax: wish.verifyMax || 8,
    slotsMax: Math.max(3, wish.slotsMax || 128), // padding, one sequence, one for scoring
    logprobsMax: wish.logprobsMax || 21,
    stallReportMs: wish.stallReportMs || 5_000,
    stallGiveUpMs: wish.stallGiveUpMs || 10_000,
  };
}

export function serveLimitsOf(given: ServeLimits | undefined): ServeLimits {
  return { queueMax: given?.queueMax || QUEUE_MAX, runningMax: given?.runningMax || RUNNING_MAX };
}

export function budgetOf(options: ResolvedEngineOptions, more: { blockTokens: number; runningMax: number }): Budget {
  const { rowsMax, tokensMax, verifyMax } = options;
  return { rowsMax, tokensMax, verifyMax, ...more };
}

/** Throws FaultError where the plan has no room for a sequence. */
export function limitsOf(plan: ShardPlan, model: ModelSpec, options: ResolvedEngineOptions): RequestLimits {
  if (plan.kvBlocks < 2 || plan.kvBlockTokens < 1)
    throw new FaultError(
      invalid("plan.kv_blocks", `${plan.kvBlocks} blocks of ${plan.kvBlockTokens} tokens hold no sequence`),
    );
  const context = plan.contextTokens || model.contextTokens;
  const held = (plan.kvBlocks - 1) * plan.kvBlockTokens;
  return {
    vocabSize: model.vocabSize,
    lengthMax: Math.min(context, held),
    lengthLimit: context <= held ? "context" : "kv_cache",
    logprobsMax: options.logprobsMax,
    stopIds: model.stopIds,
  };
}

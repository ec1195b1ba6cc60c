// What a draft takes from the bus. Frames come from strangers and may be garbled on their way: an OPEN that the engine would
// refuse must not reach it, because a refused step ends the draft. Pure.
import { type DraftOpen, Nack_Reason } from "../../proto/gen/muster/v1/speculation.ts";
import type { Sampling } from "../../proto/gen/muster/v1/worker.ts";
import { equal, extendAll, type PrefixHash, rootHash } from "./prefix-hash.ts";

/** The engine's own bounds (native/exec/step_check.cpp), rounded inwards. */
const MAGNITUDE_MAX = 1e30;
const TEMPERATURE_MIN = 1e-5;
const REPETITION_MIN = 1e-6;
const LOGIT_BIAS_MAX = 1024;

export type DraftLimits = { vocabHash: bigint; vocabSize: number; contextTokens: number };

export type OpenVerdict =
  | { kind: "taken"; root: PrefixHash; hash: PrefixHash; sampling: Sampling }
  | { kind: "refused"; reason: Nack_Reason };

const refused = (reason: Nack_Reason): OpenVerdict => ({ kind: "refused", reason });

/** HASH asks the target to say it again, FULL tells it to ask no more. `draftTokens` are those of each round. */
export function judgeOpen(open: DraftOpen, draftTokens: number, limits: DraftLimits): OpenVerdict {
  const { sampling, tokens, generatedFrom, vocabHash, seedLow, seedHigh } = open;
  if (vocabHash !== limits.vocabHash) return refused(Nack_Reason.FULL);
  if (sampling === undefined || !isSane(sampling, limits.vocabSize)) return refused(Nack_Reason.HASH);
  const areIds = tokens.length > 0 && tokens.every((id) => id < limits.vocabSize);
  if (!areIds || generatedFrom > tokens.length) return refused(Nack_Reason.HASH);
  const root = rootHash(vocabHash, { sampling, seedLow, seedHigh });
  const hash = extendAll(root, tokens);
  if (!equal(hash, { low: open.hashLow, high: open.hashHigh })) return refused(Nack_Reason.HASH);
  if (tokens.length + draftTokens > limits.contextTokens) return refused(Nack_Reason.FULL);
  return { kind: "taken", root, hash, sampling };
}

// A NaN is within no bounds.
const isWithin = (value: number, low: number, high: number): boolean => value >= low && value <= high;

function isSane(sampling: Sampling, vocabSize: number): boolean {
  const { temperature, repetitionPenalty, presencePenalty, frequencyPenalty, logitBias } = sampling;
  return (
    (temperature === 0 || isWithin(temperature, TEMPERATURE_MIN, MAGNITUDE_MAX)) &&
    isWithin(repetitionPenalty, REPETITION_MIN, MAGNITUDE_MAX) &&
    isWithin(presencePenalty, -MAGNITUDE_MAX, MAGNITUDE_MAX) &&
    isWithin(frequencyPenalty, -MAGNITUDE_MAX, MAGNITUDE_MAX) &&
    logitBias.length <= LOGIT_BIAS_MAX &&
    logitBias.every(({ id, bias }) => id < vocabSize && isWithin(bias, -MAGNITUDE_MAX, MAGNITUDE_MAX))
  );
}

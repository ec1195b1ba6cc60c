// What an absent Sampling means, for everybody who reads or writes one.
import type { Sampling } from "./gen/muster/v1/worker.ts";

/** The best token at every position, nothing else. */
export const greedy: Sampling = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
};

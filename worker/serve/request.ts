// From an Open as a gateway sent it to a request that can be scheduled. Owns every check of a request's fields and the
// meaning of their defaults; after it nothing about a request can be wrong, and no engine step is spent on one that is.
import { FaultError, invalid } from "../../proto/fault.ts";
import type { Open, Sampling } from "../../proto/gen/muster/v1/worker.ts";
import { greedy } from "../../proto/sampling.ts";
import type { Tokenizer } from "../token/tokenizer.ts";

/** Stop strings of a request: every one is looked for in every piece of text. */
const STOPS_MAX = 16;
const STOP_CHARS_MAX = 256;
const STOP_IDS_MAX = 128;
/** The engine sizes a buffer for it (logit_bias_max in native/include/muster/engine.h). */
const LOGIT_BIAS_MAX = 1024;
const BIAS_LIMIT = 100;
const TEMPERATURE_MAX = 100;
/** Below these the engine refuses: scores divided by less lose their digits. */
const TEMPERATURE_MIN = 1e-5;
const TOP_P_MIN = 1e-9;

export type RequestLimits = {
  readonly vocabSize: number;
  /** Ids of one sequence: the model's context or what the whole KV cache holds, whichever is smaller. */
  readonly lengthMax: number;
  /** Which of the two it is, for the message. */
  readonly lengthLimit: "context" | "kv_cache";
  readonly logprobsMax: number;
  /** The model's own stop ids. */
  readonly stopIds: readonly number[];
};

export type Request = {
  readonly prompt: readonly number[];
  readonly generated: readonly number[];
  readonly textSent: number;
  readonly seedLow: bigint;
  readonly seedHigh: bigint;
  readonly sampling: Sampling;
  /** Ids in all, prompt included, at which the sequence ends. */
  readonly lengthMax: number;
  readonly stops: readonly string[];
  readonly stopIds: ReadonlySet<number>;
  readonly minTokens: number;
  readonly logprobs: number;
  readonly margins: boolean;
  readonly speculation: boolean;
};

const refuse = (field: string, detail: string, code?: string): never => {
  throw new FaultError(invalid(field, detail, code));
};

const range = (field: string, value: number, low: number, high: number): void => {
  if (!(value >= low && value <= high)) refuse(field, `must be between ${low} and ${high}, not ${value}`);
};

// An absent proto3 float reads as 0. For top_p and repetition_penalty 0 would be meaningless, so it means off.
function samplingOf(given: Sampling | undefined, vocabSize: number): Sampling {
  const { topP, repetitionPenalty, ...rest } = given ?? greedy;
  const sampling: Sampling = {
    ...rest,
    topP: topP || greedy.topP,
    repetitionPenalty: repetitionPenalty || greedy.repetitionPenalty,
  };
  range("temperature", sampling.temperature, 0, TEMPERATURE_MAX);
  if (sampling.temperature > 0 && sampling.temperature < TEMPERATURE_MIN)
    refuse("temperature", `must be 0 (the best token) or at least ${TEMPERATURE_MIN}, not ${sampling.temperature}`);
  range("top_p", sampling.topP, TOP_P_MIN, 1);
  range("min_p", sampling.minP, 0, 1);
  range("repetition_penalty", sampling.repetitionPenalty, 0.01, 100);
  range("presence_penalty", sampling.presencePenalty, -100, 100);
  range("frequency_penalty", sampling.frequencyPenalty, -100, 100);
  if (sampling.logitBias.length > LOGIT_BIAS_MAX)
    refuse("logit_bias", `${sampling.logitBias.length} entries; at most ${LOGIT_BIAS_MAX} are allowed`);
  const seen = new Set<number>();
  for (const { id, bias } of sampling.logitBias) {
    if (id >= vocabSize) refuse("logit_bias", `token id ${id} is outside the vocabulary of ${vocabSize}`);
    if (seen.has(id)) refuse("logit_bias", `token id ${id} is given twice`);
    seen.add(id);
    if (!(bias >= -BIAS_LIMIT && bias <= BIAS_LIMIT))
      refuse("logit_bias", `the bias of token id ${id} must be between -${BIAS_LIMIT} and ${BIAS_LIMIT}, not ${bias}`);
  }
  return sampling;
}

function checkIds(field: string, ids: readonly number[], vocabSize: number): void {
  const at = ids.findIndex((id) => !(id < vocabSize));
  if (at >= 0) refuse(field, `token id ${ids[at]} at index ${at} is outside the vocabulary of ${vocabSize}`);
}

function checkStops(open: Open, vocabSize: number): void {
  if (open.stop.length > STOPS_MAX)
    refuse("stop", `${open.stop.length} stop strings; at most ${STOPS_MAX} are allowed`);
  for (const stop of open.stop) {
    if (stop.length === 0) refuse("stop", "a stop string must not be empty");
    if (stop.length > STOP_CHARS_MAX)
      refuse("stop", `a stop string has ${stop.length} characters; at most ${STOP_CHARS_MAX} are allowed`);
  }
  if (open.stopIds.length > STOP_IDS_MAX)
    refuse("stop_ids", `${open.stopIds.length} stop ids; at most ${STOP_IDS_MAX} are allowed`);
  checkIds("stop_ids", open.stopIds, vocabSize);
}

async function promptOf(open: Open, tokenizer: Tokenizer): Promise<number[]> {
  switch (open.input?.$case) {
    case "text":
      return tokenizer.encode(open.input.value);
    case "chat":
      return tokenizer.encodeChat(open.input.value.messages);
    case "prompt":
      return open.input.value.ids;
    default:
      return refuse("input", "one of text, chat or prompt is needed");
  }
}

function lengthOf(open: Open, prompt: number, limits: RequestLimits): number {
  const limit =
    limits.lengthLimit === "context"
      ? `this model's maximum context length is ${limits.lengthMax} tokens`
      : `one sequence may have ${limits.lengthMax} tokens: the KV cache of this deployment holds no more`;
  if (prompt + 1 > limits.lengthMax)
    refuse("prompt", `${limit}, but the prompt has ${prompt}; shorten it`, "context_length_exceeded");
  if (open.maxTokens === 0) return limits.lengthMax;
  if (prompt + open.maxTokens > limits.lengthMax) {
    const detail = `${limit}, but ${prompt} in the prompt and max_tokens ${open.maxTokens} were asked for; reduce one of them`;
    refuse("max_tokens", detail, "context_length_exceeded");
  }
  return prompt + open.maxTokens;
}

/** Throws FaultError (invalid) naming the field and, where there is one, the limit. */
export async function parseOpen(open: Open, tokenizer: Tokenizer, limits: RequestLimits): Promise<Request> {
  const { vocabSize } = limits;
  const sampling = samplingOf(open.sampling, vocabSize);
  checkStops(open, vocabSize);
  checkIds("generated", open.generated, vocabSize);
  if (open.logprobs > limits.logprobsMax)
    refuse("logprobs", `at most ${Math.max(0, limits.logprobsMax - 1)} best tokens can be reported`);
  const prompt = await promptOf(open, tokenizer);
  if (prompt.length === 0) refuse("prompt", "the prompt has no tokens");
  checkIds("prompt", prompt, vocabSize);
  return {
    prompt,
    generated: open.generated,
    textSent: open.textSent,
    seedLow: open.seedLow,
    seedHigh: open.seedHigh,
    sampling,
    lengthMax: lengthOf(open, prompt.length, limits),
    stops: open.stop,
    stopIds: new Set(open.ignoreEos ? open.stopIds : [...limits.stopIds, ...open.stopIds]),
    minTokens: open.minTokens,
    logprobs: open.logprobs,
    margins: open.margins,
    speculation: open.speculation,
  };
}

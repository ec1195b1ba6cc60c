// The bodies of the OpenAI routes: pure functions from logs and chunks to JSON. Owns the shapes of both APIs, whole and
// streamed; the streamed text piece is prebuilt, because it is written for every token.
import { Buffer } from "node:buffer";
import { consequence } from "../../proto/fault.ts";
import type { Fault, TokenLogprob } from "../../proto/gen/muster/v1/worker.ts";
import { WAITING_UNITS_MAX } from "./limits.ts";
import type { Presentation } from "./openai-request.ts";
import type { Choice, Tally } from "./requests.ts";

/** What all bodies of one answer share. */
export type Answer = { id: string; created: number; model: string; presentation: Presentation };

type ErrorBody = { error: { message: string; type: string; param: string | null; code: string | null } };

/** By which answers of two revisions are told apart: the revision's first digits. Empty while no leader has begun. */
const FINGERPRINT_DIGITS = 12;
export const fingerprintOf = (choice: Choice | undefined): string =>
  choice?.origin?.revision.slice(0, FINGERPRINT_DIGITS) ?? "";

export const errorBody = (fault: Fault): ErrorBody => ({
  error: {
    message: fault.detail,
    type: consequence(fault).openaiType,
    param: fault.field === "" ? null : fault.field,
    code: fault.code === "" ? null : fault.code,
  },
});

type UsageBody = {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  muster: { drafted: number; accepted: number; target_steps: number; resumes?: number; numerics_changed?: true };
};

/** Sums over all choices; a prompt counts once, however many choices it has. */
export function usageOf(choices: readonly Choice[], n: number): UsageBody {
  const tally: Tally = { drafted: 0, accepted: 0, targetSteps: 0 };
  let prompt = 0;
  let completion = 0;
  let resumes = 0;
  for (const choice of choices) {
    if (choice.index % n === 0) prompt += choice.origin?.prompt.length ?? 0;
    completion += choice.generated.length;
    resumes += choice.resumes;
    tally.drafted += choice.tally.drafted;
    tally.accepted += choice.tally.accepted;
    tally.targetSteps += choice.tally.targetSteps;
  }
  return {
    prompt_tokens: prompt,
    completion_tokens: completion,
    total_tokens: prompt + completion,
    muster: {
      drafted: tally.drafted,
      accepted: tally.accepted,
      target_steps: tally.targetSteps,
      ...(resumes > 0 ? { resumes } : {}),
      ...(choices.some((choice) => choice.numericsChanged) ? { numerics_changed: true } : {}),
    },
  };
}

/** The UTF-8 bytes of a token's text; null where the token is a part of a character, whose bytes its text does not tell. */
const bytesOf = (text: string): number[] | null => (text.includes("\ufffd") ? null : [...Buffer.from(text, "utf8")]);

const chatLogprobs = (entries: readonly TokenLogprob[]) => ({
  content: entries.map((entry) => ({
    token: entry.text,
    logprob: entry.logprob,
    bytes: bytesOf(entry.text),
    top_logprobs: entry.top.map((top) => ({ token: top.text, logprob: top.logprob, bytes: bytesOf(top.text) })),
  })),
  refusal: null,
});

/** `offset`: UTF-16 units of the choice's text before these tokens. */
function completionLogprobs(entries: readonly TokenLogprob[], offset: number) {
  let at = offset;
  const offsets = entries.map((entry) => {
    const own = at;
    at += entry.text.length;
    return own;
  });
  return {
    tokens: entries.map((entry) => entry.text),
    token_logprobs: entries.map((entry) => entry.logprob),
    top_logprobs: entries.map((entry) => Object.fromEntries(entry.top.map((top) => [top.text, top.logprob]))),
    text_offset: offsets,
  };
}

const logprobsOf = (answer: Answer, entries: readonly TokenLogprob[], offset: number) =>
  answer.presentation.api === "chat" ? chatLogprobs(entries) : completionLogprobs(entries, offset);

export type Whole = { text: string; logprobs: TokenLogprob[] };

/** The body of an answer that is not streamed. */
export function wholeBody(answer: Answer, choices: readonly Choice[], wholes: readonly Whole[], n: number): object {
  const { api, logprobs, returnTokenIds } = answer.presentation;
  return {
    id: answer.id,
    object: api === "chat" ? "chat.completion" : "text_completion",
    created: answer.created,
    model: answer.model,
    system_fingerprint: fingerprintOf(choices[0]),
    choices: choices.map((choice, index) => {
      const { text, logprobs: entries } = wholes[index] ?? { text: "", logprobs: [] };
      return {
        index: choice.index,
        ...(api === "chat" ? { message: { role: "assistant", content: text, refusal: null } } : { text }),
        logprobs: logprobs ? logprobsOf(answer, entries, 0) : null,
        finish_reason: choice.state.kind === "ended" ? choice.state.reason : null,
        ...(returnTokenIds
          ? { muster: { prompt_token_ids: choice.origin?.prompt ?? [], token_ids: choice.generated } }
          : {}),
      };
    }),
    usage: usageOf(choices, n),
  };
}

/** What comes before and after the JSON string of a streamed text piece of one choice. */
export type Frame = { before: string; after: string };

function envelope(answer: Answer, choice: Choice | undefined): { head: string; tail: string } {
  const { api, includeUsage } = answer.presentation;
  const shared = {
    id: answer.id,
    object: api === "chat" ? "chat.completion.chunk" : "text_completion",
    created: answer.created,
    model: answer.model,
    system_fingerprint: fingerprintOf(choice),
  };
  const head = `data: ${JSON.stringify(shared).slice(0, -1)},"choices":[`;
  return { head, tail: `]${includeUsage ? ',"usage":null' : ""}}\n\n` };
}

/** The hot path: `before + JSON.stringify(text) + after` is the whole event of a text piece. */
export function textFrame(answer: Answer, choice: Choice): Frame {
  const { head, tail } = envelope(answer, choice);
  const { index } = choice;
  return answer.presentation.api === "chat"
    ? {
        before: `${head}{"index":${index},"delta":{"content":`,
        after: `},"logprobs":null,"finish_reason":null}${tail}`,
      }
    : { before: `${head}{"index":${index},"text":`, after: `,"logprobs":null,"finish_reason":null}${tail}` };
}

type Piece = { text: string; tokens: readonly number[]; logprobs: readonly TokenLogprob[]; offset: number };

/** An event with more than text: log-probabilities or token ids. */
export function detailEvent(answer: Answer, choice: Choice, piece: Piece, isFirst: boolean): string {
  const { head, tail } = envelope(answer, choice);
  const { api, logprobs, returnTokenIds } = answer.presentation;
  const muster = isFirst
    ? { prompt_token_ids: choice.origin?.prompt ?? [], token_ids: piece.tokens }
    : { token_ids: piece.tokens };
  const body = {
    index: choice.index,
    ...(api === "chat" ? { delta: { content: piece.text } } : { text: piece.text }),
    logprobs: logprobs ? logprobsOf(answer, piece.logprobs, piece.offset) : null,
    finish_reason: null,
    ...(returnTokenIds ? { muster } : {}),
  };
  return head + JSON.stringify(body) + tail;
}

/** The first event of a choice of the chat API. */
export function roleEvent(answer: Answer, choice: Choice): string {
  const { head, tail } = envelope(answer, choice);
  const { index } = choice;
  const delta = { role: "assistant", content: "", refusal: null };
  return head + JSON.stringify({ index, delta, logprobs: null, finish_reason: null }) + tail;
}

export function finishEvent(answer: Answer, choice: Choice): string {
  const { head, tail } = envelope(answer, choice);
  const body = {
    index: choice.index,
    ...(answer.presentation.api === "chat" ? { delta: {} } : { text: "" }),
    logprobs: null,
    finish_reason: choice.state.kind === "ended" ? choice.state.reason : null,
  };
  return head + JSON.stringify(body) + tail;
}

/** The last event where stream_options.include_usage asked for it. */
export function usageEvent(answer: Answer, choices: readonly Choice[], n: number): string {
  const { head } = envelope(answer, choices[0]);
  return `${head}],"usage":${JSON.stringify(usageOf(choices, n))}}\n\n`;
}

export const errorEvent = (fault: Fault): string => `data: ${JSON.stringify(errorBody(fault))}\n\n`;
export const DONE_EVENT = "data: [DONE]\n\n";

/** A comment for a held stream; what it waits for comes from others and must not end the line. */
export function waitingComment(why: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what is taken out
  const line = why.replaceAll(/[\u0000-\u001f\u007f\u2028\u2029]+/g, " ").slice(0, WAITING_UNITS_MAX);
  return `: waiting${line === "" ? "" : `: ${line}`}\n\n`;
}

// The log of every stream, and what each event means for it. Owns no socket, no clock and no leader: time comes in as an
// argument, and what must be done comes out as a verdict. Logs grow in place (they are the hot path).
//
//   G1  What a client got is exactly the log: `textSent` counts the UTF-16 units given to it, so a leader that takes the
//       stream over sends neither a unit again nor one too late.
//   G2  Re-opening is the same message as opening: prompt ids, generated ids, textSent and seed, whatever leader asked.
//   G3  A stream never crosses revisions; over another numerics id it goes on, but `numericsChanged` says so.
//   G4  Time without a leader's word is bounded by holdMs since the last token (before the first `Opened` by the time its model
//       takes to come); once a leader has answered `Opened`, the time on its queue does not count.
//   G5  The choices of one request have one revision.
import { invalid, lost, transient } from "../../proto/fault.ts";
import type { Chunk, Fault, Finish, Open, Sampling } from "../../proto/gen/muster/v1/worker.ts";
import { Fault_Kind, Finish_Reason } from "../../proto/gen/muster/v1/worker.ts";
import { RESUMES_MAX } from "./limits.ts";
import type { Seed } from "./seed.ts";

export type Input = NonNullable<Open["input"]>;

/** What all choices of one request have in common. */
export type Terms = {
  sampling: Sampling;
  /** 0: up to the context limit. */
  maxTokens: number;
  minTokens: number;
  stop: string[];
  ignoreEos: boolean;
  /** 0: none; n + 1: the token's own and the n best. */
  logprobs: number;
  speculation: boolean;
};

/** A request in the gateway's own words: for one model, `inputs.length * n` choices. */
export type Ask = {
  model: string;
  inputs: Input[];
  n: number;
  seed: Seed | undefined;
  terms: Terms;
  /** The client's own name for the conversation or its user; empty: told by what the inputs begin with. */
  conversation: string;
};

/** Who answered `Opened` first. */
export type Origin = { prompt: number[]; revision: string; numericsId: string };

/** G5: the revision that the first choice of a request has begun on is that of all. */
export type Kin = { revision: string | undefined };

export type Tally = { drafted: number; accepted: number; targetSteps: number };

export type ChoiceState =
  | { kind: "held"; since: number }
  /** `since`: when the hold began that this opening ends; nothing once the leader has answered. */
  | { kind: "open"; id: number; since: number | undefined }
  | { kind: "ended"; reason: "stop" | "length" }
  | { kind: "failed"; fault: Fault };

export type Choice = {
  /** Place in the answer: prompt * n + i. */
  readonly index: number;
  readonly input: Input;
  readonly seed: Seed;
  readonly terms: Terms;
  /** Equal for choices of one conversation: they keep their replica. */
  readonly sticky: string;
  /** Shared by the choices of one request. */
  readonly kin: Kin;
  origin: Origin | undefined;
  generated: number[];
  textSent: number;
  numericsChanged: boolean;
  resumes: number;
  /** Milliseconds without a leader since the last token, not counting the present hold. */
  heldMs: number;
  /** Counted here because the leader that dies takes its own count along. */
  steps: Tally;
  tally: Tally;
  state: ChoiceState;
};

export type Verdict = "going" | "hold" | "over";

export type ChoiceParts = Pick<Choice, "index" | "input" | "seed" | "terms" | "sticky" | "kin">;

export function makeChoice(parts: ChoiceParts, now: number): Choice {
  return {
    ...parts,
    origin: undefined,
    generated: [],
    textSent: 0,
    numericsChanged: false,
    resumes: 0,
    heldMs: 0,
    steps: { drafted: 0, accepted: 0, targetSteps: 0 },
    tally: { drafted: 0, accepted: 0, targetSteps: 0 },
    state: { kind: "held", since: now },
  };
}

/** The message that opens the choice, or goes on with it (G2); moves a held choice to open. */
export function openChoice(choice: Choice, id: number): Open {
  choice.state = { kind: "open", id, since: choice.state.kind === "held" ? choice.state.since : undefined };
  const { terms, origin } = choice;
  return {
    id,
    input: origin ? { $case: "prompt", value: { ids: origin.prompt } } : choice.input,
    generated: choice.generated,
    textSent: choice.textSent,
    seedLow: choice.seed.low,
    seedHigh: choice.seed.high,
    sampling: terms.sampling,
    maxTokens: terms.maxTokens,
    stop: terms.stop,
    stopIds: [],
    ignoreEos: terms.ignoreEos,
    logprobs: terms.logprobs,
    speculation: terms.speculation,
    minTokens: terms.minTokens,
    margins: false,
  };
}

/** The leader is gone: what it had counted is replaced by what was seen of its steps (accepted drafts at least). */
export function holdChoice(choice: Choice, now: number): void {
  // An opening that no leader answered has not ended the hold before it.
  const since = heldSince(choice) ?? now;
  addTally(choice.tally, choice.steps);
  choice.steps = { drafted: 0, accepted: 0, targetSteps: 0 };
  choice.state = { kind: "held", since };
}

/** The present hold becomes a part of `heldMs`. */
function endHold(choice: Choice, now: number): void {
  const { state } = choice;
  if (state.kind !== "open" || state.since === undefined) return;
  choice.heldMs += now - state.since;
  choice.state = { kind: "open", id: state.id, since: undefined };
}

/** Since when the choice has had no leader's word; nothing where it has a leader. */
export const heldSince = ({ state }: Choice): number | undefined =>
  state.kind === "held" || state.kind === "open" ? state.since : undefined;

function failChoice(choice: Choice, fault: Fault): "over" {
  choice.state = { kind: "failed", fault };
  return "over";
}

/** Takes what one step brought into the log and says how the choice stands after it. */
export function absorb(choice: Choice, chunk: Chunk, now: number): Verdict {
  if (chunk.opened) {
    endHold(choice, now);
    if (isElsewhere(choice, chunk.opened)) {
      holdChoice(choice, now);
      return "hold";
    }
    const refused = begin(choice, chunk.opened);
    if (refused) return failChoice(choice, refused);
  }
  const count = chunk.tokens.length;
  if (count > 0) {
    for (const token of chunk.tokens) choice.generated.push(token);
    choice.steps.targetSteps += 1;
    choice.steps.accepted += count - 1;
    choice.steps.drafted += count - 1;
    choice.heldMs = 0;
  }
  choice.textSent += chunk.text.length;
  return chunk.finish ? conclude(choice, chunk.finish, now) : "going";
}

/** G5: it has nothing yet, and its request has begun on another revision meanwhile: it is placed again. */
const isElsewhere = ({ origin, kin }: Choice, { revision }: NonNullable<Chunk["opened"]>): boolean =>
  origin === undefined && kin.revision !== undefined && kin.revision !== revision;

function begin(choice: Choice, opened: NonNullable<Chunk["opened"]>): Fault | undefined {
  const { origin, kin } = choice;
  if (!origin) {
    kin.revision ??= opened.revision;
    choice.origin = { prompt: opened.prompt, revision: opened.revision, numericsId: opened.numericsId };
    choice.heldMs = 0;
    return undefined;
  }
  choice.resumes += 1;
  if (choice.resumes > RESUMES_MAX) {
    return lost("resumes_exhausted", `${RESUMES_MAX} leaders died under this request; it was given up`);
  }
  if (opened.revision !== origin.revision) return revisionChanged(origin.revision, opened.revision);
  if (opened.numericsId !== origin.numericsId) choice.numericsChanged = true;
  return undefined;
}

/** G3: the fault of a stream whose model came back as another revision. */
export const revisionChanged = (from: string, to: string): Fault =>
  lost(
    "revision_changed",
    `the model was replaced (revision ${from} by ${to}) while this request ran; send the request again`,
  );

function conclude(choice: Choice, finish: Finish, now: number): Verdict {
  if (finish.numericsChanged) choice.numericsChanged = true;
  if (finish.reason === Finish_Reason.STOP || finish.reason === Finish_Reason.LENGTH) {
    addTally(choice.tally, finish);
    choice.state = { kind: "ended", reason: finish.reason === Finish_Reason.STOP ? "stop" : "length" };
    return "over";
  }
  const { fault } = finish;
  if (finish.reason === Finish_Reason.FAULT && fault) {
    if (fault.kind === Fault_Kind.INVALID) return failChoice(choice, fault);
    // A full queue turns away who is new; who was in it already waits for a place (the hold bounds that).
    if (fault.code === "queue_full" && !choice.origin) return failChoice(choice, fault);
  }
  holdChoice(choice, now);
  return "hold";
}

function addTally(sum: Tally, part: Tally): void {
  sum.drafted += part.drafted;
  sum.accepted += part.accepted;
  sum.targetSteps += part.targetSteps;
}

/** How long a choice may be held: `comingMs` before it has begun, `holdMs` once it has. */
export type HoldBounds = { comingMs: number; holdMs: number };

/** G4: the fault of a choice that was held too long, or nothing. `cause`: what its model waits for. */
export function holdFault(choice: Choice, now: number, bounds: HoldBounds, cause: string): Fault | undefined {
  const since = heldSince(choice);
  const boundMs = choice.origin ? bounds.holdMs : bounds.comingMs;
  if (since === undefined || choice.heldMs + (now - since) < boundMs) return undefined;
  const seconds = Math.round(boundMs / 1000);
  const why = cause === "" ? "" : ` (${cause})`;
  return choice.origin
    ? transient(
        "hold_expired",
        `the model lost its leader and was not back within ${seconds} s${why}; the answer ends here`,
      )
    : transient("model_not_serving", `the model was not serving within ${seconds} s${why}; try again later`);
}

/** What an input takes in memory, about: two bytes for each UTF-16 unit, eight for each id. */
export function bytesOf(input: Input): number {
  switch (input.$case) {
    case "text":
      return 2 * input.value.length;
    case "prompt":
      return 8 * input.value.ids.length;
    default:
      return input.value.messages.reduce((sum, message) => sum + 2 * message.content.length, 0);
  }
}

/** The longest prompt a request may bring as ids, checked before a leader is asked. */
export function contextFault(input: Input, contextTokens: number, field: string): Fault | undefined {
  if (contextTokens === 0 || input.$case !== "prompt" || input.value.ids.length < contextTokens) return undefined;
  return invalid(
    field,
    `the prompt has ${input.value.ids.length} tokens; this model's context is ${contextTokens} tokens, answer included`,
    "context_length_exceeded",
  );
}

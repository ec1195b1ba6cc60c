// One running or waiting sequence: ids, KV position and counters. The leader moves it; the scheduler reads it.
import type { Chunk, Finish, Margin, Sampling, TokenLogprob } from "../../proto/gen/muster/v1/worker.ts";
import type { TokenDetail } from "../engine/engine.ts";
import type { SequenceView } from "../schedule/schedule.ts";
import type { TokenTexts } from "../token/detokenizer.ts";
import type { Outlet } from "./outlet.ts";
import type { Request } from "./request.ts";
import type { Ending, Transcript } from "./transcript.ts";

/** Times without guesses after which a sequence no longer waits for them: as many as a breaker takes to open (worker/spec). */
const MISSES_MAX = 10;

// waiting: no slot, no blocks, computed 0 · running: a slot and blocks · ended: nothing, and nothing comes back
export type SequenceState = "waiting" | "running" | "ended";

export type SequenceOptions = {
  id: number;
  outlet: Outlet;
  request: Request;
  transcript: Transcript;
  numericsOf: () => string;
};

export class Sequence implements SequenceView {
  readonly id: number;
  readonly outlet: Outlet;
  readonly request: Request;
  readonly transcript: Transcript;
  readonly ids: number[];
  state: SequenceState = "waiting";
  /** Ids in the KV cache once all launched steps are done. */
  computed = 0;
  /** Tokens that launched rows will sample, guesses aside: they count before they are known. */
  promised = 0;
  blocks: number[] = [];
  slot = 0;
  /** The last launched step with a row of it. */
  lastStep = 0n;
  /** Guesses for the next step. */
  drafts: readonly number[] = [];
  /** Its session with the speculator; 0 where it has none. */
  session = 0;
  /** Times in a row that it asked for guesses and got none. */
  misses = 0;
  drafted = 0;
  accepted = 0;
  targetSteps = 0;
  #samplings = 0;

  /** The ranks' numerics now, and when it began. */
  readonly #numericsOf: () => string;
  readonly #numerics: string;

  constructor(options: SequenceOptions) {
    this.id = options.id;
    this.outlet = options.outlet;
    this.request = options.request;
    this.transcript = options.transcript;
    this.#numericsOf = options.numericsOf;
    this.#numerics = options.numericsOf();
    this.ids = [...this.request.prompt, ...this.request.generated];
  }

  get length(): number {
    return this.ids.length + this.promised;
  }
  get blocksHeld(): number {
    return this.blocks.length;
  }
  get remaining(): number {
    return this.request.lengthMax - this.length;
  }
  get isUnsettled(): boolean {
    return this.promised > 0 && this.session !== 0 && this.misses < MISSES_MAX;
  }
  get draftCount(): number {
    return this.drafts.length;
  }
  get generatedFrom(): number {
    return this.request.prompt.length;
  }
  get sampling(): Sampling {
    return this.request.sampling;
  }

  // target_steps: every step that sampled for this sequence except the first, which ends the prefill. A step that recomputes
  // after preemption counts as the one step that it is. A resumed stream counts all three anew.
  countStep(drafted: number, accepted: number): void {
    if (this.#samplings++ > 0) this.targetSteps++;
    this.drafted += drafted;
    this.accepted += accepted;
  }

  ended(ending: Ending): Finish {
    return this.#finish(ending.reason === "stop" ? REASON.stop : REASON.length, undefined, ending.stop);
  }

  cancelled(): Finish {
    return this.#finish(REASON.cancelled, undefined, "");
  }

  faulted(fault: NonNullable<Finish["fault"]>): Finish {
    return this.#finish(REASON.fault, fault, "");
  }

  #finish(reason: Finish["reason"], fault: Finish["fault"], stop: string): Finish {
    const { drafted, accepted, targetSteps } = this;
    const numericsChanged = this.#numericsOf() !== this.#numerics;
    return { reason, fault, drafted, accepted, targetSteps, stop, numericsChanged };
  }
}

const REASON = { stop: 1, length: 2, cancelled: 3, fault: 4 } as const satisfies Record<string, Finish["reason"]>;

/** A refusal of a request that never became a sequence. */
export const refusal = (id: number, fault: NonNullable<Finish["fault"]>): Chunk =>
  chunkOf(id, {
    finish: { reason: REASON.fault, fault, drafted: 0, accepted: 0, targetSteps: 0, stop: "", numericsChanged: false },
  });

export const chunkOf = (id: number, parts: Partial<Chunk>): Chunk => ({
  id,
  opened: undefined,
  tokens: [],
  text: "",
  logprobs: [],
  margins: [],
  finish: undefined,
  ...parts,
});

export function logprobsOf(
  tokens: readonly number[],
  details: readonly TokenDetail[],
  texts: TokenTexts,
): TokenLogprob[] {
  return tokens.map((id, index) => {
    const detail = details[index];
    if (detail === undefined) throw new Error(`the engine gave ${details.length} details for ${tokens.length} tokens`);
    const top = detail.top.map((entry) => ({ id: entry.id, logprob: entry.logprob, text: texts.label(entry.id) }));
    return { logprob: detail.logprob, top, text: texts.label(id) };
  });
}

export const marginsOf = (details: readonly TokenDetail[]): Margin[] =>
  details.map(({ scoreGap, routerGap }) => ({ scoreGap, routerGap }));

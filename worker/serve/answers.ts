// Tokens on their way to text and to the gateways. Owns when that happens: at once where only the text tells whether a sequence
// goes on, else while a step computes, so that no decision waits for it.
import type { RowResult } from "../engine/engine.ts";
import type { TokenTexts } from "../token/detokenizer.ts";
import type { Outlets } from "./outlet.ts";
import { chunkOf, logprobsOf, marginsOf, type Sequence } from "./sequence.ts";
import type { Taken } from "./transcript.ts";

/** What a row brought its sequence. */
export type Gain = { sequence: Sequence; tokens: readonly number[]; taken: Taken; details: RowResult["details"] };

export class Answers {
  readonly #outlets: Outlets;
  readonly #texts: TokenTexts;
  readonly #end: (sequence: Sequence) => void;
  #unwritten: Gain[] = [];

  /** `end` is called when the text has told that a sequence is over. */
  constructor(options: { outlets: Outlets; texts: TokenTexts; end: (sequence: Sequence) => void }) {
    this.#outlets = options.outlets;
    this.#texts = options.texts;
    this.#end = options.end;
  }

  add(gain: Gain): void {
    if (gain.sequence.transcript.needsText) this.#write(gain);
    else this.#unwritten.push(gain);
  }

  /** Writes and sends all. */
  flush(): void {
    for (const gain of this.#unwritten) this.#write(gain);
    this.#unwritten = [];
    this.#outlets.flush();
  }

  #write({ sequence, tokens, taken, details }: Gain): void {
    const { request, outlet, id } = sequence;
    const { text, kept, ending } = sequence.transcript.write(tokens, taken);
    if (ending !== undefined) this.#end(sequence);
    if (outlet.entries.get(id) !== sequence) return; // cancelled after the step: its Finish has been sent
    const sent = kept === tokens.length ? [...tokens] : tokens.slice(0, kept);
    const chunk = chunkOf(id, { tokens: sent, text, finish: ending && sequence.ended(ending) });
    if (request.logprobs > 0) chunk.logprobs = logprobsOf(sent, details, this.#texts);
    if (request.margins) chunk.margins = marginsOf(details.slice(0, kept));
    this.#outlets.push(outlet, chunk);
  }
}

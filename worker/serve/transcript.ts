// What a request has said so far, and when it is over. Owns the rules that end a sequence and the way from ids to sent text.
//
//   S1  where a sequence ends, and its text, depend on its ids alone: not on how many came in one step, nor on whether they
//       were generated here or handed over by a resume.
//   S2  a stop id is a token of the answer without text; text from a stop string on is never sent.
//   S3  before min_tokens nothing but a length limit ends it: stop ids are ordinary tokens, stop strings are not looked for.
import type { Detokenizer } from "../token/detokenizer.ts";
import { StopScanner } from "../token/stop-scanner.ts";
import type { Request } from "./request.ts";

export type Ending = { readonly reason: "stop" | "length"; readonly stop: string };

/** Kept tokens of a step: fewer than came where one of them ended the sequence. */
export type Taken = { readonly kept: number; readonly ending: Ending | undefined };

export type Written = { readonly text: string; readonly kept: number; readonly ending: Ending | undefined };

export class Transcript {
  readonly #request: Request;
  readonly #detokenizer: Detokenizer;
  readonly #scanner: StopScanner;
  /** Tokens that have been turned into text. */
  #written = 0;
  /** UTF-16 units at the beginning that the client has already. */
  #skip: number;

  constructor(request: Request, detokenizer: Detokenizer) {
    this.#request = request;
    this.#detokenizer = detokenizer;
    this.#scanner = new StopScanner(request.stops);
    this.#skip = request.textSent;
  }

  /** True where only the text can tell the end, so that the next step needs it. */
  get needsText(): boolean {
    return this.#request.stops.length > 0;
  }

  /** How many of `tokens`, sampled after `generated` earlier ones, belong to the answer as far as ids can tell. */
  take(tokens: readonly number[], generated: number): Taken {
    const request = this.#request;
    for (let index = 0; index < tokens.length; index++) {
      const ordinal = generated + index;
      const id = tokens[index];
      if (id !== undefined && ordinal >= request.minTokens && request.stopIds.has(id))
        return { kept: index + 1, ending: { reason: "stop", stop: "" } };
      if (request.prompt.length + ordinal + 1 >= request.lengthMax)
        return { kept: index + 1, ending: { reason: "length", stop: "" } };
    }
    return { kept: tokens.length, ending: undefined };
  }

  /** The text of tokens that were taken, without what was sent before; may end the sequence earlier at a stop string. */
  write(tokens: readonly number[], taken: Taken): Written {
    const isStopId = taken.ending?.reason === "stop";
    let text = "";
    for (let index = 0; index < taken.kept; index++) {
      const id = tokens[index];
      if (id === undefined) break;
      const ordinal = this.#written++;
      if (isStopId && index === taken.kept - 1) break;
      const piece = this.#detokenizer.push(id);
      if (ordinal < this.#request.minTokens) {
        text += piece;
        continue;
      }
      const scan = this.#scanner.push(piece);
      text += scan.text;
      if (scan.stop !== undefined)
        return { text: this.#unsent(text), kept: index + 1, ending: { reason: "stop", stop: scan.stop } };
    }
    if (taken.ending === undefined) return { text: this.#unsent(text), kept: taken.kept, ending: undefined };
    const last = this.#scanner.push(this.#detokenizer.end());
    text += last.text + this.#scanner.end();
    const ending: Ending = last.stop === undefined ? taken.ending : { reason: "stop", stop: last.stop };
    return { text: this.#unsent(text), kept: taken.kept, ending };
  }

  #unsent(text: string): string {
    if (this.#skip === 0) return text;
    const cut = Math.min(this.#skip, text.length);
    this.#skip -= cut;
    return text.slice(cut);
  }
}

// An answer that is not streamed: collects text and log-probabilities until every choice has ended.
import type { Chunk, Fault, TokenLogprob } from "../../proto/gen/muster/v1/worker.ts";
import type { Sink } from "./job.ts";
import type { Whole } from "./openai-answer.ts";
import type { Choice } from "./requests.ts";

export class WholeSink implements Sink {
  readonly wholes: Whole[];
  /** Resolves with nothing once every choice has ended, or with the fault. */
  readonly result: Promise<Fault | undefined>;
  readonly #resolve: (fault: Fault | undefined) => void;
  readonly #texts: string[];
  readonly #logprobs: TokenLogprob[][];

  constructor(choices: number) {
    const { promise, resolve } = Promise.withResolvers<Fault | undefined>();
    this.result = promise;
    this.#resolve = resolve;
    this.wholes = [];
    this.#texts = Array.from({ length: choices }, () => "");
    this.#logprobs = Array.from({ length: choices }, () => []);
  }

  chunk(choice: Choice, chunk: Chunk): void {
    this.#texts[choice.index] += chunk.text;
    if (chunk.logprobs.length > 0) this.#logprobs[choice.index]?.push(...chunk.logprobs);
  }

  flush(): void {}

  waiting(): void {}

  done(): void {
    for (const [index, text] of this.#texts.entries()) {
      this.wholes.push({ text, logprobs: this.#logprobs[index] ?? [] });
    }
    this.#resolve(undefined);
  }

  failed(fault: Fault): void {
    this.#resolve(fault);
  }
}

// A request being answered: its choices, where its answer goes, when what happened. Owns the shape; what becomes of it is
// streams.ts's.
import type { Chunk, Fault } from "../../proto/gen/muster/v1/worker.ts";
import { stickyOf } from "./conversation.ts";
import type { Running } from "./lane.ts";
import type { Ask, Choice } from "./requests.ts";
import { bytesOf, heldSince, makeChoice } from "./requests.ts";
import { drawSeed, seedOfChoice } from "./seed.ts";

/** Where the answer goes. */
export interface Sink {
  /** Tokens, text, log-probabilities; the choice's log already holds them. */
  chunk(choice: Choice, chunk: Chunk): void;
  /** One step is complete. */
  flush(): void;
  /** The request is still held; `why`: what its model waits for, empty where nobody says. */
  waiting(why: string): void;
  /** Every choice has ended. */
  done(): void;
  failed(fault: Fault): void;
}

export type Job = {
  readonly ask: Ask;
  /** Key of the model. */
  readonly model: string;
  /** How long it may wait for its model to come. */
  readonly comingMs: number;
  readonly choices: Choice[];
  readonly running: Running<Job>[];
  readonly sink: Sink;
  readonly startedAt: number;
  readonly bytes: number;
  firstTokenAt: number;
  lastTokenAt: number;
  saidWaitingAt: number;
  left: number;
  over: boolean;
};

/** Since when a choice is held that has been held longest; nothing where all have their leader. */
export function earliest(choices: readonly Choice[]): number | undefined {
  let first: number | undefined;
  for (const choice of choices) {
    const since = heldSince(choice);
    if (since !== undefined && (first === undefined || since < first)) first = since;
  }
  return first;
}

export const askBytes = (ask: Ask): number => ask.inputs.reduce((sum, input) => sum + bytesOf(input), 0);

export type JobParts = Pick<Job, "ask" | "model" | "sink" | "comingMs">;

export function makeJob(parts: JobParts, now: number): Job {
  const { ask } = parts;
  const choices: Choice[] = [];
  const kin = { revision: undefined };
  for (const input of ask.inputs) {
    const seed = ask.seed ?? drawSeed();
    const sticky = stickyOf(ask.conversation, input);
    for (let i = 0; i < ask.n; i++) {
      const index = choices.length;
      choices.push(makeChoice({ index, input, seed: seedOfChoice(seed, i), terms: ask.terms, sticky, kin }, now));
    }
  }
  const job: Job = {
    ...parts,
    choices,
    running: [],
    startedAt: now,
    bytes: askBytes(ask),
    firstTokenAt: 0,
    lastTokenAt: 0,
    saidWaitingAt: now,
    left: choices.length,
    over: false,
  };
  for (const choice of choices) job.running.push({ owner: job, choice });
  return job;
}

// Clients that never pause: each asks its questions in turn, streamed, until it is stopped. Owns the clients and what they were
// answered; whether an answer is right is said by comparing it with what the revision that it names would have answered.
import { Buffer } from "node:buffer";
import { z } from "zod";
import { until } from "../../until.ts";

/** Of the completions API; `sure`: its tokens are the same whatever rounds them. */
type Body = { temperature: number; max_tokens: number; n?: number; seed?: number; top_p?: number; sure?: boolean };
/** `copies`: how often the prompt is asked in one request, each time with the same seed. */
export type Question = { name: string; prompt: number[]; copies?: number; body: Body };
export type Answer = {
  question: Question;
  /** On performance.now's clock. */
  beganMs: number;
  endedMs: number;
  /** Each `system_fingerprint` that was said. */
  fingerprints: Set<string>;
  /** Of each choice. */
  ids: number[][];
  /** Why it is not whole: an HTTP status, an error in the stream, a stream that broke. */
  failure: string | undefined;
  /** Code of the typed error, where there is one. */
  code: string | undefined;
};
/** Ids of each choice of one prompt, by question. */
export type Expected = ReadonlyMap<string, number[][]>;

const ANSWER_MS_MAX = 300_000;
const ANSWERS_MAX = 200_000;
const Event = z.looseObject({
  system_fingerprint: z.string().optional(),
  error: z.looseObject({ code: z.string().nullable(), message: z.string() }).optional(),
  choices: z
    .array(
      z.looseObject({
        index: z.number(),
        muster: z.looseObject({ token_ids: z.array(z.number()) }).optional(),
        finish_reason: z.string().nullable(),
      }),
    )
    .default([]),
});

type Asking = { user?: string; onBegun?: () => void };

/** Asks once; resolves with what came, whole or not. `user`: whose conversation it is; `onBegun`: the first tokens are there. */
export async function askOnce(url: string, question: Question, { user = "", onBegun = () => {} }: Asking = {}) {
  const { prompt, body, copies = 1 } = question;
  const { sure: _, ...fields } = body;
  const beganMs = performance.now();
  const answer: Answer = {
    question,
    beganMs,
    endedMs: beganMs,
    fingerprints: new Set(),
    ids: Array.from({ length: copies * (body.n ?? 1) }, () => []),
    failure: undefined,
    code: undefined,
  };
  const asked = {
    model: "nano",
    prompt: Array.from({ length: copies }, () => prompt),
    ...fields,
    user,
    ignore_eos: true,
    stream: true,
    muster: { return_token_ids: true },
  };
  try {
    const response = await fetch(`${url}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(asked),
      signal: AbortSignal.timeout(ANSWER_MS_MAX),
    });
    if (response.headers.get("content-type")?.startsWith("text/event-stream") !== true) {
      answer.failure = `HTTP ${response.status}: ${await response.text()}`;
    } else {
      await read(response, answer, onBegun);
    }
  } catch (error) {
    answer.failure = String(error);
  }
  answer.endedMs = performance.now();
  return answer;
}

async function read(response: Response, answer: Answer, onBegun: () => void): Promise<void> {
  const decoder = new TextDecoder();
  let finished = 0;
  let isDone = false;
  let rest = "";
  for await (const part of response.body ?? []) {
    const events = (rest + decoder.decode(Buffer.from(part), { stream: true })).split("\n\n");
    rest = events.pop() ?? "";
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") isDone = true;
      else finished += take(answer, Event.parse(JSON.parse(event.slice("data: ".length))));
      onBegun();
    }
  }
  if (answer.failure !== undefined) return;
  if (!isDone || finished !== answer.ids.length) answer.failure = `it ended after ${finished} whole choices`;
}

/** How many choices end with it. */
function take(answer: Answer, { system_fingerprint: fingerprint, error, choices }: z.infer<typeof Event>): number {
  if (fingerprint !== undefined) answer.fingerprints.add(fingerprint);
  if (error !== undefined) {
    answer.failure = `error in the stream: ${error.message}`;
    answer.code = error.code ?? "";
  }
  for (const { index, muster } of choices) answer.ids[index]?.push(...(muster?.token_ids ?? []));
  return choices.filter(({ finish_reason: reason }) => reason === "length").length;
}

export class Traffic {
  readonly answers: Answer[] = [];
  readonly #url: string;
  readonly #clients: Promise<void>[] = [];
  /** What each client is in the midst of. */
  readonly #open = new Map<string, Question>();
  #isStopped = false;

  constructor(url: string) {
    this.#url = url;
  }

  /** A client more. One that gets no whole answer ends: what it was told is among the answers. */
  add(questions: readonly Question[]): void {
    this.#clients.push(this.#run(questions, `client ${this.#clients.length}`));
  }

  async #run(questions: readonly Question[], user: string): Promise<void> {
    for (let turn = 0; !this.#isStopped && this.answers.length < ANSWERS_MAX; turn++) {
      const question = questions[turn % questions.length];
      if (question === undefined) return;
      const onBegun = () => this.#open.set(user, question);
      const answer = await askOnce(this.#url, question, { user, onBegun });
      this.#open.delete(user);
      this.answers.push(answer);
      if (answer.failure !== undefined) return;
    }
  }

  /** Streams of the question that have begun and not ended. */
  running(name: string): number {
    return [...this.#open.values()].filter((question) => question.name === name).length;
  }

  /** Resolves when each question has had a whole answer that began after `sinceMs`; rejects where one has failed. */
  async answered(questions: readonly Question[], sinceMs: number, boundMs: number): Promise<void> {
    const isSo = () => {
      const failed = this.answers.find(({ failure }) => failure !== undefined);
      if (failed) throw new Error(`${failed.question.name} has failed: ${failed.failure}`);
      const names = new Set(this.answers.filter((one) => one.beganMs >= sinceMs).map(({ question }) => question.name));
      return questions.every(({ name }) => names.has(name));
    };
    await until(isSo, "every question has been answered", boundMs);
  }

  /** Resolves when the last answers have ended. */
  async stop(): Promise<void> {
    this.#isStopped = true;
    await Promise.all(this.#clients);
  }
}

/** What is wrong with an answer; undefined where it is whole and of one revision. `expected`: by fingerprint. */
export function faultOf(answer: Answer, expected: ReadonlyMap<string, Expected>): string | undefined {
  const { question, failure, fingerprints, ids } = answer;
  if (failure !== undefined) return `${question.name}: ${failure}`;
  const [fingerprint = ""] = fingerprints;
  if (fingerprints.size !== 1) return `${question.name}: from revisions ${[...fingerprints]}`;
  const right = expected.get(fingerprint)?.get(question.name);
  if (right === undefined) return `${question.name}: nobody knows revision ${fingerprint}`;
  const wanted = (index: number): number[] => right[index % right.length] ?? [];
  const choice = ids.findIndex((got, index) => JSON.stringify(got) !== JSON.stringify(wanted(index)));
  if (choice < 0) return undefined;
  const at = wanted(choice).findIndex((id, index) => id !== ids[choice]?.[index]);
  const count = `${ids[choice]?.length} of ${wanted(choice).length} tokens`;
  return `${question.name}: choice ${choice} of revision ${fingerprint} is wrong from token ${at} on (${count})`;
}

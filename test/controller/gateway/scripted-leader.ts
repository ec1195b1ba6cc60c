// A leader whose tokens are a pure function of (prompt, seed, index): a genuine gRPC Worker service, so that what the gateway
// does after a death can be compared with an undisturbed run. It computes no model; deaths, refusals and delays are injected.
// Text behaves as a real detokeniser's: some tokens end inside a character and are withheld, stop strings are cut.
import { createHash } from "node:crypto";
import { Server, ServerCredentials, type ServerDuplexStream, type ServerWritableStream, status } from "@grpc/grpc-js";
import { invalid, lost, waiting } from "../../../proto/fault.ts";
import {
  type Chunk,
  type Fault,
  Finish_Reason,
  type Open,
  type StatsRequest,
  type SubmitRequest,
  type SubmitResponse,
  type TokenLogprob,
  type WorkerServer,
  WorkerService,
  type WorkerStats,
} from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";

export const VOCAB = 512;
export const CONTEXT = 4096;
const EOS = 0;
/** Pieces of one to four UTF-16 units, multi-byte characters and surrogate pairs among them. */
const SYLLABLES = [" the", "a", "é", " on", "😀", "\n", "ü ", "xyz", "日本", '"', "\\", "e"];

export const piece = (id: number): string => (id === EOS ? "" : (SYLLABLES[id % SYLLABLES.length] ?? "") + (id % 10));

/** Ends inside a character: its text comes with the next token. */
const isPartial = (id: number): boolean => id % 7 === 3;

export const promptIds = (text: string): number[] => [1, ...Buffer.from(text, "utf8")];

type Source = Pick<Open, "seedLow" | "seedHigh"> & { prompt: readonly number[] };

/** The token at an index: nothing but prompt, seed and index. */
export function tokenAt(source: Source, index: number): number {
  const hash = createHash("sha256");
  hash.update(`${source.seedLow}:${source.seedHigh}:${index}:${source.prompt.join(",")}`);
  return hash.digest().readUInt32LE(0) % VOCAB;
}

type Rules = Pick<Open, "stop" | "maxTokens" | "ignoreEos">;
type View = { text: string; finish: "stop" | "length" | undefined };

/** The text that a client may see of these tokens, and whether they end the answer. */
function viewOf(ids: readonly number[], rules: Rules, sawEos: boolean): View {
  let text = ids.map(piece).join("");
  for (const stop of rules.stop) {
    const at = text.indexOf(stop);
    if (at >= 0) return { text: text.slice(0, at), finish: "stop" };
  }
  if (sawEos) return { text, finish: "stop" };
  if (ids.length >= rules.maxTokens) return { text, finish: "length" };
  const last = ids.at(-1);
  if (last !== undefined && isPartial(last)) text = text.slice(0, text.length - piece(last).length);
  return { text: text.slice(0, text.length - withheld(text, rules.stop)), finish: undefined };
}

/** Units at the end that may still become a stop string. */
function withheld(text: string, stops: readonly string[]): number {
  let most = 0;
  for (const stop of stops) {
    for (let length = Math.min(stop.length - 1, text.length); length > most; length--) {
      if (text.endsWith(stop.slice(0, length))) most = length;
    }
  }
  return most;
}

export type Expected = { ids: number[]; text: string; finish: "stop" | "length" };

/** The whole undisturbed answer. */
export function expectedAnswer(source: Source, rules: Rules): Expected {
  const ids: number[] = [];
  const limit = { ...rules, maxTokens: rules.maxTokens || CONTEXT - source.prompt.length };
  for (;;) {
    const next = tokenAt(source, ids.length);
    const sawEos = next === EOS && !rules.ignoreEos;
    if (!sawEos) ids.push(next);
    const { text, finish } = viewOf(ids, limit, sawEos);
    if (finish) return { ids, text, finish };
  }
}

export type LeaderOptions = {
  incarnation: bigint;
  revision?: string;
  numericsId?: string;
  /** Sequences taken at once. */
  capacity?: number;
  /** Dies, sockets and all, once so many tokens were sent over all streams. */
  dieAfterTokens?: number;
  /** Ends every stream with this fault instead of dying, at the same point. */
  faultAfterTokens?: { tokens: number; fault: Fault };
  /** Refuses every Open with it. */
  refusal?: Fault;
  stepMs?: number;
  /** Told in Stats besides what runs. */
  load?: Partial<WorkerStats>;
  /** Tokens of one step, as if drafts had been accepted. */
  tokensPerStep?: number;
};

type Sequence = {
  open: Open;
  prompt: number[];
  ids: number[];
  sent: number;
  steps: number;
  accepted: number;
  isTold: boolean;
};

type Duplex = ServerDuplexStream<SubmitRequest, SubmitResponse>;

export class ScriptedLeader {
  readonly options: LeaderOptions;
  readonly opens: Open[] = [];
  readonly cancels: number[] = [];
  address = "";
  streams = 0;
  running = 0;
  /** Its experts have been moved under whatever ends from now on. */
  hasMoved = false;
  #server = new Server(channelOptions);
  #timers = new Set<NodeJS.Timeout>();
  #calls = new Set<Duplex>();
  #tokensSent = 0;
  #isDead = false;
  #onDeath: (() => void)[] = [];

  constructor(options: LeaderOptions) {
    this.options = options;
    const unimplemented = (_call: unknown, respond: (error: { code: status }) => void) =>
      respond({ code: status.UNIMPLEMENTED });
    const none = (call: { emit(event: string, error: object): void }) =>
      call.emit("error", { code: status.UNIMPLEMENTED });
    const service: WorkerServer = {
      describe: unimplemented,
      drain: unimplemented,
      stageExperts: unimplemented,
      switchExperts: unimplemented,
      expertLoad: unimplemented,
      load: none,
      steps: none,
      score: none,
      tokenize: (call, respond) => {
        const { input } = call.request;
        if (input?.$case !== "text") return respond(null, { ids: input ? chatIds(input.value.messages) : [] });
        respond(null, { ids: promptIds(input.value) });
      },
      submit: (call: Duplex) => this.#submit(call),
      stats: (call: ServerWritableStream<StatsRequest, WorkerStats>) => this.#stats(call),
    };
    this.#server.addService(WorkerService, service);
  }

  start(): Promise<string> {
    return new Promise((resolve, reject) => {
      this.#server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, port) => {
        if (error) return reject(error);
        this.address = `127.0.0.1:${port}`;
        resolve(this.address);
      });
    });
  }

  /** Closes every socket at once, as a killed process does. */
  kill(): void {
    if (this.#isDead) return;
    this.#isDead = true;
    for (const timer of this.#timers) clearInterval(timer);
    this.#server.forceShutdown();
    for (const listener of this.#onDeath) listener();
  }

  /** Ends the Submit streams with an error while the leader lives. */
  breakLinks(): void {
    for (const call of [...this.#calls]) call.emit("error", { code: status.UNAVAILABLE, details: "broken" });
  }

  get died(): Promise<void> {
    if (this.#isDead) return Promise.resolve();
    return new Promise((resolve) => this.#onDeath.push(resolve));
  }

  #stats(call: ServerWritableStream<StatsRequest, WorkerStats>): void {
    call.write({
      running: this.running,
      waiting: 0,
      kvBlocksFree: 7,
      kvBlocksTotal: 8,
      steps: 1n,
      tokensGenerated: BigInt(this.#tokensSent),
      tokensPrefilled: 0n,
      drafted: 0n,
      accepted: 0n,
      preemptions: 0n,
      stepMs: 1,
      waitMs: 0,
      draining: false,
      speculating: false,
      queueMax: this.options.capacity ?? 64,
      ...this.options.load,
    });
  }

  #submit(call: Duplex): void {
    this.streams += 1;
    this.#calls.add(call);
    const sequences = new Map<number, Sequence>();
    call.on("data", ({ incarnation, kind }: SubmitRequest) => {
      if (incarnation !== 0n && incarnation !== this.options.incarnation) {
        call.emit("error", { code: status.FAILED_PRECONDITION, details: "another incarnation" });
        return;
      }
      if (kind?.$case === "open") this.#open(call, sequences, kind.value);
      if (kind?.$case === "cancel") {
        this.cancels.push(kind.value.id);
        if (sequences.delete(kind.value.id)) this.running -= 1;
      }
    });
    const timer = setInterval(() => this.#step(call, sequences), this.options.stepMs ?? 1);
    this.#timers.add(timer);
    const end = () => {
      this.#calls.delete(call);
      clearInterval(timer);
      this.#timers.delete(timer);
      this.running -= sequences.size;
      sequences.clear();
    };
    call.on("cancelled", end);
    call.on("error", end);
    call.on("end", () => {
      end();
      call.end();
    });
  }

  #open(call: Duplex, sequences: Map<number, Sequence>, open: Open): void {
    this.opens.push(open);
    const prompt = idsOf(open);
    const refusal = this.options.refusal ?? this.#refusal(open, prompt);
    if (refusal) {
      call.write({ chunks: [finished(open.id, refusal)] });
      return;
    }
    this.running += 1;
    const maxTokens = open.maxTokens || CONTEXT - prompt.length;
    sequences.set(open.id, {
      open: { ...open, maxTokens },
      prompt,
      ids: [...open.generated],
      sent: open.textSent,
      steps: 0,
      accepted: 0,
      isTold: false,
    });
  }

  #refusal(open: Open, prompt: number[]): Fault | undefined {
    if (this.running >= (this.options.capacity ?? 64)) return waiting("queue_full", "the queue is full: 0 are waiting");
    if (prompt.length + open.maxTokens > CONTEXT) {
      const detail = `this model's maximum context length is ${CONTEXT} tokens, but ${prompt.length} + ${open.maxTokens} were asked for`;
      return invalid("prompt", detail, "context_length_exceeded");
    }
    return undefined;
  }

  #step(call: Duplex, sequences: Map<number, Sequence>): void {
    const chunks: Chunk[] = [];
    for (const [id, sequence] of sequences) {
      const chunk = this.#advance(sequence);
      chunks.push(chunk);
      if (chunk.finish) {
        sequences.delete(id);
        this.running -= 1;
      }
      const { dieAfterTokens, faultAfterTokens } = this.options;
      if (faultAfterTokens && this.#tokensSent >= faultAfterTokens.tokens) {
        for (const open of sequences.keys()) chunks.push(finished(open, faultAfterTokens.fault));
        this.running -= sequences.size;
        sequences.clear();
      }
      if (dieAfterTokens !== undefined && this.#tokensSent >= dieAfterTokens) {
        // The last step reaches the gateway or not; either way the stream must go on right.
        call.write({ chunks }, () => this.kill());
        return;
      }
    }
    if (chunks.length > 0) call.write({ chunks });
  }

  #advance(sequence: Sequence): Chunk {
    const { open, prompt, ids } = sequence;
    const chunk: Chunk = { id: open.id, tokens: [], text: "", logprobs: [], margins: [] };
    if (!sequence.isTold) {
      sequence.isTold = true;
      const { revision = "r1", numericsId = "cpu-a" } = this.options;
      chunk.opened = { prompt, revision, numericsId };
    }
    const source = { ...open, prompt };
    let view = viewOf(ids, open, false);
    const width = 1 + (ids.length % (this.options.tokensPerStep ?? 1));
    for (let i = 0; i < width && !view.finish; i++) {
      const next = tokenAt(source, ids.length);
      const sawEos = next === EOS && !open.ignoreEos;
      if (!sawEos) {
        ids.push(next);
        chunk.tokens.push(next);
        if (open.logprobs > 0) chunk.logprobs.push(logprobOf(next, open.logprobs - 1));
        this.#tokensSent += 1;
      }
      view = viewOf(ids, open, sawEos);
    }
    if (chunk.tokens.length > 0) {
      sequence.steps += 1;
      sequence.accepted += chunk.tokens.length - 1;
    }
    chunk.text = view.text.slice(sequence.sent);
    sequence.sent = Math.max(sequence.sent, view.text.length);
    if (view.finish) {
      chunk.finish = {
        reason: view.finish === "stop" ? Finish_Reason.STOP : Finish_Reason.LENGTH,
        drafted: sequence.accepted,
        accepted: sequence.accepted,
        targetSteps: sequence.steps,
        stop: "",
        numericsChanged: this.hasMoved,
      };
    }
    return chunk;
  }
}

const chatIds = (messages: readonly { role: string; content: string }[]): number[] =>
  promptIds(messages.map(({ role, content }) => `<${role}>${content}`).join(""));

function idsOf(open: Open): number[] {
  switch (open.input?.$case) {
    case "text":
      return promptIds(open.input.value);
    case "chat":
      return chatIds(open.input.value.messages);
    case "prompt":
      return open.input.value.ids;
    default:
      return [];
  }
}

export const chatPromptIds = chatIds;

function logprobOf(id: number, best: number): TokenLogprob {
  const top = Array.from({ length: best }, (_, rank) => {
    const other = (id + rank) % VOCAB;
    return { id: other, logprob: -0.5 - rank, text: `${piece(other)}#${other}` };
  });
  return { logprob: -0.5, top, text: piece(id) };
}

const finished = (id: number, fault: Fault): Chunk => ({
  id,
  tokens: [],
  text: "",
  logprobs: [],
  margins: [],
  finish: {
    reason: Finish_Reason.FAULT,
    fault,
    drafted: 0,
    accepted: 0,
    targetSteps: 0,
    stop: "",
    numericsChanged: false,
  },
});

export const engineLost = lost("follower_lost", "rank 1 did not arrive");

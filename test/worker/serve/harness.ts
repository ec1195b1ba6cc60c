// A leader over the table engine and the nano tokenizer, and a gateway that reads what it sends.
import type { Chunk, Finish, Open, Sampling } from "../../../proto/gen/muster/v1/worker.ts";
import { Open as OpenMessage } from "../../../proto/gen/muster/v1/worker.ts";
import { type Followers, noFollowers } from "../../../worker/serve/followers.ts";
import { Leader } from "../../../worker/serve/leader.ts";
import { Outlet } from "../../../worker/serve/outlet.ts";
import { noSpeculator, type Speculator } from "../../../worker/spec/speculator.ts";
import { Tokenizer } from "../../../worker/token/tokenizer.ts";
import { TableEngine, type TableOptions } from "../schedule/table-engine.ts";

export const nanoSpec = {
  jsonPath: new URL("../../models/nano-maverick/tokenizer.json", import.meta.url).pathname,
  chatTemplate: "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}",
  bosToken: "<|begin_of_text|>",
  eosToken: "<|end_of_text|>",
  addBos: true,
  vocabHash: 1n,
};
export const tokenizer = await Tokenizer.load(nanoSpec);
export const EOS = 2043;

export const tableDefaults: TableOptions = {
  vocab: 2048,
  blocks: 200,
  blockTokens: 4,
  rowsMax: 16,
  tokensMax: 64,
  verifyMax: 4,
  slotsMax: 32,
  window: Number.POSITIVE_INFINITY,
};

export type Result = {
  prompt: number[];
  tokens: number[];
  text: string;
  /** [tokens so far, UTF-16 units sent so far] after each chunk: the points at which a gateway could resume. */
  cuts: [tokens: number, text: number][];
  chunks: Chunk[];
  finish: Finish;
};

export type LeaderSettings = Partial<TableOptions> & {
  runningMax?: number;
  queueMax?: number;
  lengthMax?: number;
  speculator?: Speculator;
  followers?: Followers;
  engine?: TableEngine;
};

export class Bench {
  readonly engine: TableEngine;
  readonly leader: Leader;
  readonly ended: Promise<void>;
  readonly outlet: Outlet;
  messages = 0;
  #ids = 0;
  #readers = new Map<number, (chunk: Chunk) => void>();

  constructor(settings: LeaderSettings = {}) {
    const {
      runningMax = 16,
      queueMax = 64,
      lengthMax = 400,
      speculator = noSpeculator,
      followers = noFollowers,
    } = settings;
    const options = { ...tableDefaults, ...settings };
    this.engine = settings.engine ?? new TableEngine(options);
    const { rowsMax, tokensMax, verifyMax, blockTokens, slotsMax, blocks, vocab } = options;
    this.leader = new Leader({
      engine: this.engine,
      tokenizer,
      speculator,
      followers,
      incarnation: 7n,
      revision: "r1",
      budget: { rowsMax, tokensMax, verifyMax, blockTokens, runningMax },
      limits: { vocabSize: vocab, lengthMax, lengthLimit: "context", logprobsMax: 21, stopIds: [EOS] },
      kvBlocks: blocks,
      slotsMax,
      queueMax,
    });
    this.outlet = this.newOutlet();
    this.ended = this.leader.run();
    this.ended.catch(() => {});
  }

  newOutlet(): Outlet {
    return new Outlet(({ chunks }) => {
      this.messages++;
      for (const chunk of chunks) this.#readers.get(chunk.id)?.(chunk);
    });
  }

  nextId(): number {
    return ++this.#ids;
  }

  /** Opens a request and reads it to its end; `onChunk` sees every chunk. */
  run(open: Partial<Open>, onChunk?: (chunk: Chunk) => void): Promise<Result> {
    const id = open.id ?? this.nextId();
    return new Promise((resolve) => {
      const result: Omit<Result, "finish"> = { prompt: [], tokens: [], text: "", cuts: [], chunks: [] };
      this.#readers.set(id, (chunk) => {
        result.chunks.push(chunk);
        if (chunk.opened) result.prompt = chunk.opened.prompt;
        result.tokens.push(...chunk.tokens);
        result.text += chunk.text;
        result.cuts.push([result.tokens.length, result.text.length]);
        if (chunk.finish) resolve({ ...result, finish: chunk.finish });
        onChunk?.(chunk);
      });
      void this.leader.open(this.outlet, OpenMessage.fromPartial({ ...open, id }));
    });
  }

  async stop(): Promise<void> {
    this.leader.stop();
    await this.ended;
  }
}

export const sampled = (temperature: number, more: Partial<Sampling> = {}): Sampling => ({
  temperature,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  ...more,
});

/** What must be equal however a request was served. */
export const answer = ({ prompt, tokens, text, finish }: Result) => ({
  prompt,
  tokens,
  text,
  reason: finish.reason,
  stop: finish.stop,
});

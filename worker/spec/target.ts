// The target's side of speculation: feeds a draft with what was committed, keeps the hints that come back, and hands the step
// loop what it may verify. Owns sessions and the hint table; owns no tokens and decides none.
//
//   T1  nothing a draft or the bus does (loss, duplicates, delay, garbage, death) can fail a step or make it wait longer than
//       waitMs; with the breaker open a step does not wait at all.
//   T2  one frame to the draft for each step, with all sessions in it; more only where one would be too large for the bus.
//   T3  a session that the draft does not know (restart, lost OPEN, gap) is opened again with its whole prefix: at once where
//       a step is waiting for it, but once in a step, so that a refusal costs no more than the step that asked.
import { randomBytes } from "node:crypto";
import { Frame, Hello, Nack_Reason } from "../../proto/gen/muster/v1/speculation.ts";
import { Breaker } from "./breaker.ts";
import type { Bus } from "./bus.ts";
import { HintTable } from "./hint-table.ts";
import { extendAll, type PrefixHash, rootHash } from "./prefix-hash.ts";
import type { SpeculatedSequence, Speculator } from "./speculator.ts";

/** A draft that was silent for this long is taken for dead. It says hello every 250 ms. */
const HELLO_MISSING_MS = 1_500;
/** A frame stays below the 1 MiB that a NATS server takes; what an OPEN or COMMIT needs at most is known without encoding it. */
const FRAME_BYTES_MAX = 1_000_000;
const TOKEN_BYTES_MAX = 5;
const BIAS_BYTES_MAX = 16;
const RECORD_BYTES_MAX = 256;
const SESSIONS_MAX = 4_096;

export type TargetOptions = {
  bus: Bus;
  pool: string;
  vocabHash: bigint;
  /** Tokens drafted for each target step. */
  draftTokens: number;
  /** Longest wait of a step for missing hints, milliseconds. */
  waitMs: number;
  now?: () => number;
};

type Session = {
  sequence: SpeculatedSequence;
  tokens: readonly number[];
  hash: PrefixHash;
  generation: number;
  /** What the draft was told: nothing yet, or how many of the tokens. */
  told: { kind: "nothing" } | { kind: "length"; length: number };
  isRefused: boolean;
  /** Handed out for the step that is not committed yet. */
  guesses: readonly number[];
  breaker: Breaker;
};

type Draft = { source: bigint; epoch: number; subject: string; seenMs: number };

export function createSpeculator(options: TargetOptions): Speculator {
  return new Target(options);
}

class Target implements Speculator {
  readonly #options: TargetOptions;
  readonly #now: () => number;
  readonly #source = randomBytes(8).readBigUInt64LE();
  readonly #hints = new HintTable();
  readonly #sessions = new Map<number, Session>();
  readonly #ends: (() => void)[];
  #draft: Draft | undefined;
  #closes: { session: number; generation: number }[] = [];
  #sequence = 0;
  /** The draft has said that it does not know a session. */
  #hasForgotten = false;
  #wake: (() => void) | undefined;
  #lastHintMs = Number.NEGATIVE_INFINITY;

  constructor(options: TargetOptions) {
    this.#options = options;
    this.#now = options.now ?? (() => performance.now());
    const own = `spec.v1.t.${this.#source.toString(16).padStart(16, "0")}`;
    this.#ends = [
      options.bus.subscribe(`spec.v1.pool.${options.pool}.hello`, (data) => this.#onHello(data)),
      options.bus.subscribe(`${own}.p`, (data) => this.#onFrame(data)),
    ];
  }

  get isUseful(): boolean {
    return this.#now() - this.#lastHintMs < HELLO_MISSING_MS;
  }

  open(sequence: SpeculatedSequence): void {
    if (this.#sessions.size >= SESSIONS_MAX) return;
    const root = rootHash(this.#options.vocabHash, sequence);
    this.#sessions.set(sequence.session, {
      sequence,
      tokens: sequence.tokens,
      hash: extendAll(root, sequence.tokens),
      generation: 0,
      told: { kind: "nothing" },
      isRefused: false,
      guesses: [],
      breaker: new Breaker(),
    });
  }

  commit(session: number, tokens: readonly number[], added: number): void {
    const known = this.#sessions.get(session);
    if (!known) return;
    if (known.guesses.length > 0) known.breaker.verified(matching(known.guesses, tokens, tokens.length - added));
    known.guesses = [];
    known.tokens = tokens;
    known.hash = extendAll(known.hash, tokens, tokens.length - added);
  }

  close(session: number): void {
    const known = this.#sessions.get(session);
    if (!known) return;
    this.#sessions.delete(session);
    if (known.told.kind === "length") this.#closes.push({ session, generation: known.generation });
  }

  async drafts(sessions: readonly number[]): Promise<number[][]> {
    this.#flush(sessions);
    const missing = () => sessions.filter((id) => this.#isMissing(id));
    const mayWait = new Map(sessions.map((id) => [id, this.#sessions.get(id)?.breaker.mayWait() ?? false]));
    const worthIt = missing().filter((id) => mayWait.get(id));
    if (worthIt.length > 0 && this.#liveDraft()) {
      this.#hasForgotten = false;
      let isAgain = false;
      await this.#waitUntil(() => {
        if (this.#hasForgotten && !isAgain) {
          isAgain = true;
          this.#flush(sessions);
        }
        return !worthIt.some((id) => this.#isMissing(id));
      });
      for (const id of worthIt) this.#sessions.get(id)?.breaker.waited(!this.#isMissing(id));
    }
    return sessions.map((id) => this.#take(id));
  }

  async stop(): Promise<void> {
    for (const id of [...this.#sessions.keys()]) this.close(id);
    this.#flush([]);
    for (const end of this.#ends) end();
    this.#wake?.();
  }

  #take(id: number): number[] {
    const session = this.#sessions.get(id);
    const hint = session && this.#hints.get(session.hash);
    if (!session || !hint || !session.breaker.mayVerify()) return [];
    const drafts = hint.slice(0, this.#options.draftTokens);
    session.guesses = drafts;
    return drafts;
  }

  #isMissing(id: number): boolean {
    const session = this.#sessions.get(id);
    return session !== undefined && !session.isRefused && this.#hints.get(session.hash) === undefined;
  }

  #liveDraft(): Draft | undefined {
    const draft = this.#draft;
    return draft && this.#options.bus.isConnected && this.#now() - draft.seenMs < HELLO_MISSING_MS ? draft : undefined;
  }

  async #waitUntil(isDone: () => boolean): Promise<void> {
    const deadline = this.#now() + this.#options.waitMs;
    while (!isDone()) {
      const left = deadline - this.#now();
      if (left <= 0) return;
      await new Promise<void>((wake) => {
        const timer = setTimeout(wake, left);
        this.#wake = () => {
          clearTimeout(timer);
          wake();
        };
      });
      this.#wake = undefined;
    }
  }

  #flush(sessions: readonly number[]): void {
    const draft = this.#liveDraft();
    if (!draft) return;
    const { publish, frame } = this.#frames(draft);
    frame().closes.push(...this.#closes);
    this.#closes = [];
    for (const id of sessions) {
      const session = this.#sessions.get(id);
      if (!session || session.isRefused) continue;
      this.#tell(id, session, frame);
    }
    publish();
  }

  /** What `frame` gives has room for so many bytes; a full one is published on the way. */
  #frames({ subject }: Draft) {
    const empty = () => Frame.create({ source: this.#source, epoch: 0, sequence: ++this.#sequence });
    let current = empty();
    let bytes = this.#closes.length * RECORD_BYTES_MAX;
    const publish = () => {
      if (current.opens.length + current.commits.length + current.closes.length === 0) return;
      this.#options.bus.publish(subject, Frame.encode(current).finish());
    };
    const frame = (more = 0) => {
      if (bytes > 0 && bytes + more > FRAME_BYTES_MAX) {
        publish();
        current = empty();
        bytes = 0;
      }
      bytes += more;
      return current;
    };
    return { publish, frame };
  }

  #tell(id: number, session: Session, frame: (bytes: number) => Frame): void {
    const { tokens, generation, hash, told } = session;
    const { draftTokens, vocabHash } = this.#options;
    const address = { session: id, generation, hashLow: hash.low, hashHigh: hash.high, draftTokens };
    if (told.kind === "length") {
      const news = tokens.slice(told.length);
      if (news.length === 0) return;
      frame(bytesOf(news.length)).commits.push({ ...address, base: told.length, tokens: news });
    } else {
      const { sampling, seedLow, seedHigh, generatedFrom } = session.sequence;
      const bytes = bytesOf(tokens.length) + sampling.logitBias.length * BIAS_BYTES_MAX;
      if (bytes > FRAME_BYTES_MAX) {
        session.isRefused = true;
        return;
      }
      const open = { ...address, tokens: [...tokens], sampling, seedLow, seedHigh, generatedFrom, vocabHash };
      frame(bytes).opens.push(open);
    }
    session.told = { kind: "length", length: tokens.length };
  }

  #onHello(data: Uint8Array): void {
    const hello = decoded(() => Hello.decode(data));
    if (!hello || hello.vocabHash !== this.#options.vocabHash || !/^spec\.v1\.d\.\w{1,32}\.c$/.test(hello.subject))
      return;
    const known = this.#draft;
    if (known && (known.source !== hello.source || known.epoch !== hello.epoch)) {
      // Another draft speaks for the pool. While the one in use is alive it stays; afterwards all sessions move over (T3).
      if (this.#now() - known.seenMs < HELLO_MISSING_MS && known.source !== hello.source) return;
      for (const session of this.#sessions.values()) this.#openAgain(session);
    }
    this.#draft = { source: hello.source, epoch: hello.epoch, subject: hello.subject, seenMs: this.#now() };
  }

  #onFrame(data: Uint8Array): void {
    const frame = decoded(() => Frame.decode(data));
    if (!frame) return;
    for (const hint of frame.hints) {
      if (hint.tokens.length === 0) continue;
      this.#hints.put({ low: hint.hashLow, high: hint.hashHigh }, hint.tokens.slice(0, this.#options.draftTokens));
      this.#lastHintMs = this.#now();
    }
    for (const nack of frame.nacks) {
      const session = this.#sessions.get(nack.session);
      if (!session || nack.generation !== session.generation) continue;
      if (nack.reason === Nack_Reason.FULL) session.isRefused = true;
      else this.#openAgain(session);
    }
    if (frame.hints.length + frame.nacks.length > 0) this.#wake?.();
  }

  #openAgain(session: Session): void {
    this.#hasForgotten = true;
    session.told = { kind: "nothing" };
    session.generation++;
    session.isRefused = false;
  }
}

const bytesOf = (tokens: number): number => RECORD_BYTES_MAX + tokens * TOKEN_BYTES_MAX;

/**
 * How many of the guesses came true. Counted on tokens, not on what was verified: a scheduler that had no room for the guesses
 * says nothing about the draft.
 */
function matching(guesses: readonly number[], tokens: readonly number[], from: number): number {
  const wrong = guesses.findIndex((id, index) => tokens[from + index] !== id);
  return wrong < 0 ? guesses.length : wrong;
}

/** What cannot be decoded is dropped: a stranger may write on the bus. */
function decoded<T>(decode: () => T): T | undefined {
  try {
    return decode();
  } catch {
    return undefined;
  }
}

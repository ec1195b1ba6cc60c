// The draft's side of speculation: keeps a copy of every session's prefix in its own engine, rolls a few tokens ahead with the
// request's own noise and publishes them under the hash of the prefix. One loop over all sessions: frames are folded in
// between rounds, a round rolls every session that moved.
//
//   D1  a commit that does not fit (unknown session, gap, other hash) changes nothing and is answered by a NACK.
//   D2  after a round the engine's slot holds the committed prefix again: what was guessed leaves no trace.
//   D3  sessions, frames and waits are bounded; a session without a word for LEASE_MS is dropped.
//   D4  guesses use temperature, penalties and bias of the request, but no top-k, top-p or min-p: filters would hide tokens
//       that the target may still choose.
//   D5  no frame, whoever wrote it, leads to a step that the engine refuses (draft-open.ts), or to a round without a step.
import { randomBytes } from "node:crypto";
import {
  type DraftCommit,
  type DraftOpen,
  Frame,
  Hello,
  type Hint,
  type Nack,
  Nack_Reason,
} from "../../proto/gen/muster/v1/speculation.ts";
import type { Row, SlotUpdate } from "../../proto/gen/muster/v1/worker.ts";
import type { Engine } from "../engine/engine.ts";
import { BlockPool } from "../kv/block-pool.ts";
import type { Bus } from "./bus.ts";
import { judgeOpen } from "./draft-open.ts";
import { equal, extendAll, type PrefixHash } from "./prefix-hash.ts";

const HELLO_MS = 250;
const LEASE_MS = 10_000;
const DRAFT_TOKENS_MAX = 16;
const TARGET_FRAMES_MAX = 256; // waiting to be folded in; older ones are dropped, a gap heals by NACK

export type DraftOptions = {
  bus: Bus;
  engine: Engine;
  pool: string;
  model: string;
  vocabHash: bigint;
  vocabSize: number;
  contextTokens: number;
  kvBlocks: number;
  kvBlockTokens: number;
  /** Tokens of one engine step. */
  tokensMax: number;
  rowsMax: number;
  /** Slots 1 to this one are used: at most one less than the engine's, whose slot 0 is padding. */
  sessionsMax: number;
};

type Session = {
  key: string;
  target: bigint;
  id: number;
  generation: number;
  slot: number;
  open: DraftOpen;
  tokens: number[];
  hash: PrefixHash;
  root: PrefixHash;
  draftTokens: number;
  blocks: number[];
  /** Tokens whose KV is valid in `blocks` and that the slot's ids agree with; the slot is opened again when they differ. */
  computed: number;
  isOpenInEngine: boolean;
  moved: boolean;
  heardMs: number;
};

export type DraftWorker = {
  readonly sessions: number;
  readonly rounds: number;
  /** Rejects when the engine fails. */
  readonly finished: Promise<void>;
  stop(): Promise<void>;
};

export function startDraft(options: DraftOptions): DraftWorker {
  return new Draft(options);
}

class Draft implements DraftWorker {
  readonly finished: Promise<void>;
  readonly #options: DraftOptions;
  readonly #source = randomBytes(8).readBigUInt64LE();
  readonly #epoch = randomBytes(4).readUInt32LE();
  readonly #subject: string;
  readonly #sessions = new Map<string, Session>();
  readonly #pool: BlockPool;
  readonly #freeSlots: number[];
  readonly #ends: (() => void)[];
  readonly #hello: NodeJS.Timeout;
  #inbox: Frame[] = [];
  #closing: number[] = []; // slots that the engine still has to close
  #step = 0n;
  #rounds = 0;
  #isStopped = false;
  #wake: (() => void) | undefined;

  constructor(options: DraftOptions) {
    this.#options = options;
    this.#pool = new BlockPool(options.kvBlocks);
    this.#freeSlots = Array.from({ length: options.sessionsMax }, (_, i) => options.sessionsMax - i); // slot 0 is padding
    this.#subject = `spec.v1.d.${this.#source.toString(16).padStart(16, "0")}.c`;
    this.#ends = [options.bus.subscribe(this.#subject, (data) => this.#receive(data))];
    this.#hello = setInterval(() => this.#sayHello(), HELLO_MS);
    this.#sayHello();
    this.finished = this.#run();
    this.finished.catch(() => {}); // whoever awaits it hears of it
  }

  get sessions(): number {
    return this.#sessions.size;
  }

  get rounds(): number {
    return this.#rounds;
  }

  async stop(): Promise<void> {
    this.#isStopped = true;
    clearInterval(this.#hello);
    for (const end of this.#ends) end();
    this.#wake?.();
    await this.finished.catch(() => {});
  }

  #sayHello(): void {
    const hello = Hello.create({
      source: this.#source,
      epoch: this.#epoch,
      model: this.#options.model,
      vocabHash: this.#options.vocabHash,
      sessionsFree: this.#freeSlots.length,
      subject: this.#subject,
    });
    this.#options.bus.publish(`spec.v1.pool.${this.#options.pool}.hello`, Hello.encode(hello).finish());
    const now = performance.now();
    for (const session of [...this.#sessions.values()]) if (now - session.heardMs > LEASE_MS) this.#drop(session);
  }

  #receive(data: Uint8Array): void {
    try {
      this.#inbox.push(Frame.decode(data));
    } catch {
      return; // not a frame
    }
    if (this.#inbox.length > TARGET_FRAMES_MAX) this.#inbox.shift();
    this.#wake?.();
  }

  async #run(): Promise<void> {
    while (!this.#isStopped) {
      this.#foldInbox();
      const moved = [...this.#sessions.values()].filter((s) => s.moved).slice(0, this.#options.rowsMax);
      if (moved.length > 0) await this.#round(moved);
      else if (this.#inbox.length === 0) {
        await new Promise<void>((wake) => {
          this.#wake = wake;
        });
        this.#wake = undefined;
      }
    }
  }

  #foldInbox(): void {
    const frames = this.#inbox;
    this.#inbox = [];
    for (const frame of frames) {
      const nacks: Nack[] = [];
      for (const open of frame.opens) this.#open(frame.source, open, nacks);
      for (const commit of frame.commits) this.#commit(frame.source, commit, nacks);
      for (const close of frame.closes) {
        const session = this.#sessions.get(`${frame.source}/${close.session}`);
        if (session) this.#drop(session);
      }
      if (nacks.length > 0) this.#answer(frame.source, [], nacks);
    }
  }

  #open(target: bigint, open: DraftOpen, nacks: Nack[]): void {
    const key = `${target}/${open.session}`;
    const refuse = (reason: Nack_Reason) => nacks.push({ session: open.session, generation: open.generation, reason });
    const known = this.#sessions.get(key);
    // A repeated OPEN of this generation is older than the commits that followed it.
    if (known && known.generation >= open.generation) return;
    const draftTokens = draftTokensOf(open.draftTokens);
    const verdict = judgeOpen(open, draftTokens, this.#options);
    if (verdict.kind === "refused") return void refuse(verdict.reason);
    if (known) this.#drop(known);
    const place = this.#takeSlot();
    if (place === undefined) return void refuse(Nack_Reason.FULL);
    this.#sessions.set(key, {
      ...place,
      key,
      target,
      id: open.session,
      generation: open.generation,
      open,
      tokens: open.tokens,
      hash: verdict.hash,
      root: verdict.root,
      draftTokens,
      blocks: [],
      computed: 0,
      moved: true,
      heardMs: performance.now(),
    });
  }

  // One that the engine still has to close is as good: a round closes an open slot before it opens it.
  #takeSlot(): { slot: number; isOpenInEngine: boolean } | undefined {
    const free = this.#freeSlots.pop();
    if (free !== undefined) return { slot: free, isOpenInEngine: false };
    const closing = this.#closing.pop();
    return closing === undefined ? undefined : { slot: closing, isOpenInEngine: true };
  }

  #commit(target: bigint, commit: DraftCommit, nacks: Nack[]): void {
    const refuse = (reason: Nack_Reason) =>
      nacks.push({ session: commit.session, generation: commit.generation, reason });
    const session = this.#sessions.get(`${target}/${commit.session}`);
    if (!session || session.generation !== commit.generation) return void refuse(Nack_Reason.UNKNOWN_SESSION);
    session.heardMs = performance.now();
    if (commit.base > session.tokens.length) return void refuse(Nack_Reason.GAP);
    const areIds = commit.tokens.every((id) => id < this.#options.vocabSize);
    if (!areIds || commit.base + commit.tokens.length === 0) return void refuse(Nack_Reason.HASH);
    const isAppend = commit.base === session.tokens.length;
    const tokens = isAppend ? session.tokens : session.tokens.slice(0, commit.base);
    const hash = extendAll(isAppend ? session.hash : extendAll(session.root, tokens), commit.tokens);
    if (!equal(hash, { low: commit.hashLow, high: commit.hashHigh })) return void refuse(Nack_Reason.HASH);
    tokens.push(...commit.tokens);
    session.tokens = tokens;
    session.hash = hash;
    // The last token is always computed anew, so that a commit without news still gets its hint.
    session.computed = Math.min(session.computed, commit.base, tokens.length - 1);
    session.draftTokens = draftTokensOf(commit.draftTokens);
    session.moved = true;
    if (tokens.length + session.draftTokens > this.#options.contextTokens) {
      this.#drop(session);
      refuse(Nack_Reason.FULL);
    }
  }

  #drop(session: Session): void {
    this.#sessions.delete(session.key);
    this.#pool.release(session.blocks, this.#step);
    if (session.isOpenInEngine) this.#closing.push(session.slot);
    else this.#freeSlots.push(session.slot);
  }

  /** Prefills what is new and rolls every given session `draftTokens` ahead; publishes the guesses. */
  async #round(sessions: Session[]): Promise<void> {
    this.#rounds++;
    const ready: Session[] = [];
    let updates: SlotUpdate[] = this.#closing.map((slot) => ({ slot, kind: { $case: "close", value: {} } }));
    this.#freeSlots.push(...this.#closing);
    this.#closing = [];
    let rows: Row[] = [];
    let budget = this.#options.tokensMax;
    for (const session of sessions) {
      const due = Math.min(session.tokens.length - session.computed, budget);
      if (due <= 0) continue;
      if (!this.#hold(session)) {
        this.#drop(session);
        this.#answer(
          session.target,
          [],
          [{ session: session.id, generation: session.generation, reason: Nack_Reason.FULL }],
        );
        continue;
      }
      if (session.isOpenInEngine) updates.push({ slot: session.slot, kind: { $case: "close", value: {} } });
      updates.push(openUpdate(session));
      session.isOpenInEngine = true;
      const isWhole = session.computed + due === session.tokens.length;
      rows.push(plainRow(session.slot, due, isWhole));
      budget -= due;
      session.computed += due;
      if (isWhole) {
        ready.push(session);
        session.moved = false;
      }
    }
    const guesses = new Map<Session, number[]>(ready.map((session) => [session, []]));
    const longest = Math.max(0, ...ready.map((session) => session.draftTokens));
    for (let depth = 0; depth < Math.max(1, longest) && (rows.length > 0 || updates.length > 0); depth++) {
      const result = await this.#options.engine.launch({ step: ++this.#step, updates, rows, incarnation: 0n });
      this.#pool.completed(this.#step);
      const bySlot = new Map(result.rows.map((row) => [row.slot, row.tokens]));
      for (const [session, tokens] of guesses) tokens.push(...(bySlot.get(session.slot) ?? []));
      updates = [];
      rows = [...guesses]
        .filter(([session, tokens]) => tokens.length === depth + 1 && tokens.length < session.draftTokens)
        .map(([session]) => plainRow(session.slot, 1, true));
    }
    this.#publish(guesses);
  }

  /** Blocks for the prefix and the guesses; false where the pool has too few. */
  #hold(session: Session): boolean {
    const tokens = session.tokens.length + session.draftTokens;
    const missing = Math.ceil(tokens / this.#options.kvBlockTokens) - session.blocks.length;
    if (missing <= 0) return true;
    const blocks = this.#pool.reserve(missing);
    if (blocks) session.blocks.push(...blocks);
    return blocks !== undefined;
  }

  #publish(guesses: Map<Session, number[]>): void {
    const byTarget = new Map<bigint, Hint[]>();
    for (const [session, tokens] of guesses) {
      if (tokens.length === 0) continue;
      const hints = byTarget.get(session.target) ?? [];
      const { low, high } = session.hash;
      hints.push({ session: session.id, generation: session.generation, hashLow: low, hashHigh: high, tokens });
      byTarget.set(session.target, hints);
    }
    for (const [target, hints] of byTarget) this.#answer(target, hints, []);
  }

  #answer(target: bigint, hints: Hint[], nacks: Nack[]): void {
    const frame = Frame.create({ source: this.#source, epoch: this.#epoch, hints, nacks });
    this.#options.bus.publish(`spec.v1.t.${target.toString(16).padStart(16, "0")}.p`, Frame.encode(frame).finish());
  }
}

const draftTokensOf = (asked: number): number => Math.max(1, Math.min(asked, DRAFT_TOKENS_MAX));

function openUpdate(session: Session): SlotUpdate {
  const { seedLow, seedHigh, sampling, generatedFrom } = session.open;
  return {
    slot: session.slot,
    kind: {
      $case: "open",
      value: {
        ids: [...session.tokens],
        generatedFrom,
        seedLow,
        seedHigh,
        sampling: sampling && { ...sampling, topK: 0, topP: 1, minP: 0 },
        computed: session.computed,
        blocks: [...session.blocks],
      },
    },
  };
}

const plainRow = (slot: number, count: number, sample: boolean): Row => ({
  slot,
  count,
  drafts: [],
  sample,
  logprobs: 0,
  logits: false,
  margins: false,
});

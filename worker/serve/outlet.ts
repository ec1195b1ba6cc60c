// Where the chunks of the gateway streams are gathered, so that a step leaves as one message for each stream.
//
//   O1  a message has one chunk for each id, so that a reader need not ask which of two comes first.
//   O2  beginnings and ends leave at once. Other chunks may wait, at most `paceMs` after the last message: where steps take less
//       than that, what a message costs leader, gateway and client is more than the step, and nobody reads so fast.
import type { Chunk, SubmitResponse } from "../../proto/gen/muster/v1/worker.ts";
import type { Sequence } from "./sequence.ts";

/** What an id of a stream is: "opening" while its prompt is tokenised, "cancelled" when that should lead nowhere. */
export type Entry = Sequence | "opening" | "cancelled";

/** One gateway stream. */
export class Outlet {
  readonly entries = new Map<number, Entry>();
  readonly #send: (response: SubmitResponse) => void;
  readonly #paceMs: number;
  #chunks: Chunk[] = [];
  /** The newest chunk of each id among them. */
  readonly #newest = new Map<number, Chunk>();
  #isUrgent = false;
  #sentMs = Number.NEGATIVE_INFINITY;
  #timer: NodeJS.Timeout | undefined;
  #isClosed = false;

  get isClosed(): boolean {
    return this.#isClosed;
  }

  constructor(send: (response: SubmitResponse) => void, paceMs = 0) {
    this.#send = send;
    this.#paceMs = paceMs;
  }

  /** Nothing runs and nothing waits to be sent. */
  get isQuiet(): boolean {
    return this.entries.size === 0 && this.#chunks.length === 0;
  }

  /** A chunk with a finish is the last of its id. */
  push(chunk: Chunk): void {
    if (chunk.finish !== undefined) this.entries.delete(chunk.id);
    if (this.#isClosed) return;
    this.#isUrgent ||= chunk.finish !== undefined || chunk.opened !== undefined;
    const before = this.#newest.get(chunk.id);
    // An id may come again after its finish.
    if (before !== undefined && before.finish === undefined) append(before, chunk);
    else {
      this.#newest.set(chunk.id, chunk);
      this.#chunks.push(chunk);
    }
  }

  flush(): void {
    if (this.#chunks.length === 0) return;
    const waitMs = this.#paceMs === 0 || this.#isUrgent ? 0 : this.#sentMs + this.#paceMs - performance.now();
    if (waitMs > 0) this.#timer ??= setTimeout(() => this.#sendAll(), waitMs);
    else this.#sendAll();
  }

  /** Nothing is sent any more. */
  close(): void {
    this.#isClosed = true;
    this.#clear();
  }

  #sendAll(): void {
    const chunks = this.#chunks;
    this.#clear();
    if (this.#paceMs > 0) this.#sentMs = performance.now();
    this.#send({ chunks });
  }

  #clear(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#chunks = [];
    this.#newest.clear();
    this.#isUrgent = false;
  }
}

function append(to: Chunk, { tokens, text, logprobs, margins, finish }: Chunk): void {
  to.tokens.push(...tokens);
  to.text += text;
  to.logprobs.push(...logprobs);
  to.margins.push(...margins);
  to.finish = finish;
}

/** All streams of a leader, and which of them have something to send. */
export class Outlets {
  readonly all = new Set<Outlet>();
  readonly #dirty = new Set<Outlet>();
  #isQueued = false;

  push(outlet: Outlet, chunk: Chunk): void {
    outlet.push(chunk);
    this.#dirty.add(outlet);
  }

  /** What was pushed outside a step leaves soon, together with what else this turn of the event loop brings. */
  flushSoon(): void {
    if (this.#isQueued) return;
    this.#isQueued = true;
    setImmediate(() => {
      this.#isQueued = false;
      this.flush();
    });
  }

  flush(): void {
    // Cleared first: whoever reads may cancel at once, and that pushes again.
    const dirty = [...this.#dirty];
    this.#dirty.clear();
    for (const outlet of dirty) outlet.flush();
  }

  close(outlet: Outlet): void {
    outlet.close();
    outlet.entries.clear();
    this.all.delete(outlet);
    this.#dirty.delete(outlet);
  }
}

// Where the chunks of the gateway streams are gathered, so that a step leaves as one message for each stream.
import type { Chunk, SubmitResponse } from "../../proto/gen/muster/v1/worker.ts";
import type { Sequence } from "./sequence.ts";

/** What an id of a stream is: "opening" while its prompt is tokenised, "cancelled" when that should lead nowhere. */
export type Entry = Sequence | "opening" | "cancelled";

/** One gateway stream. */
export class Outlet {
  readonly entries = new Map<number, Entry>();
  readonly #send: (response: SubmitResponse) => void;
  #chunks: Chunk[] = [];
  #isClosed = false;

  get isClosed(): boolean {
    return this.#isClosed;
  }

  constructor(send: (response: SubmitResponse) => void) {
    this.#send = send;
  }

  /** Nothing runs and nothing waits to be sent. */
  get isQuiet(): boolean {
    return this.entries.size === 0 && this.#chunks.length === 0;
  }

  /** A chunk with a finish is the last of its id. */
  push(chunk: Chunk): void {
    if (chunk.finish !== undefined) this.entries.delete(chunk.id);
    if (!this.#isClosed) this.#chunks.push(chunk);
  }

  flush(): void {
    if (this.#chunks.length === 0) return;
    const chunks = this.#chunks;
    this.#chunks = [];
    this.#send({ chunks });
  }

  /** Nothing is sent any more. */
  close(): void {
    this.#isClosed = true;
    this.#chunks = [];
  }
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

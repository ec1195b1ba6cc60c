// The open watches of the simulated API server. Owns streams, bookmarks and their ends, not objects.
//
//   R1  a stream has every change after its version that its selection sees, in order, once.
//   R2  an object that enters or leaves a selection is ADDED or DELETED there, whatever happened to it.
//   R3  a bookmark says a version up to which everything has been sent.
import { KubeError, type Resource, type WatchLine, type WatchOptions } from "../../controller/kube/api/client.ts";
import type { Change, ObjectLog } from "./object-log.ts";
import { selectorOf } from "./selector.ts";
import type { VirtualTime } from "./virtual-time.ts";

/** A reader this far behind is cut off, as by the real server. */
const LINES_MAX = 100_000;

type Watcher = {
  resource: Resource;
  after: number;
  toLine: (change: Change) => WatchLine | undefined;
  lines: WatchLine[];
  end: { error: KubeError | undefined } | undefined;
  wake: () => void;
};

export class Watchers {
  readonly #open = new Set<Watcher>();
  readonly #time: VirtualTime;
  readonly #log: ObjectLog;
  readonly #bookmarkEveryMs: number;

  constructor(time: VirtualTime, log: ObjectLog, bookmarkEveryMs: number) {
    this.#time = time;
    this.#log = log;
    this.#bookmarkEveryMs = bookmarkEveryMs;
  }

  get openCount(): number {
    return this.#open.size;
  }

  tell(change: Change): void {
    for (const watcher of this.#open) {
      if (watcher.resource.plural !== change.resource.plural || watcher.resource.group !== change.resource.group)
        continue;
      const line = watcher.toLine(change);
      if (line !== undefined) this.#send(watcher, line);
    }
  }

  /** Every stream breaks, as where the server dies. */
  drop(detail = "the connection was lost"): void {
    for (const watcher of this.#open) {
      watcher.end = { error: new KubeError(0, "Unreachable", detail) };
      watcher.wake();
    }
  }

  async *stream(resource: Resource, options: WatchOptions, signal: AbortSignal): AsyncGenerator<WatchLine> {
    const from =
      options.resourceVersion === "" || options.resourceVersion === "0" ? undefined : Number(options.resourceVersion);
    if (from !== undefined && !(from >= 0))
      throw new KubeError(400, "BadRequest", `not a version: ${options.resourceVersion}`);
    if (from !== undefined && from < this.#log.compacted) {
      yield { type: "ERROR", error: new KubeError(410, "Expired", `too old resource version: ${from}`) };
      return;
    }
    const watcher = this.#begin(resource, options, from);
    try {
      yield* this.#drain(watcher, options.timeoutSeconds * 1000, signal);
    } finally {
      this.#open.delete(watcher);
    }
  }

  /** Takes what there is and listens from then on, in one moment: nothing falls between (R1). */
  #begin(resource: Resource, options: WatchOptions, from: number | undefined): Watcher {
    const isSelected = selectorOf(options);
    const toLine = lineOf(isSelected);
    const after = from ?? 0;
    const watcher: Watcher = {
      resource,
      // From a version that is yet to come there is nothing until then, and no error: as the real server has it.
      toLine: (change) => (change.version > after ? toLine(change) : undefined),
      after,
      lines: [],
      end: undefined,
      wake: () => {},
    };
    if (from === undefined) {
      for (const object of this.#log.snapshot(resource, this.#log.version)) {
        if (isSelected(object)) watcher.lines.push({ type: "ADDED", object });
      }
    } else {
      for (const change of this.#log.since(resource, from)) {
        const line = watcher.toLine(change);
        if (line !== undefined) watcher.lines.push(line);
      }
    }
    this.#open.add(watcher);
    return watcher;
  }

  async *#drain(watcher: Watcher, timeoutMs: number, signal: AbortSignal): AsyncGenerator<WatchLine> {
    const wakes: (() => void)[] = [];
    const endMs = this.#time.nowMs() + timeoutMs;
    const onEnd = () => {
      watcher.end ??= { error: undefined };
      watcher.wake();
    };
    wakes.push(this.#time.at(endMs, onEnd));
    let stopBookmarks = this.#bookmarkLater(watcher);
    const onAbort = () => watcher.wake();
    signal.addEventListener("abort", onAbort, { once: true });
    try {
      for (;;) {
        signal.throwIfAborted();
        const line = watcher.lines.shift();
        if (line !== undefined) {
          stopBookmarks();
          stopBookmarks = this.#bookmarkLater(watcher);
          yield line;
        } else if (watcher.end !== undefined) {
          if (watcher.end.error !== undefined) throw watcher.end.error;
          if (this.#log.version >= watcher.after) yield this.#bookmark();
          return;
        } else {
          await new Promise<void>((wake) => {
            watcher.wake = wake;
          });
        }
      }
    } finally {
      stopBookmarks();
      for (const cancel of wakes) cancel();
      signal.removeEventListener("abort", onAbort);
    }
  }

  #bookmarkLater(watcher: Watcher): () => void {
    return this.#time.at(this.#time.nowMs() + this.#bookmarkEveryMs, () => {
      if (this.#log.version >= watcher.after) this.#send(watcher, this.#bookmark());
    });
  }

  /** Whatever is older stands before it in the queue (R3). */
  #bookmark(): WatchLine {
    return { type: "BOOKMARK", resourceVersion: String(this.#log.version) };
  }

  #send(watcher: Watcher, line: WatchLine): void {
    watcher.lines.push(line);
    if (watcher.lines.length > LINES_MAX)
      watcher.end ??= { error: new KubeError(0, "Unreachable", "reader is too slow") };
    watcher.wake();
  }
}

function lineOf(isSelected: (object: Change["object"]) => boolean): (change: Change) => WatchLine | undefined {
  return ({ before, after, object }) => {
    const was = before !== undefined && isSelected(before);
    const is = after !== undefined && isSelected(after);
    if (is) return { type: was ? "MODIFIED" : "ADDED", object };
    return was ? { type: "DELETED", object } : undefined;
  };
}

// Keeps a store like the server's objects of one kind: list, watch, resume, begin anew. Owns where it stands in the server's
// history and when to try again; it never ends but by its signal.
//
//   R1  once the server answers and stays calm, the store comes to be what the server has.
//   R2  after a failure it goes on from the last version it knows; it lists again only where the server says that this version
//       is gone, or nothing has come of it REFUSALS_MAX times in a row: a server restored from a backup is behind it, and says
//       so by 504 or not at all (such a watch is silent, without bookmarks, until the server has caught up).
//   R3  between two attempts that brought nothing there is a back-off with jitter, and at least what the server asked for.
//   R4  a stream that is silent for `idleMs` is dead, whatever its socket says: bookmarks come once a minute.
import { type KubeApi, KubeError, type KubeObject, type Resource, type Selection } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { backoffMs } from "../api/rate-limit.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";
import type { Store } from "./store.ts";

export type ReflectorLimits = {
  pageSize: number;
  /** The server ends a watch after this, and up to as long again by half: not all of them at once. */
  watchSeconds: number;
  idleMs: number;
  backoff: { baseMs: number; maxMs: number };
  /** A watch that lived this long was no failure, even if nothing came. */
  settledMs: number;
};

export const defaultReflectorLimits: ReflectorLimits = {
  pageSize: 500,
  watchSeconds: 290,
  idleMs: 150_000,
  backoff: { baseMs: 200, maxMs: 30_000 },
  settledMs: 5_000,
};

const REFUSALS_MAX = 2;
/** A stream that brought something before it broke counts as this many failures at most: it is worth another soon. */
const PROGRESS_FAILURES = 1;
/** Lists whose pages grow too old before the last one: then it is read in one piece. */
const PAGED_TRIES_MAX = 2;

export type ReflectorOptions = Selection & {
  api: KubeApi;
  resource: Resource;
  store: Store;
  clock: Clock;
  /** In [0, 1). */
  random: () => number;
  limits?: Partial<ReflectorLimits>;
  metrics?: KubeMetrics;
};

export class Reflector {
  readonly #options: ReflectorOptions;
  readonly #limits: ReflectorLimits;
  readonly #selection: Selection;
  /** Where to go on from; undefined: list. */
  #version: string | undefined;
  /** Attempts in a row that brought nothing. */
  #failures = 0;
  /** Of those, watches at one version. */
  #refusals = 0;
  #pagedTries = 0;
  /** Whether the last watch brought anything. */
  #hasProgressed = false;
  #trouble: KubeError | undefined;

  constructor(options: ReflectorOptions) {
    this.#options = options;
    this.#limits = { ...defaultReflectorLimits, ...options.limits };
    const { namespace, labelSelector, fieldSelector } = options;
    this.#selection = {
      ...(namespace === undefined ? {} : { namespace }),
      ...(labelSelector === undefined ? {} : { labelSelector }),
      ...(fieldSelector === undefined ? {} : { fieldSelector }),
    };
  }

  /** Why it is not up to date, undefined while it is; for status. */
  get trouble(): KubeError | undefined {
    return this.#trouble;
  }

  /** Resolves when aborted. */
  async run(signal: AbortSignal): Promise<void> {
    const { metrics, resource, store, clock } = this.#options;
    const labels = { resource: resource.plural };
    const lag = () => (clock.nowMs() - (store.heardMs ?? clock.nowMs())) / 1000;
    const unmeter = [
      metrics?.gauge("muster_kube_watch_lag_seconds", labels, lag),
      metrics?.gauge("muster_kube_store_objects", labels, () => store.size),
    ];
    while (!signal.aborted) {
      try {
        if (this.#version === undefined) this.#version = await this.#list(signal);
        await this.#watch(this.#version, signal);
      } catch (error) {
        if (signal.aborted) break;
        if (!(error instanceof KubeError)) throw error;
        await this.#recover(error, signal);
      }
    }
    for (const take of unmeter) take?.();
  }

  /** Reads every page, then replaces the store at once. */
  async #list(signal: AbortSignal): Promise<string> {
    const { api, resource, store, clock, metrics } = this.#options;
    const isPaged = this.#pagedTries < PAGED_TRIES_MAX;
    const objects: KubeObject[] = [];
    let next = "";
    let version = "";
    do {
      const paging = { ...(isPaged ? { limit: this.#limits.pageSize } : {}), ...(next ? { continue: next } : {}) };
      if (next) this.#pagedTries += 1;
      const page = await api.list(resource, { ...this.#selection, ...paging }, signal);
      if (next) this.#pagedTries -= 1;
      store.heard(clock.nowMs());
      // Nothing more of it, from the first page on: 100,000 pods as they come are more than a gigabyte.
      for (const object of page.items) objects.push(store.kept(object));
      version = page.resourceVersion;
      next = page.continue;
    } while (next !== "");
    this.#pagedTries = 0;
    store.replace(objects, version);
    metrics?.count("muster_kube_lists_total", { resource: resource.plural });
    return version;
  }

  /** Resolves when the watch has ended in an orderly way; throws for every other end. */
  async #watch(from: string, signal: AbortSignal): Promise<void> {
    const { api, resource, clock, random, metrics, store } = this.#options;
    metrics?.count("muster_kube_watches_total", { resource: resource.plural });
    const timeoutSeconds = Math.round(this.#limits.watchSeconds * (1 + random() / 2));
    this.#hasProgressed = false;
    const begunMs = clock.nowMs();
    const dog = new Watchdog(clock, this.#limits.idleMs, `watch of ${resource.plural}`);
    const stop = AbortSignal.any([signal, dog.signal]);
    try {
      const options = { ...this.#selection, resourceVersion: from, timeoutSeconds };
      for await (const line of api.watch(resource, options, stop)) {
        if (line.type === "ERROR") throw line.error;
        dog.feed();
        store.heard(clock.nowMs());
        if (line.type === "BOOKMARK") this.#version = line.resourceVersion;
        else {
          if (line.type === "DELETED") store.remove(line.object);
          else store.put(line.object);
          this.#version = line.object.metadata.resourceVersion ?? this.#version;
        }
        this.#hasProgressed = true;
        this.#refusals = 0;
        this.#trouble = undefined;
      }
      if (this.#version === from && clock.nowMs() - begunMs < this.#limits.settledMs) {
        throw new KubeError(0, "ShortWatch", `watch of ${resource.plural}: it ended before it had begun`);
      }
      if (!this.#hasProgressed)
        throw new KubeError(0, "Idle", `watch of ${resource.plural}: nothing came, not even a bookmark`);
      this.#settle();
    } catch (error) {
      if (clock.nowMs() - begunMs >= this.#limits.settledMs) this.#failures = 0;
      // The watchdog's reason, where a transport wraps it into something of its own.
      throw dog.signal.aborted && !signal.aborted ? dog.signal.reason : error;
    } finally {
      dog.end();
    }
  }

  #settle(): void {
    this.#failures = 0;
    this.#refusals = 0;
    this.#trouble = undefined;
  }

  async #recover(error: KubeError, signal: AbortSignal): Promise<void> {
    const { clock, random, metrics, resource } = this.#options;
    metrics?.count("muster_kube_watch_failures_total", { resource: resource.plural, reason: error.reason });
    this.#trouble = error;
    if (this.#hasProgressed && error.code !== 410) this.#failures = Math.min(this.#failures, PROGRESS_FAILURES);
    this.#hasProgressed = false;
    this.#failures += 1;
    if (isAboutVersion(error)) this.#refusals += 1;
    if (error.code === 410 || this.#refusals > REFUSALS_MAX) {
      this.#version = undefined;
      this.#refusals = 0;
    }
    const waitMs = Math.max(backoffMs(this.#failures, this.#limits.backoff, random), error.retryAfterMs ?? 0);
    await clock.sleep(signal, clock.nowMs() + waitMs);
  }
}

/** Might be because of where we want to go on from; a server that is away or busy says nothing about that. */
function isAboutVersion({ code, reason }: KubeError): boolean {
  return code === 504 || reason === "Idle" || (code >= 400 && code < 500 && code !== 429);
}

/** Aborts its signal when it has not been fed for a while. */
class Watchdog {
  readonly #stop = new AbortController();
  readonly #end = new AbortController();
  readonly #clock: Clock;
  #fedMs: number;

  constructor(clock: Clock, idleMs: number, what: string) {
    this.#clock = clock;
    this.#fedMs = clock.nowMs();
    void this.#guard(idleMs, what);
  }

  get signal(): AbortSignal {
    return this.#stop.signal;
  }

  feed(): void {
    this.#fedMs = this.#clock.nowMs();
  }

  end(): void {
    this.#end.abort();
  }

  async #guard(idleMs: number, what: string): Promise<void> {
    while (!this.#end.signal.aborted) {
      await this.#clock.sleep(this.#end.signal, this.#fedMs + idleMs);
      if (this.#end.signal.aborted || this.#clock.nowMs() < this.#fedMs + idleMs) continue;
      this.#stop.abort(new KubeError(0, "Idle", `${what}: nothing was heard for ${idleMs} ms`));
      return;
    }
  }
}

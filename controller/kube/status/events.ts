// Tells people what happened, as Events of events.k8s.io/v1 beside the object it happened to. Owns aggregation and rates;
// what is worth telling is the caller's. Best effort: nobody waits for an event and none is told twice.
//
//   V1  the same event again (object, type, reason, action, note) within `seriesMs` is counted in the first one's series.
//   V2  a series is written at most every `seriesEveryMs`; its last count is written before it is forgotten.
//   V3  one object has at most `perObject` new events, all together `overall`; beyond that they are dropped and counted.
//   V4  at most PENDING_MAX wait; a write is tried TRIES_MAX times.
import { isAlreadyThere, isTransient, type KubeApi, KubeError, type KubeObject } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { Deadlines } from "../api/deadlines.ts";
import { backoffMs, type Rate, TokenBucket } from "../api/rate-limit.ts";
import { events } from "../api/resources.ts";
import { microTimeOf } from "../api/wire.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";

export type Happening = {
  type: "Normal" | "Warning";
  /** CamelCase, for machines. */
  reason: string;
  /** What the controller did or tried. */
  action: string;
  /** For people: what, why, what to do. */
  note: string;
};

export type EventLimits = { seriesMs: number; seriesEveryMs: number; perObject: Rate; overall: Rate };

export const defaultEventLimits: EventLimits = {
  seriesMs: 360_000,
  seriesEveryMs: 60_000,
  perObject: { perSecond: 1 / 30, burst: 20 },
  overall: { perSecond: 10, burst: 100 },
};

export type RecorderOptions = {
  api: KubeApi;
  clock: Clock;
  random: () => number;
  /** "muster.dev/controller". */
  controller: string;
  /** This process. */
  instance: string;
  limits?: Partial<EventLimits>;
  metrics?: KubeMetrics;
};

/** The server's own bounds. */
const NOTE_BYTES_MAX = 1024;
const NAME_MAX = 253;
const PENDING_MAX = 1_000;
const TRIES_MAX = 4;
const BACKOFF = { baseMs: 500, maxMs: 10_000 };
/** Objects whose rates are remembered. */
const OBJECTS_MAX = 10_000;

type Series = {
  event: KubeObject;
  count: number;
  lastMs: number;
  /** The count that the server has. */
  told: number;
  toldMs: number;
  tries: number;
};

export class EventRecorder {
  readonly #options: RecorderOptions;
  readonly #limits: EventLimits;
  readonly #overall: TokenBucket;
  readonly #perObject = new Map<string, TokenBucket>();
  readonly #series = new Map<string, Series>();
  /** Which series has to be written when. */
  readonly #due = new Deadlines();
  #wake = new AbortController();
  #serial = 0;

  constructor(options: RecorderOptions) {
    this.#options = options;
    this.#limits = { ...defaultEventLimits, ...options.limits };
    this.#overall = new TokenBucket(this.#limits.overall, options.clock.nowMs());
  }

  /** To be called once for each change, after the status that shows it has been written. */
  record(object: KubeObject, happening: Happening): void {
    const nowMs = this.#options.clock.nowMs();
    const key = JSON.stringify([object.metadata.uid, ...Object.values(trimmed(happening))]);
    const known = this.#series.get(key);
    if (known !== undefined && nowMs - known.lastMs < this.#limits.seriesMs) {
      known.count += 1;
      known.lastMs = nowMs;
      this.#count("aggregated");
      this.#schedule(key, Math.max(nowMs, known.toldMs + this.#limits.seriesEveryMs));
      return;
    }
    if (this.#due.size >= PENDING_MAX || !this.#bucketOf(object, nowMs).take(nowMs) || !this.#overall.take(nowMs)) {
      this.#count("dropped");
      return;
    }
    const event = this.#eventOf(object, trimmed(happening), nowMs);
    this.#series.delete(key);
    this.#series.set(key, { event, count: 1, lastMs: nowMs, told: 0, toldMs: Number.NEGATIVE_INFINITY, tries: 0 });
    this.#due.delete(key);
    this.#schedule(key, nowMs);
  }

  /** Writes until aborted. What waits then is not written. */
  async run(signal: AbortSignal): Promise<void> {
    const { clock } = this.#options;
    while (!signal.aborted) {
      this.#wake = new AbortController();
      const due = this.#due.take(clock.nowMs());
      if (due !== undefined) await this.#write(due.key, signal);
      else await clock.sleep(AbortSignal.any([signal, this.#wake.signal]), this.#due.nextMs());
      this.#forgetOld(clock.nowMs());
    }
  }

  async #write(key: string, signal: AbortSignal): Promise<void> {
    const series = this.#series.get(key);
    if (series === undefined || series.told === series.count) return;
    const { clock, random } = this.#options;
    const { count } = series;
    try {
      await this.#send(series, signal);
      series.told = count;
      series.toldMs = clock.nowMs();
      series.tries = 0;
      this.#count("sent");
      if (series.count > count) this.#schedule(key, series.toldMs + this.#limits.seriesEveryMs);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof KubeError)) throw error;
      series.tries += 1;
      if (isTransient(error) && series.tries < TRIES_MAX) {
        const waitMs = Math.max(backoffMs(series.tries, BACKOFF, random), error.retryAfterMs ?? 0);
        this.#schedule(key, clock.nowMs() + waitMs);
      } else {
        this.#series.delete(key);
        this.#count("dropped");
      }
    }
  }

  async #send(series: Series, signal: AbortSignal): Promise<void> {
    const { api } = this.#options;
    const { name, namespace } = series.event.metadata;
    const last = microTimeOf(series.lastMs);
    if (series.told > 0) {
      const body = { series: { count: series.count, lastObservedTime: last } };
      await api.patch(events, name, namespace, body, { type: "merge" }, signal);
      return;
    }
    const counted = series.count > 1 ? { series: { count: series.count, lastObservedTime: last } } : {};
    try {
      await api.create(events, { ...series.event, ...counted }, signal);
    } catch (error) {
      // An answer of ours was lost: it is there.
      if (!isAlreadyThere(error)) throw error;
    }
  }

  #eventOf(object: KubeObject, happening: Happening, nowMs: number): KubeObject {
    const { controller, instance } = this.#options;
    const { name, namespace, uid, resourceVersion } = object.metadata;
    this.#serial += 1;
    const suffix = `.${Math.floor(nowMs).toString(16)}${this.#serial.toString(16).padStart(4, "0")}`;
    return {
      apiVersion: "events.k8s.io/v1",
      kind: "Event",
      metadata: { name: `${name.slice(0, NAME_MAX - suffix.length)}${suffix}`, namespace: namespace ?? "default" },
      eventTime: microTimeOf(nowMs),
      reportingController: controller,
      reportingInstance: instance.slice(0, 128),
      regarding: { apiVersion: object.apiVersion, kind: object.kind, name, namespace, uid, resourceVersion },
      ...happening,
    };
  }

  #bucketOf(object: KubeObject, nowMs: number): TokenBucket {
    const uid = object.metadata.uid ?? object.metadata.name;
    const known = this.#perObject.get(uid) ?? new TokenBucket(this.#limits.perObject, nowMs);
    // Anew, so that the object longest without an event is forgotten first.
    this.#perObject.delete(uid);
    this.#perObject.set(uid, known);
    const [oldest] = this.#perObject.keys();
    if (this.#perObject.size > OBJECTS_MAX && oldest !== undefined) this.#perObject.delete(oldest);
    return known;
  }

  #schedule(key: string, atMs: number): void {
    if (this.#due.has(key)) return;
    this.#due.set(key, atMs);
    this.#wake.abort();
  }

  #forgetOld(nowMs: number): void {
    for (const [key, series] of this.#series) {
      const isOver = nowMs - series.lastMs >= this.#limits.seriesMs && !this.#due.has(key);
      if (isOver) this.#series.delete(key);
      else if (this.#series.size <= OBJECTS_MAX) break;
    }
  }

  #count(outcome: "sent" | "aggregated" | "dropped"): void {
    this.#options.metrics?.count("muster_events_total", { outcome });
  }
}

/** Within the server's bounds, on a whole character. */
function trimmed({ type, reason, action, note }: Happening): Happening {
  const bytes = Buffer.from(note, "utf8");
  const short =
    bytes.length <= NOTE_BYTES_MAX
      ? note
      : `${bytes
          .subarray(0, NOTE_BYTES_MAX - 6)
          .toString("utf8")
          .replace(/\uFFFD$/, "")}…`;
  return { type, reason: reason.slice(0, 128), action: action.slice(0, 128), note: short };
}

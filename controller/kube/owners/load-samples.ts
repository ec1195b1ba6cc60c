// What is asked of each deployment and what it gives, as the autoscaler wants it: one sample every SAMPLE_MS from the gateways'
// Demand streams and the leaders' reports. Owns the sums and the history; decides nothing.
//
//   S1  a sample is made only while a gateway reports: what nobody can see is not a load of zero.
//   S2  a history holds HISTORY_MS at most, of deployments that somebody asks for; both are bounded.
//   S3  arrivals are counted once: counters begin at 0 with each stream.
//   S4  a request that waits where nothing serves is told at once.
import type { ModelDemand } from "../../../proto/gen/muster/v1/report.ts";
import { HISTORY_MS, type LoadSample } from "../../reconcile/autoscale.ts";
import type { Clock } from "../api/clock.ts";
import { isServingVoice, type ReportsBoard, type Voice } from "../workers/reports-board.ts";

export const SAMPLE_MS = 5_000;
const KEYS_MAX = 10_000;

type Stream = {
  models: ReadonlyMap<string, ModelDemand>;
  /** By deployment: arrivals up to the last sample, and the worst latencies since. */
  counted: Map<string, { arrivals: bigint; ttftMs: number; itlMs: number }>;
};

const NOTHING = { arrivals: 0n, ttftMs: 0, itlMs: 0 };

type Track = { samples: LoadSample[]; askedMs: number };

export type LoadSamplesOptions = { clock: Clock; board: ReportsBoard };

export class LoadSamples {
  readonly #options: LoadSamplesOptions;
  readonly #streams = new Set<Stream>();
  /** By `namespace/name` of the ModelDeployment. */
  readonly #tracks = new Map<string, Track>();
  readonly #listeners = new Set<(key: string) => void>();

  constructor(options: LoadSamplesOptions) {
    this.#options = options;
  }

  /** Oldest first. From the first time it is asked for on, it is kept. */
  of(key: string): readonly LoadSample[] {
    const askedMs = this.#options.clock.nowMs();
    const known = this.#tracks.get(key);
    if (known !== undefined) {
      known.askedMs = askedMs;
      return known.samples;
    }
    if (this.#tracks.size < KEYS_MAX) this.#tracks.set(key, { samples: this.#first(key, askedMs), askedMs });
    return this.#tracks.get(key)?.samples ?? [];
  }

  /** How many report. */
  get gateways(): number {
    return this.#streams.size;
  }

  /** A gateway's stream, from its beginning to its end. */
  open(): { hear(models: readonly ModelDemand[]): void; close(): void } {
    const stream: Stream = { models: new Map(), counted: new Map() };
    this.#streams.add(stream);
    return {
      hear: (models) => this.#hear(stream, models),
      close: () => void this.#streams.delete(stream),
    };
  }

  /** Told the key of a deployment that is asked for while nothing of it serves (S4). Answers how to stop. */
  subscribe(listener: (key: string) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Takes samples until aborted. */
  async run(signal: AbortSignal): Promise<void> {
    const { clock } = this.#options;
    while (!signal.aborted) {
      await clock.sleep(signal, clock.nowMs() + SAMPLE_MS);
      if (!signal.aborted) this.#sampleAll();
    }
  }

  /** A term has ended. */
  clear(): void {
    this.#streams.clear();
    this.#tracks.clear();
  }

  #hear(stream: Stream, models: readonly ModelDemand[]): void {
    stream.models = new Map(models.map((model) => [keyOf(model), model]));
    for (const [key, { ttftMs, itlMs }] of stream.models) {
      const { arrivals, ...worst } = stream.counted.get(key) ?? NOTHING;
      const most = { ttftMs: Math.max(worst.ttftMs, ttftMs), itlMs: Math.max(worst.itlMs, itlMs) };
      stream.counted.set(key, { arrivals, ...most });
    }
    for (const key of [...stream.counted.keys()]) if (!stream.models.has(key)) stream.counted.delete(key);
    const waiting = models.filter(({ held }) => held > 0).map(keyOf);
    if (waiting.length === 0) return;
    const serving = servingOf(this.#options.board.voices());
    for (const key of waiting) {
      const track = this.#tracks.get(key);
      if ((serving.get(key)?.length ?? 0) > 0 || track === undefined) continue;
      if ((track.samples.at(-1)?.queue ?? 0) > 0) continue; // told already
      this.#sample(key, track, []);
      for (const listener of [...this.#listeners]) listener(key);
    }
  }

  #first(key: string, nowMs: number): LoadSample[] {
    if (this.#streams.size === 0) return [];
    const voices = servingOf(this.#options.board.voices()).get(key) ?? [];
    return [this.#sampleOf(key, voices, nowMs)];
  }

  #sampleAll(): void {
    if (this.#streams.size === 0) return;
    const nowMs = this.#options.clock.nowMs();
    const serving = servingOf(this.#options.board.voices());
    for (const [key, track] of this.#tracks) {
      if (nowMs - track.askedMs > HISTORY_MS) this.#tracks.delete(key);
      else this.#sample(key, track, serving.get(key) ?? []);
    }
  }

  #sample(key: string, track: Track, voices: readonly Voice[]): void {
    const nowMs = this.#options.clock.nowMs();
    const kept = track.samples.filter(({ atMs }) => nowMs - atMs <= HISTORY_MS);
    track.samples = [...kept, this.#sampleOf(key, voices, nowMs)];
  }

  #sampleOf(key: string, voices: readonly Voice[], nowMs: number): LoadSample {
    const asked = [...this.#streams].flatMap((stream) => {
      const model = stream.models.get(key);
      if (model === undefined) return [];
      const { arrivals: before, ...worst } = stream.counted.get(key) ?? NOTHING;
      stream.counted.set(key, { ...NOTHING, arrivals: model.arrivals });
      return [{ ...model, ...worst, arrivals: Number(model.arrivals - before) }];
    });
    const sum = (values: readonly number[]) => values.reduce((all, value) => all + value, 0);
    const most = (values: readonly number[]) => Math.max(0, ...values) || undefined;
    // At a leader's door: they run on it as the gateways see it, and wait as it does.
    const waiting = sum(voices.map(({ report }) => report.stats?.waiting ?? 0));
    const placed = sum(asked.map(({ running }) => running));
    return {
      atMs: nowMs,
      serving: voices.length,
      queue: sum(asked.map(({ held }) => held)) + waiting,
      running: Math.max(0, placed - waiting),
      arrivals: Math.max(0, sum(asked.map(({ arrivals }) => arrivals))),
      tokensPerSecond: sum(voices.map((voice) => this.#rateOf(voice))),
      ttftMs: most(asked.map(({ ttftMs }) => ttftMs)),
      itlMs: most(asked.map(({ itlMs }) => itlMs)),
    };
  }

  #rateOf({ group, incarnation }: Voice): number {
    return this.#options.board.numbersOf(group, incarnation)?.tokensPerSecond ?? 0;
  }
}

const keyOf = ({ namespace, deployment }: ModelDemand): string => `${namespace}/${deployment}`;

/** Leaders that serve, by their deployment. */
function servingOf(voices: readonly Voice[]): Map<string, Voice[]> {
  const serving = voices.filter((voice) => isServingVoice(voice) && voice.owner.kind === "ModelDeployment");
  return Map.groupBy(serving, ({ group, owner }) => `${group.slice(0, group.indexOf("/"))}/${owner.name}`);
}

// Numbers that tell how the controller and the API server get on: plain counters, gauges and histograms, read by whatever
// exports them. Owns the names, so that each is counted in one place and means one thing.

/** Every metric there is, with its unit and meaning. Labels are few and bounded: never a name of an object. */
export const METRICS = {
  muster_kube_requests_total: "requests to the API server, by verb and code (0: no answer)",
  muster_kube_request_seconds: "from sending a request to the end of its answer, by verb",
  muster_kube_throttled_seconds: "waits for the client's own rate limit",
  muster_kube_lists_total: "whole lists read by reflectors, by resource",
  muster_kube_watches_total: "watches begun by reflectors, by resource",
  muster_kube_watch_failures_total: "watches or lists that failed, by resource and reason",
  muster_kube_watch_lag_seconds: "since a reflector last heard of the server, by resource",
  muster_kube_store_objects: "objects in a store, by resource",
  muster_queue_depth: "keys that wait, by queue",
  muster_queue_seconds: "from adding a key to its turn, by queue",
  muster_queue_retries_total: "turns that failed and are tried again, by queue",
  muster_queue_overflows_total: "keys refused because the queue was full, by queue",
  muster_reconcile_seconds: "length of one turn, by queue",
  muster_leader: "1 while this process leads",
  muster_leader_changes_total: "terms begun by this process",
  muster_status_writes_total: "status writes, by outcome",
  muster_status_pending: "status writes that wait",
  muster_report_streams: "streams of leaders, gateways and inspect pods that are open, by kind",
  muster_reports_refused_total: "streams of reports that were ended, by status code",
  muster_expert_moves_total: "moves of experts by load, by outcome: moved, failed",
  muster_expert_imbalance: "busiest rank over the mean of all at the last move, by moment: before, after",
  muster_events_total: "events, by outcome: sent, aggregated, dropped",
} as const;

export type MetricName = keyof typeof METRICS;
export type Labels = Readonly<Record<string, string>>;

export type Sample = { name: MetricName; kind: "counter" | "gauge"; labels: Labels; value: number };

/** Upper bounds in seconds: an API call at the low end, a reconcile that waits for one at the high. */
export const SECONDS_BOUNDS = [0.001, 0.005, 0.025, 0.1, 0.5, 1, 5, 15, 60] as const;

export type Histogram = {
  name: MetricName;
  labels: Labels;
  count: number;
  sum: number;
  /** Observations at most SECONDS_BOUNDS[i], not cumulated; the last one has the rest. */
  buckets: readonly number[];
};

type Gauge = { name: MetricName; labels: Labels; read: () => number };

/** Label sets beyond this are a mistake in the code that counts. */
const SERIES_MAX = 2_000;

export class KubeMetrics {
  readonly #counters = new Map<string, Sample>();
  readonly #gauges = new Map<string, Gauge>();
  readonly #histograms = new Map<string, Histogram & { buckets: number[] }>();

  count(name: MetricName, labels: Labels = {}, by = 1): void {
    const key = keyOf(name, labels);
    const known = this.#counters.get(key);
    if (known !== undefined) known.value += by;
    else this.#bounded(this.#counters).set(key, { name, kind: "counter", labels, value: by });
  }

  /** Read when somebody looks. Answers how to take it away. */
  gauge(name: MetricName, labels: Labels, read: () => number): () => void {
    const key = keyOf(name, labels);
    const gauge = { name, labels, read };
    this.#bounded(this.#gauges).set(key, gauge);
    return () => {
      if (this.#gauges.get(key) === gauge) this.#gauges.delete(key);
    };
  }

  observe(name: MetricName, labels: Labels, seconds: number): void {
    const key = keyOf(name, labels);
    let known = this.#histograms.get(key);
    if (known === undefined) {
      known = { name, labels, count: 0, sum: 0, buckets: Array.from({ length: SECONDS_BOUNDS.length + 1 }, () => 0) };
      this.#bounded(this.#histograms).set(key, known);
    }
    known.count += 1;
    known.sum += seconds;
    const at = SECONDS_BOUNDS.findIndex((bound) => seconds <= bound);
    const bucket = at < 0 ? SECONDS_BOUNDS.length : at;
    known.buckets[bucket] = (known.buckets[bucket] ?? 0) + 1;
  }

  /** 0 where nothing has been counted. */
  total(name: MetricName, labels: Labels = {}): number {
    const wanted = Object.entries(labels);
    return [...this.#counters.values()]
      .filter((sample) => sample.name === name && wanted.every(([label, value]) => sample.labels[label] === value))
      .reduce((sum, sample) => sum + sample.value, 0);
  }

  /** Counters and gauges as they are now. */
  samples(): Sample[] {
    const gauges = [...this.#gauges.values()].map(({ name, labels, read }) => ({
      name,
      kind: "gauge" as const,
      labels,
      value: read(),
    }));
    return [...[...this.#counters.values()].map((sample) => ({ ...sample })), ...gauges];
  }

  histograms(): readonly Histogram[] {
    return [...this.#histograms.values()];
  }

  #bounded<T>(series: Map<string, T>): Map<string, T> {
    if (series.size >= SERIES_MAX) throw new Error(`more than ${SERIES_MAX} label sets: a label is not bounded`);
    return series;
  }
}

function keyOf(name: string, labels: Labels): string {
  return `${name}${JSON.stringify(Object.entries(labels).sort(([one], [other]) => (one < other ? -1 : 1)))}`;
}

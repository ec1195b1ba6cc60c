// What the leader of a group tells the controller that leads (report.proto): one stream, opened again for ever with back-off.
// Owns the stream and when something is said; what is said is asked for at that moment, so nothing is kept for a reader that
// is away or behind. The group serves on whatever becomes of it.
//
//   T1  every report says who speaks, so that each can be checked; after a break all is said anew.
//   T2  one report is on its way at a time: the next one says the newest.
//   T3  how long a step stands still is measured here, by looks that are closer than reports: a report that has just missed the
//       standstill must not hide a second of it.
//   T4  each attempt looks for the controller anew (names are resolved again), and ends where nobody answers in ANSWER_MS.
import { type ClientDuplexStream, type ServiceError, status } from "@grpc/grpc-js";
import { type GroupReport, ReportsClient, type ReportTaken } from "../../proto/gen/muster/v1/report.ts";
import { WorkerPhase, type WorkerStats } from "../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../proto/grpc.ts";
import type { Trust } from "../../proto/trust.ts";
import type { Life } from "./life.ts";

const REPORT_MS = 1_000;
const PULSE_MS = 200;
/** An idle leader says that it is there. */
const IDLE_MS = 5_000;
const STANDING_MS_MAX = 3_600_000;
const ANSWER_MS = 15_000;
/** Quick at first: a new controller leads within seconds, and sees nobody who has not come. */
const BACKOFF = { baseMs: 250, maxMs: 5_000 };
/** Whoever is refused for what it is will be refused again. */
const REFUSED_MS = 30_000;
const REFUSALS: readonly status[] = [status.FAILED_PRECONDITION, status.INVALID_ARGUMENT, status.UNAUTHENTICATED];

export type Progress = {
  stats: WorkerStats;
  /** Last step that each rank has finished, by rank. */
  rankEpochs: readonly bigint[];
  isPending: boolean;
};

export type ReporterOptions = {
  /** host:port of the Reports service. */
  address: string;
  who: Pick<GroupReport, "namespace" | "group" | "incarnation" | "podUid">;
  life: Life;
  /** Undefined before there is a leader. */
  progress: () => Progress | undefined;
  trust: Trust;
  /** Ends it. */
  signal: AbortSignal;
  random?: () => number;
};

export function startReporter(options: ReporterOptions): void {
  const reporter = new Reporter(options);
  options.signal.addEventListener("abort", () => reporter.close(), { once: true });
  if (options.signal.aborted) reporter.close();
}

type Call = ClientDuplexStream<GroupReport, ReportTaken>;

class Reporter {
  readonly #options: ReporterOptions;
  readonly #unwatch: () => void;
  readonly #tick: NodeJS.Timeout;
  #client: ReportsClient | undefined;
  #call: Call | undefined;
  #again: NodeJS.Timeout | undefined;
  #failures = 0;
  #said: { report: GroupReport; atMs: number } | undefined;
  /** Since when a report waits for its answer. */
  #askedMs: number | undefined;
  #phase: WorkerPhase | undefined;
  #lookedMs = 0;
  /** T3: as the last pulse found them, and since when. */
  #seen: { epochs: readonly bigint[]; sinceMs: number } | undefined;
  #isClosed = false;

  constructor(options: ReporterOptions) {
    this.#options = options;
    this.#open();
    this.#tick = setInterval(() => this.#pulse(), PULSE_MS);
    this.#tick.unref();
    this.#unwatch = options.life.watch(({ phase }) => {
      const isNews = phase !== this.#phase;
      this.#phase = phase;
      if (isNews) this.#say();
    });
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearInterval(this.#tick);
    clearTimeout(this.#again);
    this.#unwatch();
    // What was written last still leaves: it says why the group ends.
    this.#call?.end();
    this.#client?.close();
  }

  #open(): void {
    const { address, trust } = this.#options;
    const credentials = trust.channel({ role: "controller" });
    const client = new ReportsClient(address, credentials, { ...channelOptions, "grpc.use_local_subchannel_pool": 1 });
    const call = client.group();
    this.#client = client;
    this.#call = call;
    this.#said = undefined;
    this.#askedMs = undefined;
    call.on("data", () => {
      this.#failures = 0;
      this.#askedMs = undefined;
    });
    call.on("error", (error: ServiceError) => this.#lost(call, error.code));
    call.on("end", () => this.#lost(call, status.UNAVAILABLE));
    this.#say();
  }

  #lost(call: Call, code: status): void {
    if (this.#call !== call || this.#isClosed) return;
    this.#call = undefined;
    this.#client?.close();
    this.#failures += 1;
    const maxMs = REFUSALS.includes(code) ? REFUSED_MS : BACKOFF.maxMs;
    const whole = Math.min(maxMs, BACKOFF.baseMs * 2 ** Math.min(this.#failures - 1, 20));
    const { random = Math.random } = this.#options;
    this.#again = setTimeout(() => this.#open(), whole * (0.5 + random() / 2));
    this.#again.unref();
  }

  #pulse(): void {
    const nowMs = performance.now();
    const progress = this.#options.progress();
    const epochs = progress?.rankEpochs ?? [];
    const stands = progress?.isPending === true && this.#seen !== undefined && isSame(this.#seen.epochs, epochs);
    if (!stands) this.#seen = progress?.isPending ? { epochs, sinceMs: nowMs } : undefined;
    if (nowMs - this.#lookedMs < REPORT_MS) return;
    this.#lookedMs = nowMs;
    this.#look(progress, nowMs);
  }

  /** Every second while anything runs or loads; else seldom. */
  #look(progress: Progress | undefined, nowMs: number): void {
    const call = this.#call;
    if (call === undefined) return;
    if (this.#askedMs !== undefined && nowMs - this.#askedMs > ANSWER_MS) {
      this.#giveUp(call);
      return;
    }
    const { phase } = this.#options.life.now;
    const report = this.#report(progress);
    const before = this.#said?.report;
    const isRunning = isBusy(report) || isBusy(before) || report.stats?.steps !== before?.stats?.steps;
    const isDue = this.#said === undefined || nowMs - this.#said.atMs >= IDLE_MS;
    if (phase !== WorkerPhase.SERVING || isRunning || isDue) this.#say(progress);
  }

  #giveUp(call: Call): void {
    this.#lost(call, status.DEADLINE_EXCEEDED);
    call.cancel();
  }

  /** T2. */
  #say(progress = this.#options.progress()): void {
    const call = this.#call;
    if (call === undefined || this.#isClosed || call.writableLength > 0) return;
    const report = this.#report(progress);
    const atMs = performance.now();
    this.#said = { report, atMs };
    this.#askedMs ??= atMs;
    call.write(report);
  }

  #report(progress: Progress | undefined): GroupReport {
    const { phase, bytesLoaded, bytesTotal, fault } = this.#options.life.now;
    const epochs = progress?.rankEpochs ?? [];
    return {
      ...this.#options.who,
      phase,
      bytesLoaded,
      bytesTotal,
      fault,
      stats: progress?.stats,
      rankEpochs: epochs.some((epoch) => epoch > 0n) ? [...epochs] : [],
      pending: progress?.isPending ?? false,
      standingMs: this.#standingMs(progress),
    };
  }

  /** Of what has moved since the last pulse nothing. */
  #standingMs(progress: Progress | undefined): number {
    const seen = this.#seen;
    if (progress?.isPending !== true || seen === undefined || !isSame(seen.epochs, progress.rankEpochs)) return 0;
    return Math.min(STANDING_MS_MAX, Math.round(performance.now() - seen.sinceMs));
  }
}

const isSame = (one: readonly bigint[], other: readonly bigint[]): boolean =>
  one.length === other.length && one.every((epoch, rank) => epoch === other[rank]);

function isBusy(report: GroupReport | undefined): boolean {
  if (report === undefined) return false;
  const { pending, stats } = report;
  return pending || (stats?.running ?? 0) > 0 || (stats?.waiting ?? 0) > 0;
}

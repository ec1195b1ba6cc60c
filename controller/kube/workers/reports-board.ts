// What the leaders of groups have said last: how far their ranks are, and how fast. Owns the memory of one term and the
// arithmetic on it; who may speak for a group is decided in reports.ts, what follows from it in controller/reconcile.
//
//   B1  one voice for each group, of one incarnation: a newer incarnation's replaces it, an older one's never does.
//   B2  what was said stays known when a stream breaks off, and since when nobody has spoken.
import type { GroupReport } from "../../../proto/gen/muster/v1/report.ts";
import { WorkerPhase } from "../../../proto/gen/muster/v1/worker.ts";
import type { StepsSeen } from "../../reconcile/cluster.ts";

/** A group that stands still so long with work pending is looked at closely; judged later (stepMs of the reconciler). */
const SUSPECT_MS = 1_500;
/** Rates are over so long: as seldom as numbers are written. */
export const RATE_MS = 10_000;
/** An idle leader speaks every few seconds; what is older than this says nothing about now. */
const STALE_MS = 20_000;

export type Owner = { kind: string; name: string };

export type GroupNumbers = {
  tokensPerSecond: number | undefined;
  /** Last step that all ranks have finished, and when it was. */
  step: bigint;
  stepMs: number;
};

/** Of a whole span of RATE_MS. */
export type GroupRate = {
  tokensPerSecond: number;
  /** Without accepted guesses: what steps alone give. */
  plainPerSecond: number;
  /** Sequences that ran at once, on average. */
  concurrency: number;
};

type Told = { atMs: number; tokens: bigint; accepted: bigint; running: number };

export type Voice = {
  readonly group: string;
  readonly incarnation: bigint;
  readonly owner: Owner;
  report: GroupReport;
  saidMs: number;
  sinceMs: number;
  stepMs: number;
  isHeard: boolean;
  /** Tokens generated and guesses accepted by then, oldest first, about RATE_MS of it. */
  told: Told[];
};

export type Speaker = Pick<Voice, "group" | "incarnation" | "owner">;

export class ReportsBoard {
  readonly #nowMs: () => number;
  readonly #voices = new Map<string, Voice>();
  readonly #listeners = new Set<(group: string) => void>();

  constructor(nowMs: () => number) {
    this.#nowMs = nowMs;
  }

  /** A report that was found to be the group's. */
  hear({ group, incarnation, owner }: Speaker, report: GroupReport): void {
    const before = this.#voices.get(group);
    if (before !== undefined && before.incarnation > incarnation) return;
    const nowMs = this.#nowMs();
    const known = before?.incarnation === incarnation ? before : undefined;
    const hasMoved = known === undefined || isOther(known.report.rankEpochs, report.rankEpochs);
    const stands = known?.report.pending === true && report.pending && !hasMoved;
    // The leader has looked more often than it speaks; one that does not say it is of an older version.
    const toldMs = report.pending ? nowMs - report.standingMs : nowMs;
    this.#voices.set(group, {
      group,
      incarnation,
      owner,
      report,
      saidMs: nowMs,
      sinceMs: stands ? Math.min(known.sinceMs, toldMs) : toldMs,
      stepMs: known !== undefined && stepOf(known.report) === stepOf(report) ? known.stepMs : nowMs,
      isHeard: true,
      told: toldOf(known?.told ?? [], report, nowMs),
    });
    const isNews = known === undefined || !known.isHeard || known.report.phase !== report.phase;
    if (isNews || report.fault !== undefined) this.#tell(group);
  }

  /** The stream of this speaker has broken off. */
  lose({ group, incarnation }: Speaker): void {
    const voice = this.#voices.get(group);
    if (voice?.incarnation !== incarnation) return;
    this.#voices.set(group, { ...voice, isHeard: false });
    this.#tell(group);
  }

  /** Undefined where nothing has been heard of this incarnation in this term. */
  stepsOf(group: string, incarnation: bigint): StepsSeen | undefined {
    const voice = this.#voices.get(group);
    if (voice?.incarnation !== incarnation) return undefined;
    const { report, sinceMs, saidMs, isHeard } = voice;
    return { epochs: report.rankEpochs, isPending: report.pending, sinceMs, saidMs, isHeard };
  }

  numbersOf(group: string, incarnation: bigint): GroupNumbers | undefined {
    const voice = this.#voices.get(group);
    if (voice?.incarnation !== incarnation) return undefined;
    const isStale = this.#nowMs() - voice.saidMs > STALE_MS;
    const tokensPerSecond = isStale ? undefined : rateOf(voice.told);
    return { tokensPerSecond, step: stepOf(voice.report), stepMs: voice.stepMs };
  }

  /** Undefined where nobody has spoken of late, or not for so long yet. */
  rateOf(group: string, incarnation: bigint): GroupRate | undefined {
    const voice = this.#voices.get(group);
    if (voice?.incarnation !== incarnation || this.#nowMs() - voice.saidMs > STALE_MS) return undefined;
    const [first] = voice.told;
    const last = voice.told.at(-1);
    const tokensPerSecond = rateOf(voice.told);
    if (first === undefined || last === undefined || tokensPerSecond === undefined) return undefined;
    const spanMs = last.atMs - first.atMs;
    if (spanMs < RATE_MS) return undefined;
    const plainPerSecond = tokensPerSecond - (Number(last.accepted - first.accepted) * 1000) / spanMs;
    return { tokensPerSecond, plainPerSecond, concurrency: runningOver(voice.told) / spanMs };
  }

  /** Milliseconds of a step, as its leader has said of late; 0 where it has not. */
  stepTimeOf(group: string): number {
    const voice = this.#voices.get(group);
    return voice === undefined || this.#nowMs() - voice.saidMs > STALE_MS ? 0 : (voice.report.stats?.stepMs ?? 0);
  }

  /** Those who have spoken of late. */
  voices(): Voice[] {
    const nowMs = this.#nowMs();
    return [...this.#voices.values()].filter(({ isHeard, saidMs }) => isHeard && nowMs - saidMs <= STALE_MS);
  }

  /** Groups that may be standing still. */
  suspects(): string[] {
    const nowMs = this.#nowMs();
    return [...this.#voices.values()].flatMap(({ group, incarnation }) => {
      const steps = this.stepsOf(group, incarnation);
      return steps?.isPending && isSuspicious(steps, nowMs) ? [group] : [];
    });
  }

  /** Told of phases, faults and streams, not of numbers. Answers how to stop. */
  subscribe(listener: (group: string) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** The group has gone. */
  forget(group: string): void {
    this.#voices.delete(group);
  }

  /** A term has ended: what the next one hears, it hears anew. */
  clear(): void {
    this.#voices.clear();
  }

  #tell(group: string): void {
    for (const listener of [...this.#listeners]) listener(group);
  }
}

/** Whether nothing moves though something is to be done, or nobody speaks for the group any more. */
export function isSuspicious({ isPending, isHeard, sinceMs }: StepsSeen, nowMs: number): boolean {
  return !isHeard || (isPending && nowMs - sinceMs >= SUSPECT_MS);
}

function isOther(before: readonly bigint[], now: readonly bigint[]): boolean {
  return before.length !== now.length || now.some((epoch, rank) => epoch !== before[rank]);
}

function stepOf({ rankEpochs }: GroupReport): bigint {
  const [least = 0n] = rankEpochs.toSorted((one, other) => (one < other ? -1 : 1));
  return least;
}

/** The newest of those that are older than RATE_MS stays, so that a rate is always over a whole span. */
function toldOf(before: readonly Told[], { stats }: GroupReport, nowMs: number): Told[] {
  if (stats === undefined) return [];
  const { tokensGenerated: tokens, accepted, running } = stats;
  const told = [...before, { atMs: nowMs, tokens, accepted, running }];
  const first = told.findLastIndex(({ atMs }) => nowMs - atMs >= RATE_MS);
  return first > 0 ? told.slice(first) : told;
}

function rateOf(told: readonly Told[]): number | undefined {
  const [first] = told;
  const last = told.at(-1);
  if (first === undefined || last === undefined || last.atMs - first.atMs < 1_000) return undefined;
  return (Number(last.tokens - first.tokens) * 1000) / (last.atMs - first.atMs);
}

/** Sequences x milliseconds, between two reports as a straight line. */
function runningOver(told: readonly Told[]): number {
  return told.reduce((sum, { atMs, running }, index) => {
    const before = told[index - 1];
    return before === undefined ? sum : sum + ((before.running + running) / 2) * (atMs - before.atMs);
  }, 0);
}

export const isServingVoice = ({ report }: Voice): boolean => report.phase === WorkerPhase.SERVING;

// Questions to the planner and its answers, for all owners. Owns when a question is asked again; what it asks and means is
// reconcile/deployment/planning.ts.
//
//   P1  an owner has at most one question under way; all together at most `atOnceMax`; each ends within `askMs`.
//   P2  a question is asked again only after a failure (back-off), or, where nothing fitted, when the inventory has changed.
//   P3  whether there is a better plan is asked at most once in `betterMs`, after questions of those that have none.
import type { Ask, Planning } from "../../reconcile/deployment/planning.ts";
import type { Question } from "../../reconcile/deployment/wish.ts";
import type { Answer } from "../../reconcile/deployment/world.ts";
import type { Clock } from "../api/clock.ts";
import { backoffMs } from "../api/rate-limit.ts";

export type Planner = (ask: Ask, signal: AbortSignal) => Promise<Planning>;

export type DeskLimits = { atOnceMax: number; askMs: number; betterMs: number; againMs: number };

const defaultDeskLimits: DeskLimits = { atOnceMax: 2, askMs: 120_000, betterMs: 3_600_000, againMs: 10_000 };

const BACKOFF = { baseMs: 2_000, maxMs: 300_000 };

type Entry = {
  hash: string;
  answer: Answer;
  /** What was planned on, as text. */
  grounds: string;
  atMs: number;
  failures: number;
};

type Better = { hash: string; atMs: number; spec: Extract<Planning, { kind: "feasible" }>["spec"] | undefined };

type DeskOptions = {
  planner: Planner;
  clock: Clock;
  random: () => number;
  /** The answer for the key has come. */
  onAnswer: (key: string) => void;
  limits?: Partial<DeskLimits>;
};

export class PlanDesk {
  readonly #options: DeskOptions;
  readonly #limits: DeskLimits;
  readonly #entries = new Map<string, Entry>();
  readonly #betters = new Map<string, Better>();
  readonly #running = new Map<string, Promise<void>>();

  constructor(options: DeskOptions) {
    this.#options = options;
    this.#limits = { ...defaultDeskLimits, ...options.limits };
  }

  answerTo(key: string, question: Question): Answer | undefined {
    const entry = this.#entries.get(key);
    return entry?.hash === question.hash ? entry.answer : undefined;
  }

  better(key: string, question: Question): Better["spec"] {
    const better = this.#betters.get(key);
    return better?.hash === question.hash ? better.spec : undefined;
  }

  forget(key: string): void {
    this.#entries.delete(key);
    this.#betters.delete(key);
  }

  /** Asks where it is time to; answers when to look again where it is too early or too full. */
  ask(key: string, ask: Ask, what: "first" | "better", signal: AbortSignal): number | undefined {
    const nowMs = this.#options.clock.nowMs();
    if (this.#running.has(key)) return undefined;
    const waitMs = what === "first" ? this.#firstDueMs(key, ask) : this.#betterDueMs(key, ask);
    if (waitMs === undefined || waitMs > nowMs) return waitMs;
    if (this.#running.size >= this.#limits.atOnceMax) return nowMs + this.#limits.againMs / 10;
    const turn = this.#turn(key, ask, what, signal).finally(() => {
      this.#running.delete(key);
      if (!signal.aborted) this.#options.onAnswer(key);
    });
    this.#running.set(key, turn);
    return undefined;
  }

  /** Resolves when nothing is under way. */
  async idle(): Promise<void> {
    await Promise.allSettled(this.#running.values());
  }

  #firstDueMs(key: string, ask: Ask): number | undefined {
    const entry = this.#entries.get(key);
    if (entry === undefined || entry.hash !== ask.question.hash) return 0;
    switch (entry.answer.kind) {
      case "failed":
        return entry.answer.againMs;
      case "infeasible":
        return entry.grounds === groundsText(ask) ? undefined : entry.atMs + this.#limits.againMs;
      case "running":
        return 0;
      default:
        return undefined;
    }
  }

  #betterDueMs(key: string, ask: Ask): number {
    const better = this.#betters.get(key);
    return better?.hash === ask.question.hash ? better.atMs + this.#limits.betterMs : 0;
  }

  async #turn(key: string, ask: Ask, what: "first" | "better", signal: AbortSignal): Promise<void> {
    const { clock } = this.#options;
    const { hash } = ask.question;
    const before = this.#entries.get(key);
    const failures = before?.hash === hash ? before.failures : 0;
    if (what === "first" && before?.hash !== hash) {
      const running: Answer = { kind: "running", sinceMs: clock.nowMs() };
      this.#entries.set(key, { hash, answer: running, grounds: "", atMs: clock.nowMs(), failures });
    }
    const planning = await this.#bounded(ask, signal);
    if (signal.aborted) return;
    const atMs = clock.nowMs();
    if (what === "better") {
      const spec = planning.kind === "feasible" ? planning.spec : undefined;
      this.#betters.set(key, { hash, atMs, spec });
      return;
    }
    // What has just been planned is not asked for a better one at once.
    if (planning.kind === "feasible") this.#betters.set(key, { hash, atMs, spec: undefined });
    const isFailed = planning.kind === "failed";
    const againMs = atMs + backoffMs(failures + 1, BACKOFF, this.#options.random);
    const answer: Answer = isFailed ? { ...planning, againMs } : planning;
    this.#entries.set(key, { hash, answer, grounds: groundsText(ask), atMs, failures: isFailed ? failures + 1 : 0 });
  }

  async #bounded(ask: Ask, signal: AbortSignal): Promise<Planning> {
    const { planner, clock } = this.#options;
    const late = new AbortController();
    const done = new AbortController();
    const { askMs } = this.#limits;
    const timer = clock.sleep(done.signal, clock.nowMs() + askMs).then(() => late.abort());
    const detail = `planning took more than ${askMs / 1000} s`;
    try {
      const tooLong = timer.then((): Planning => ({ kind: "failed", detail }));
      return await Promise.race([planner(ask, AbortSignal.any([signal, late.signal])), tooLong]);
    } catch (error) {
      // A planner that breaks (out of memory) is no reason to stop looking after everything else.
      return { kind: "failed", detail: error instanceof Error ? error.message : String(error) };
    } finally {
      done.abort();
    }
  }
}

/** Nodes and what they have: whether a refusal may not hold any more. */
function groundsText({ grounds }: Ask): string {
  const text = ({ nodes }: Ask["grounds"]["all"]) =>
    nodes.map((node) => (node.kind === "gpu" ? `${node.devices.length}x${node.devices[0]?.product}` : node.name));
  return JSON.stringify([text(grounds.all).toSorted(), text(grounds.free).toSorted()]);
}

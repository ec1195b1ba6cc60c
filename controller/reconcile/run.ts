// The reconciler's loop for one group: observe, decide, apply, tell. Owns the order and the waits; what to do is decided in
// decide.ts, what is done in the Cluster. Level-triggered: it can be ended at any line and begun anew.
//
//   L1  a world that cannot be read changes nothing: no action, the last status stands (R8), and is marked after a while.
//   L2  an action that fails ends the pass; the next one looks again before it acts.
//   L3  the status is told after the actions, once for each change. An incarnation whose record is not written yet is not there
//       yet: it is told when it is; after a while the trouble is.
//   L4  listening for changes begins before looking: what changes during a pass is not slept over.
//   L5  passes are at least PASS_GAP_MS apart: an action that fails without throwing makes no storm, bursts become one look.
import type { Action, Cluster } from "./cluster.ts";
import { decide } from "./decide.ts";
import type { ReconcileLimits } from "./limits.ts";
import { type GroupStatus, isSameStatus, Phase } from "./status.ts";
import type { Because, Goal, Trouble, World } from "./world.ts";

export type Clock = {
  nowMs(): number;
  /** Resolves at `untilMs` or on abort. */
  sleep(signal: AbortSignal, untilMs: number): Promise<void>;
};

export type ReconcilerOptions = {
  group: string;
  cluster: Cluster;
  clock: Clock;
  limits: ReconcileLimits;
  /** Once for each change. */
  onStatus: (status: GroupStatus) => void;
  /** Why each action was taken; for logs. */
  onBecause?: (because: readonly Because[]) => void;
};

/** An unreadable world, and a record that cannot be written, are no news for this long. */
const NEWS_GRACE_MS = 5_000;
const RETRY_BASE_MS = 100;
/** A reason of one's own: without one each nudge would make an error with its stack. */
const NUDGED = "nudged";
/** A person does not notice it, a hundred passes a second do not hurt. */
const PASS_GAP_MS = 10;

const detailOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

export class Reconciler {
  readonly #options: ReconcilerOptions;
  #goal: Goal;
  #nudge = new AbortController();
  #last: GroupStatus | undefined;
  #trouble: Trouble | undefined;
  #unreadableSinceMs: number | undefined;
  #failedPasses = 0;

  constructor(goal: Goal, options: ReconcilerOptions) {
    this.#goal = goal;
    this.#options = options;
  }

  /** Undefined before the first pass. */
  get status(): GroupStatus | undefined {
    return this.#last;
  }

  /** The loop takes it up at once. */
  setGoal(goal: Goal): void {
    this.#goal = goal;
    this.#nudge.abort(NUDGED);
  }

  /** Runs until aborted; after a stop goal it goes on watching that nothing runs. */
  async run(signal: AbortSignal): Promise<void> {
    signal.addEventListener("abort", () => this.#nudge.abort(NUDGED), { once: true });
    const { cluster, clock, limits } = this.#options;
    while (!signal.aborted) {
      const nudge = new AbortController();
      this.#nudge = nudge;
      const startedMs = clock.nowMs();
      const changed = cluster.changed(nudge.signal, startedMs + limits.heartbeatMs);
      const wakeMs = await this.pass(signal);
      if (!nudge.signal.aborted && !signal.aborted) {
        const woken = clock.sleep(nudge.signal, wakeMs);
        // After a failure the wait is a back-off: changes do not cut it short.
        await (this.#failedPasses > 0 ? woken : Promise.race([woken, changed]));
      }
      nudge.abort(NUDGED);
      await clock.sleep(signal, startedMs + PASS_GAP_MS);
    }
  }

  /** One look at everything; answers when to look again at the latest. */
  async pass(signal: AbortSignal): Promise<number> {
    const { clock } = this.#options;
    const world = await this.#observe(signal);
    if (world === undefined) return clock.nowMs() + this.#retryMs();
    const decision = decide(world, this.#options.limits);
    if (decision.because.length > 0) this.#options.onBecause?.(decision.because);
    let failed: Action["kind"] | undefined;
    for (const action of decision.actions) {
      try {
        await this.#options.cluster.apply(action, signal);
      } catch (error) {
        if (signal.aborted) return clock.nowMs();
        const what = action.kind === "record" ? "record" : `${action.kind} ${action.name.worker}`;
        const sinceMs = this.#trouble?.sinceMs ?? clock.nowMs();
        this.#trouble = { sinceMs, detail: `cannot ${what}: ${detailOf(error)}` };
        failed = action.kind;
        break;
      }
    }
    const isAhead = failed === "record" && decision.status.incarnation > world.seen.record.incarnation;
    if (isAhead) this.#tellUnwritten();
    else this.#tell(decision.status);
    if (failed !== undefined) {
      this.#failedPasses += 1;
      return clock.nowMs() + this.#retryMs();
    }
    this.#failedPasses = 0;
    this.#trouble = undefined;
    return decision.wakeMs;
  }

  async #observe(signal: AbortSignal): Promise<World | undefined> {
    const { cluster, clock, group } = this.#options;
    try {
      const [inventory, seen] = await Promise.all([cluster.inventory(signal), cluster.observe(group, signal)]);
      this.#unreadableSinceMs = undefined;
      return { nowMs: clock.nowMs(), goal: this.#goal, inventory, seen, last: this.#last, trouble: this.#trouble };
    } catch (error) {
      if (signal.aborted) return undefined;
      this.#failedPasses += 1;
      this.#unreadableSinceMs ??= clock.nowMs();
      this.#tellUnreadable(detailOf(error), this.#unreadableSinceMs);
      return undefined;
    }
  }

  /** The leader stays: what serves goes on serving while nobody can look (L1). */
  #tellUnreadable(detail: string, sinceMs: number): void {
    const last = this.#last;
    if (last === undefined || this.#options.clock.nowMs() - sinceMs < NEWS_GRACE_MS) return;
    const cause = `the state of the workers cannot be read: ${detail}`;
    this.#tell({ ...last, phase: Phase.DEGRADED, code: "unreadable", cause, sinceMs });
  }

  #tellUnwritten(): void {
    const [last, trouble] = [this.#last, this.#trouble];
    if (last === undefined || trouble === undefined) return;
    if (this.#options.clock.nowMs() - trouble.sinceMs < NEWS_GRACE_MS) return;
    const phase = last.phase === Phase.SERVING ? Phase.DEGRADED : last.phase;
    this.#tell({ ...last, phase, code: "unwritten", cause: trouble.detail, sinceMs: trouble.sinceMs });
  }

  #tell(status: GroupStatus): void {
    const last = this.#last;
    this.#last = status;
    if (last === undefined || !isSameStatus(last, status)) this.#options.onStatus(status);
  }

  #retryMs(): number {
    const { backoffMaxMs } = this.#options.limits;
    return Math.min(backoffMaxMs, RETRY_BASE_MS * 2 ** Math.min(this.#failedPasses, 20));
  }
}

// Stored plans made whole again for the groups that use them: the model's headers are read anew, everything else is as it was
// stored. Owns when a source is read and read again; what a whole plan is belongs to api/shard-plan.ts.
//
//   R1  a plan is read once for all of its groups, and kept while one uses it; at most READS_AT_ONCE are under way, each within READ_MS.
//   R2  a source that fails is tried again with back-off; one that has become another model is refused, and read again as seldom.
//   R3  plans of one model share its spec: a large one has 45,000 tensors, and may be planned in many ways.
import { isDeepStrictEqual } from "node:util";
import { FaultError } from "../../../proto/fault.ts";
import type { ModelSpec, ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import { type Fault, Fault_Kind } from "../../../proto/gen/muster/v1/worker.ts";
import { restorePlan, type ShardPlanSpec } from "../../api/shard-plan.ts";
import { shardsOf } from "../../model/shards.ts";
import type { KubeObject } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { backoffMs } from "../api/rate-limit.ts";
import { Slots } from "../watch/slots.ts";

export type PlanRead =
  | { kind: "whole"; plan: ShardPlan }
  | { kind: "reading" }
  /** Tried again. */
  | { kind: "failed"; detail: string }
  | { kind: "refused"; fault: Fault };

/** `owner`: of the groups, as it is now. */
export type ModelReader = (source: string, signal: AbortSignal, owner?: KubeObject) => Promise<ModelSpec>;

const READS_AT_ONCE = 2;
const READ_MS = 120_000;
const BACKOFF = { baseMs: 2_000, maxMs: 300_000 };

export type GroupPlansOptions = {
  read: ModelReader;
  clock: Clock;
  random: () => number;
  /** `uid`: of the plan. */
  onChange: (uid: string) => void;
};

type Wanted = { spec: ShardPlanSpec; owner: KubeObject | undefined };

export class GroupPlans {
  readonly #options: GroupPlansOptions;
  readonly #slots = new Slots(READS_AT_ONCE);
  /** By digest and source, as long as a plan has it. */
  readonly #models = new Map<string, WeakRef<ModelSpec>>();
  readonly #known = new Map<string, { read: PlanRead; wanted: Wanted; stop: AbortController; done: Promise<void> }>();

  constructor(options: GroupPlansOptions) {
    this.#options = options;
  }

  /** Begins to read where nobody has asked before. `uid`: of the ShardPlan, whose spec never changes. */
  planOf(uid: string, spec: ShardPlanSpec, owner?: KubeObject): PlanRead {
    const known = this.#known.get(uid);
    if (known !== undefined) {
      known.wanted.owner = owner;
      return known.read;
    }
    const stop = new AbortController();
    const wanted: Wanted = { spec, owner };
    const entry = { read: { kind: "reading" } satisfies PlanRead as PlanRead, wanted, stop, done: Promise.resolve() };
    this.#known.set(uid, entry);
    entry.done = this.#keepReading(wanted, stop.signal, (read) => {
      entry.read = read;
      this.#options.onChange(uid);
    });
    return entry.read;
  }

  /** Forgets the others. */
  keep(uids: ReadonlySet<string>): void {
    for (const [uid, { stop }] of this.#known) {
      if (uids.has(uid)) continue;
      stop.abort();
      this.#known.delete(uid);
    }
  }

  /** Resolves when nothing is under way. */
  async close(): Promise<void> {
    const entries = [...this.#known.values()];
    this.keep(new Set());
    await Promise.all(entries.map(({ done }) => done));
  }

  async #keepReading(wanted: Wanted, signal: AbortSignal, tell: (read: PlanRead) => void): Promise<void> {
    const { clock, random } = this.#options;
    for (let failures = 1; !signal.aborted; failures += 1) {
      const read = await this.#readOnce(wanted, signal);
      if (signal.aborted) return;
      tell(read);
      if (read.kind === "whole") return;
      await clock.sleep(signal, clock.nowMs() + backoffMs(failures, BACKOFF, random));
    }
  }

  /** R3. */
  #shared(model: ModelSpec): ModelSpec {
    const key = `${model.digest} ${model.source}`;
    const known = this.#models.get(key)?.deref();
    if (known !== undefined && isDeepStrictEqual(known, model)) return known;
    for (const [other, reference] of this.#models) if (reference.deref() === undefined) this.#models.delete(other);
    this.#models.set(key, new WeakRef(model));
    return model;
  }

  async #readOnce({ spec, owner }: Wanted, signal: AbortSignal): Promise<PlanRead> {
    const { read, clock } = this.#options;
    const ended = new AbortController();
    try {
      const leave = await this.#slots.enter(signal);
      try {
        const late = new AbortController();
        void clock.sleep(ended.signal, clock.nowMs() + READ_MS).then(() => {
          if (!ended.signal.aborted) late.abort(new Error(`reading took more than ${READ_MS / 1000} s`));
        });
        const model = await read(spec.model.source, AbortSignal.any([signal, late.signal]), owner);
        return wholeOf(spec, this.#shared(model));
      } finally {
        leave();
      }
    } catch (error) {
      if (error instanceof FaultError && error.fault.kind === Fault_Kind.INVALID)
        return { kind: "refused", fault: error.fault };
      return { kind: "failed", detail: error instanceof Error ? error.message : String(error) };
    } finally {
      ended.abort();
    }
  }
}

function wholeOf(spec: ShardPlanSpec, model: ModelSpec): PlanRead {
  const restored = restorePlan(spec, model, shardsOf);
  return restored.kind === "refused" ? restored : { kind: "whole", plan: restored.value };
}

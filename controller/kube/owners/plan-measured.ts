// What the groups of a plan were seen to give, kept in the status of its ShardPlan. Owns the marks; predictions and plans stay as
// they were stored, and what follows from a mark is reconcile/deployment/calibration.ts.
//
//   M1  tokensPerSecond is the most that one group has given over RATE_MS, concurrency how many sequences it ran then, at when
//       it was. A new mark is GAIN_MIN above the one before: less is chance, and each mark is a write.
//   M2  ttftMs and itlMs are what clients saw when a group ran latencyConcurrency sequences, the most of which gateways told: over
//       RATE_MS the worst of their 90th percentiles, waits at the leader included; of all such spans the least. What nobody told
//       is left out.
//   M3  gateways tell of a deployment: while its groups follow several plans, or when a replica was missing of late (requests were
//       held, and streams stood still, for another reason than the plan), nothing is learned of latencies.
//   M4  calibration is the best share of the roofline that a group has shown at the predicted concurrency, guesses aside.
//   M5  a plan is judged by what it can give: a bad day changes nothing. Another plan begins with nothing.
import { isDeepStrictEqual } from "node:util";
import { parseShardPlan } from "../../api/parse.ts";
import type { ShardPlanSpec, ShardPlanStatus } from "../../api/shard-plan.ts";
import type { LoadSample } from "../../reconcile/autoscale.ts";
import { calibrationFrom, isSameConcurrency } from "../../reconcile/deployment/calibration.ts";
import type { KubeObject } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { fieldsOf } from "../api/fields.ts";
import { shardPlans } from "../api/resources.ts";
import { parsedGroupOf } from "../groups/group-record.ts";
import type { Lead, Part } from "../run-controller.ts";
import { StatusWriter } from "../status/status-writer.ts";
import { type GroupRate, isServingVoice, RATE_MS, type ReportsBoard } from "../workers/reports-board.ts";
import { type LoadSamples, SAMPLE_MS } from "./load-samples.ts";

const LOOK_MS = 10_000;
const GAIN_MIN = 1.05;
/** M3: what clients see has settled when all replicas have served for so long. */
const SETTLED_MS = 2 * RATE_MS;

export type MeasuredOptions = {
  board: ReportsBoard;
  loads: Pick<LoadSamples, "of">;
  clock: Clock;
  random: () => number;
};

type Latencies = { ttftMs?: number; itlMs?: number };
/** Of the groups of one plan, now. */
export type Seen = { rates: readonly GroupRate[]; latencies: Latencies };
type Measured = NonNullable<ShardPlanStatus["measured"]>;

export function measuredPart({ board, loads, clock, random }: MeasuredOptions): Part {
  return async ({ api, stores, term: { signal } }) => {
    const { groups, plans } = stores;
    const writer = new StatusWriter({
      api,
      resource: shardPlans,
      clock,
      random,
      headlineOf: () => "", // numbers alone
      onWritten: (object) => plans.learn(object),
      onConflict: () => {}, // the next look is with the newer one
      onRefused: () => {}, // the plan serves on; the next mark is offered anew
    });
    const look = async () => {
      while (!signal.aborted) {
        await clock.sleep(signal, clock.nowMs() + LOOK_MS);
        if (signal.aborted || !groups.isSynced || !plans.isSynced) continue;
        for (const [key, seen] of seenOf({ board, loads, groups }, clock.nowMs())) {
          const plan = plans.get(key);
          const status = plan === undefined ? undefined : statusWith(plan, seen, clock.nowMs());
          if (plan !== undefined && status !== undefined) writer.offer(plan, status);
        }
      }
    };
    await Promise.all([writer.run(signal), look()]);
  };
}

type Sources = Pick<MeasuredOptions, "board" | "loads"> & { groups: Lead["stores"]["groups"] };

/** By the plan's key. */
function seenOf({ board, loads, groups }: Sources, nowMs: number): Map<string, Seen> {
  const rates = new Map<string, GroupRate[]>();
  const plansOf = new Map<string, Set<string>>();
  for (const { group: key, incarnation } of board.voices().filter(isServingVoice)) {
    const object = groups.get(key);
    const group = object === undefined ? undefined : parsedGroupOf(object);
    if (group?.kind !== "ok") continue;
    const { metadata, spec } = group.value;
    const plan = `${metadata.namespace}/${spec.plan}`;
    const rate = board.rateOf(key, incarnation);
    rates.set(plan, [...(rates.get(plan) ?? []), ...(rate === undefined ? [] : [rate])]);
    if (spec.owner.kind !== "ModelDeployment") continue;
    const owner = `${metadata.namespace}/${spec.owner.name}`;
    plansOf.set(owner, (plansOf.get(owner) ?? new Set()).add(plan));
  }
  const latencies = new Map<string, Latencies>();
  for (const [owner, [plan = "", ...others]] of plansOf)
    if (others.length === 0) latencies.set(plan, latenciesOf(loads.of(owner), nowMs));
  return new Map([...rates].map(([plan, own]) => [plan, { rates: own, latencies: latencies.get(plan) ?? {} }]));
}

/** M2, M3. */
export function latenciesOf(samples: readonly LoadSample[], nowMs: number): Latencies {
  const settled = samples.filter(({ atMs }) => atMs > nowMs - SETTLED_MS);
  const isWhole = settled.length >= SETTLED_MS / SAMPLE_MS - 1;
  const [first] = settled;
  if (!isWhole || first === undefined || settled.some(({ serving }) => serving === 0 || serving < first.serving))
    return {};
  const recent = settled.filter(({ atMs }) => atMs > nowMs - RATE_MS);
  const worst = (values: readonly number[]) => (values.length === 0 ? undefined : rounded(Math.max(...values)));
  const ttftMs = worst(recent.flatMap((sample) => sample.ttftMs ?? []));
  const itlMs = worst(recent.flatMap((sample) => sample.itlMs ?? []));
  return { ...(ttftMs === undefined ? {} : { ttftMs }), ...(itlMs === undefined ? {} : { itlMs }) };
}

/** Undefined where what is stored is as good, or cannot be read. */
function statusWith(plan: KubeObject, seen: Seen, nowMs: number): unknown {
  const parsed = parseShardPlan(plan);
  if (parsed.kind === "refused") return undefined;
  const { spec, status } = parsed.value;
  const measured = measuredWith(status?.measured, spec.prediction, seen, nowMs);
  if (measured === undefined || isDeepStrictEqual(measured, status?.measured)) return undefined;
  return { ...fieldsOf(plan.status), measured };
}

/** Undefined where nothing has been seen yet. */
export function measuredWith(
  before: Measured | undefined,
  prediction: ShardPlanSpec["prediction"],
  { rates, latencies }: Seen,
  nowMs: number,
): Measured | undefined {
  const [best] = rates.toSorted((one, other) => other.tokensPerSecond - one.tokensPerSecond);
  if (best === undefined || best.tokensPerSecond <= 0) return before;
  const shares = rates.flatMap(({ plainPerSecond: tokensPerSecond, concurrency }) => {
    return calibrationFrom(prediction, { tokensPerSecond, concurrency }) ?? [];
  });
  const share = Math.max(before?.calibration ?? 0, ...shares);
  const concurrency = rates.reduce((sum, rate) => sum + rate.concurrency, 0) / rates.length;
  return {
    ...before,
    ...markWith(before, best, nowMs),
    ...slowestWith(before, latencies, sequences(concurrency)),
    ...(share > 0 ? { calibration: share } : {}),
  };
}

/** M1. */
function markWith(before: Measured | undefined, { tokensPerSecond, concurrency }: GroupRate, nowMs: number): Measured {
  if (before !== undefined && tokensPerSecond <= (before.tokensPerSecond ?? 0) * GAIN_MIN) return before;
  const at = new Date(nowMs).toISOString();
  return { at, tokensPerSecond: rounded(tokensPerSecond), concurrency: sequences(concurrency) };
}

/** M2. */
function slowestWith(before: Measured | undefined, told: Latencies, concurrency: number): Partial<Measured> {
  if (told.ttftMs === undefined && told.itlMs === undefined) return {};
  const { latencyConcurrency: most = 0 } = before ?? {};
  if (isSameConcurrency(concurrency, most)) {
    const ttftMs = least(before?.ttftMs, told.ttftMs);
    const itlMs = least(before?.itlMs, told.itlMs);
    return { ...(ttftMs === undefined ? {} : { ttftMs }), ...(itlMs === undefined ? {} : { itlMs }) };
  }
  if (concurrency < most) return {};
  return { ttftMs: undefined, itlMs: undefined, ...told, latencyConcurrency: concurrency };
}

/** Less by chance alone is no news. */
function least(before: number | undefined, told: number | undefined): number | undefined {
  if (before === undefined || told === undefined) return before ?? told;
  return told * GAIN_MIN < before ? told : before;
}

/** What runs at all is one at least. */
const sequences = (concurrency: number): number => Math.max(1, Math.round(concurrency));

/** Two digits behind the point: nobody reads more, and each other digit would be a write. */
const rounded = (value: number): number => Math.round(value * 100) / 100;

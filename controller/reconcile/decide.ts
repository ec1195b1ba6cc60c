// What to do next for one group, from what is seen: same world, same decision. Owns the life of incarnations; owns no
// clock, no process and no memory beyond the record and the last status.
//
//   I1  an incarnation is recorded as begun before its first worker starts, and as ended before its survivors are stopped.
//   I2  no worker starts while one of another incarnation runs.
//   I3  whatever dies, fails, drains unasked or falls silent ends the whole incarnation: no half outlives it.
//   I4  failures are bounded: back-off doubles to a maximum; too many in a short time stop the group, with the cause.
//   I5  every wait has a bound: start, silence, lack of progress.
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { deviceCount, type Inventory } from "../plan/hardware.ts";
import { bringUp } from "./bring-up.ts";
import { FAILED_NODES_MAX, type Failure, type GroupRecord, type WorkerSeen, workerTitle } from "./cluster.ts";
import { type Draft, findingOf, isRunning, pushRecord, pushStart, stopAll } from "./draft.ts";
import { type Ended, whyEnded } from "./ended.ts";
import type { ReconcileLimits } from "./limits.ts";
import { Phase, secondsText, statusOf } from "./status.ts";
import type { Because, Decision, ServeGoal, World } from "./world.ts";

export function decide(world: World, limits: ReconcileLimits): Decision {
  const draft = draftFor(world, limits);
  const { finding } = draft;
  if (world.trouble !== undefined && finding.leaderAddress === "" && finding.phase !== Phase.DEGRADED) {
    finding.code = "action-failed";
    finding.cause = `${world.trouble.detail}; trying again`;
    finding.sinceMs = world.trouble.sinceMs;
  }
  const wakeMs = Math.max(world.nowMs + 1, Math.min(world.nowMs + limits.heartbeatMs, ...draft.wakes));
  return { actions: draft.actions, status: statusOf(finding, world.last, world.nowMs), wakeMs, because: draft.because };
}

function draftFor(world: World, limits: ReconcileLimits): Draft {
  switch (world.goal.kind) {
    case "serve":
      return serve(world, world.goal, limits);
    case "infeasible":
      return wind(world, limits.drainMs, { phase: Phase.INFEASIBLE, code: "infeasible", cause: world.goal.detail });
    case "stop":
      return wind(world, world.goal.graceMs, { phase: Phase.STOPPED, code: "stopped", cause: "stopped" });
    default:
      throw new Error(`unreachable: goal ${JSON.stringify(world.goal satisfies never)}`);
  }
}

/** Nothing may run. The record moves on first, so that a controller that dies here is followed by one that goes on. */
function wind(world: World, graceMs: number, end: { phase: Phase; code: string; cause: string }): Draft {
  const { record, workers } = world.seen;
  const running = workers.filter(isRunning);
  const next = record.begun ? successor(record, record.revision, world.nowMs) : record;
  const draft: Draft = {
    actions: [],
    because: [],
    wakes: [],
    finding: findingOf(next, end.phase, end.code, end.cause),
  };
  if (record.begun) pushRecord(draft, world, next);
  stopAll(draft, running, graceMs, { code: end.code, text: end.cause });
  if (running.length > 0 && end.phase === Phase.STOPPED) {
    draft.finding.code = "stopping";
    draft.finding.cause = `${running.length} ${running.length === 1 ? "worker ends" : "workers end"} what they have begun`;
  }
  return draft;
}

/** An incarnation that follows without a failure. */
function successor(record: GroupRecord, revision: string, nowMs: number): GroupRecord {
  return {
    incarnation: record.incarnation + 1n,
    revision,
    begun: false,
    failures: [],
    notBeforeMs: nowMs,
    restarts: record.restarts,
    failedNodes: record.failedNodes,
  };
}

function serve(world: World, goal: ServeGoal, limits: ReconcileLimits): Draft {
  const { record, workers } = world.seen;
  const own: (WorkerSeen | undefined)[] = Array.from({ length: goal.plan.workers }, (_, index) =>
    workers.find((seen) => seen.name.incarnation === record.incarnation && seen.name.worker === index),
  );
  const others = workers.filter((seen) => isRunning(seen) && !own.includes(seen));
  const [newest] = others.map((seen) => seen.name.incarnation).sort((one, other) => (one < other ? 1 : -1));
  const draft: Draft = { actions: [], because: [], wakes: [], finding: findingOf(record, Phase.SCHEDULING, "", "") };

  if (newest !== undefined && newest > record.incarnation) {
    // The record is older than what runs: it was lost. Whatever is out there is fenced off by a still newer number.
    const lostRecord = { ...record, incarnation: newest };
    return replace(draft, world, successor(lostRecord, goal.plan.revision, world.nowMs), {
      code: "record-behind",
      text: `incarnation ${newest} runs, the record says ${record.incarnation}; all of it is replaced`,
    });
  }
  if (record.begun && record.revision !== goal.plan.revision) {
    return replace(
      draft,
      world,
      successor(record, goal.plan.revision, world.nowMs),
      {
        code: "new-plan",
        text: `the plan has changed to ${goal.plan.revision.slice(0, 12)}; workers of the old one drain`,
      },
      limits.drainMs,
    );
  }
  stopAll(draft, others, limits.endGraceMs, { code: "stray", text: "a worker of another incarnation runs" });
  const hasOwn = own.some((seen) => seen !== undefined);
  if (!record.begun && !hasOwn) return begin(draft, world, goal, { limits, others });
  const ended = whyEnded(own, world, limits);
  if (ended !== undefined) return fail(draft, world, own, { limits, ended });
  return bringUp(draft, world, goal, { limits, own, others });
}

function replace(draft: Draft, world: World, next: GroupRecord, why: Because, graceMs = 0): Draft {
  pushRecord(draft, world, next);
  draft.because.push(why);
  stopAll(draft, world.seen.workers.filter(isRunning), graceMs, why);
  draft.finding = findingOf(next, Phase.SCHEDULING, why.code, why.text);
  return draft;
}

export function backoffMs(failures: number, limits: ReconcileLimits): number {
  if (failures === 0) return 0;
  return Math.min(limits.backoffMaxMs, limits.backoffBaseMs * 2 ** Math.min(failures - 1, 30));
}

/** Judged by the failures' own times, so that it stays true however long nobody looks (I4). */
export function hasGivenUp(failures: readonly Failure[], limits: ReconcileLimits): boolean {
  const recent = failures.slice(-limits.failuresMax);
  const first = recent[0];
  const last = recent.at(-1);
  if (first === undefined || last === undefined) return false;
  if (last.isFinal) return true;
  if (recent.length < limits.failuresMax) return false;
  return last.atMs - first.atMs <= limits.failuresWindowMs;
}

function fail(
  draft: Draft,
  world: World,
  own: readonly (WorkerSeen | undefined)[],
  { limits, ended }: { limits: ReconcileLimits; ended: Ended },
): Draft {
  const { record } = world.seen;
  const { detail, isFinal } = ended;
  const failures = [...record.failures, { atMs: world.nowMs, detail, isFinal }].slice(-limits.failuresMax);
  const next: GroupRecord = {
    ...record,
    incarnation: record.incarnation + 1n,
    begun: false,
    failures,
    notBeforeMs: world.nowMs + backoffMs(failures.length, limits),
    restarts: record.restarts + 1,
    failedNodes: withFailed(record.failedNodes, [...(world.seen.blamed ?? []), ...ended.blamed]),
  };
  pushRecord(draft, world, next);
  draft.because.push({ code: "incarnation-ended", text: `incarnation ${record.incarnation} ends: ${ended.detail}` });
  const survivors = own.filter((seen) => seen !== undefined).filter(isRunning);
  stopAll(draft, survivors, limits.endGraceMs, { code: "no-half-outlives", text: "the rest of it is stopped" });
  draft.wakes.push(next.notBeforeMs);
  return waitOrStop(draft, next, limits);
}

/** One incarnation counts once for each node; where there is no room, nodes that failed least often are forgotten. */
function withFailed(before: GroupRecord["failedNodes"], nodes: readonly string[]): GroupRecord["failedNodes"] {
  const counts = new Map(Object.entries(before));
  for (const node of new Set(nodes)) counts.set(node, (counts.get(node) ?? 0) + 1);
  const kept = [...counts].toSorted(([, one], [, other]) => other - one).slice(0, FAILED_NODES_MAX);
  return Object.fromEntries(kept);
}

/** Between two incarnations: a wait with its end, or the end of trying. */
function waitOrStop(draft: Draft, record: GroupRecord, limits: ReconcileLimits): Draft {
  const last = record.failures.at(-1);
  if (last === undefined) return draft;
  if (hasGivenUp(record.failures, limits)) {
    const first = record.failures[0] ?? last;
    const span = secondsText(last.atMs - first.atMs);
    const tried = last.isFinal ? "trying again cannot help" : `${record.failures.length} failures in ${span}`;
    const cause = `stopped trying (${tried}): ${last.detail}`;
    draft.finding = { ...findingOf(record, Phase.DEGRADED, "stopped-trying", cause), sinceMs: last.atMs };
    return draft;
  }
  const wait = secondsText(record.notBeforeMs - last.atMs);
  const cause = `${last.detail}; incarnation ${record.incarnation} starts ${wait} after that`;
  draft.finding = { ...findingOf(record, Phase.SCHEDULING, "restarting", cause), sinceMs: last.atMs };
  return draft;
}

/** Nothing of this incarnation exists yet. */
function begin(
  draft: Draft,
  world: World,
  goal: ServeGoal,
  { limits, others }: { limits: ReconcileLimits; others: readonly WorkerSeen[] },
): Draft {
  const { plan } = goal;
  const stored = world.seen.record;
  // Failures of another plan say nothing about this one.
  const record = stored.revision === plan.revision ? stored : { ...stored, failures: [], notBeforeMs: 0 };
  if (hasGivenUp(record.failures, limits)) return waitOrStop(draft, record, limits);
  if (others.length > 0) {
    const names = others.map((seen) => workerTitle(seen.name)).join(", ");
    draft.finding = findingOf(record, Phase.SCHEDULING, "waiting-for-end", `waiting for the end of ${names}`);
    return draft;
  }
  const short = capacityShort(plan, world.inventory);
  if (short !== undefined) {
    draft.finding = findingOf(record, Phase.CAPACITY_SHORT, "capacity-short", short);
    return draft;
  }
  if (world.nowMs < record.notBeforeMs) {
    draft.wakes.push(record.notBeforeMs);
    return waitOrStop(draft, record, limits);
  }
  pushRecord(draft, world, { ...record, revision: plan.revision, begun: true });
  for (let worker = 0; worker < plan.workers; worker++) pushStart(draft, world, worker);
  draft.because.push({ code: "begin", text: `incarnation ${record.incarnation} begins with ${plan.workers} workers` });
  const finding = findingOf(record, Phase.SCHEDULING, "starting", `starting ${plan.workers} workers`);
  // Each try anew: what was waited for before it could begin is no standing still.
  draft.finding = { ...finding, progress: `begins ${world.nowMs}` };
  return draft;
}

/** A CPU node takes any number of ranks, but a worker needs a node of its own. */
function capacityShort(plan: ShardPlan, inventory: Inventory): string | undefined {
  const nodes = inventory.nodes.length;
  if (nodes < plan.workers) return `${nodes} of ${plan.workers} nodes are there`;
  const isGpu = inventory.nodes.every((node) => node.kind === "gpu");
  const world = plan.cut?.world ?? plan.ranks.length;
  if (isGpu && deviceCount(inventory) < world) return `${deviceCount(inventory)} of ${world} devices are there`;
  return undefined;
}

// Why an incarnation is over, if it is. One rule: whatever is not as it must be ends all of it (I3, I5 of decide.ts).
import { Fault_Kind, WorkerPhase } from "../../proto/gen/muster/v1/worker.ts";
import type { StepsSeen, WorkerSeen, WorkerView } from "./cluster.ts";
import type { ReconcileLimits } from "./limits.ts";
import { Phase, secondsText } from "./status.ts";
import type { World } from "./world.ts";

/** `blamed`: nodes by whose fault. */
export type Ended = { detail: string; isFinal: boolean; blamed: readonly string[] };

type Why = { detail: string; blamed: readonly string[] };

/** `own`: by worker index, undefined where none is seen. Undefined: it goes on. */
export function whyEnded(
  own: readonly (WorkerSeen | undefined)[],
  world: World,
  limits: ReconcileLimits,
): Ended | undefined {
  const why = whyOver(own, world, limits);
  return why && { ...why, isFinal: own.some(isRefused) };
}

/** What is invalid now is invalid again: a file that is not there, a format nobody reads. */
function isRefused(seen: WorkerSeen | undefined): boolean {
  if (seen?.state.kind !== "running" || seen.state.view.kind !== "described") return false;
  const { phase, fault } = seen.state.view.description;
  return phase === WorkerPhase.FAILED && fault?.kind === Fault_Kind.INVALID;
}

function whyOver(own: readonly (WorkerSeen | undefined)[], world: World, limits: ReconcileLimits): Why | undefined {
  const nobody = (detail: string): Why => ({ detail, blamed: [] });
  const furthest = Math.max(0, ...own.map(phaseOf));
  if (own.every((seen) => seen === undefined)) {
    return nobody(world.trouble?.detail ?? "all of its workers are gone without a trace");
  }
  for (const [worker, seen] of own.entries()) {
    const why = seen === undefined ? whyMissing(furthest) : whyLost(worker, seen, { world, limits, furthest });
    if (why !== undefined) return { detail: `worker ${worker} ${why}`, blamed: nodeOfSilent(seen) };
  }
  const behind = whyBehind(own, world, limits);
  if (behind !== undefined) return behind;
  const detail = whyDisagreeing(own) ?? whyStalled(world, limits);
  return detail === undefined ? undefined : nobody(detail);
}

/** Whoever ends says why; whoever only falls silent may have lost its node. */
function nodeOfSilent(seen: WorkerSeen | undefined): string[] {
  const isSilent = seen?.state.kind === "running" && seen.state.view.kind === "silent";
  return isSilent && seen.node !== undefined ? [seen.node] : [];
}

function phaseOf(seen: WorkerSeen | undefined): WorkerPhase {
  if (seen?.state.kind !== "running") return WorkerPhase.UNSPECIFIED;
  const { view } = seen.state;
  const description = view.kind === "described" ? view.description : view.last;
  // Its number is higher than those of the phases that follow it.
  return description?.phase === WorkerPhase.PULLING
    ? WorkerPhase.LOADING
    : (description?.phase ?? WorkerPhase.UNSPECIFIED);
}

/** Before anybody has been told of it, a worker that is not there was just not started yet. */
function whyMissing(furthest: number): string | undefined {
  return furthest > WorkerPhase.IDLE ? "is gone without a trace" : undefined;
}

type Around = { world: World; limits: ReconcileLimits; furthest: number };

function whyLost(worker: number, seen: WorkerSeen, around: Around): string | undefined {
  if (seen.state.kind === "exited") {
    const { code, signal, detail } = seen.state;
    const how = signal === null ? `exited with code ${code ?? "unknown"}` : `was ended by ${signal}`;
    return detail === "" ? how : `${how}: ${detail}`;
  }
  return whySilent(seen.state.view, around) ?? whyWrong(worker, seen, around);
}

function whySilent(view: WorkerView, { world, limits }: Around): string | undefined {
  if (view.kind !== "silent") return undefined;
  const silentMs = world.nowMs - view.sinceMs;
  if (silentMs < (view.last === undefined ? limits.startMs : limits.silentMs)) return undefined;
  return `has not answered for ${secondsText(silentMs)}: ${view.detail}`;
}

function whyWrong(worker: number, seen: WorkerSeen, { world, furthest }: Around): string | undefined {
  if (seen.state.kind !== "running" || seen.state.view.kind !== "described") return undefined;
  const { description } = seen.state.view;
  const { incarnation } = world.seen.record;
  if (description.incarnation !== incarnation || description.worker !== worker) {
    return `says that it is worker ${description.worker} of incarnation ${description.incarnation}, not of ${incarnation}`;
  }
  switch (description.phase) {
    case WorkerPhase.FAILED: {
      const { fault } = description;
      const field = fault === undefined || fault.field === "" ? "" : `${fault.field}: `;
      return `has failed: ${field}${fault?.detail ?? "it does not say why"}`;
    }
    case WorkerPhase.DRAINING:
      return "drains without having been asked";
    case WorkerPhase.IDLE:
      // Nobody gets to warming without links to all others: this one was there and has lost its state.
      return furthest >= WorkerPhase.WARMING ? "has lost its state" : undefined;
    default:
      return undefined;
  }
}

/** What a switch of experts adds: workers make it in one step, but are not asked in one moment. */
const EXPERTS_MARK = /-x[0-9a-f]{12}$/;

function whyDisagreeing(own: readonly (WorkerSeen | undefined)[]): string | undefined {
  const ids = new Set<string>();
  for (const seen of own) {
    if (seen?.state.kind !== "running" || seen.state.view.kind !== "described") continue;
    const { phase, numericsId } = seen.state.view.description;
    if (phase === WorkerPhase.SERVING) ids.add(numericsId.replace(EXPERTS_MARK, ""));
  }
  return ids.size > 1 ? `its workers do not compute alike: ${[...ids].join(" and ")}` : undefined;
}

/** How long a group may stand still in this phase. */
export function stallMsOf(phase: Phase, { stall }: ReconcileLimits): number {
  switch (phase) {
    case Phase.PULLING:
      return stall.pullMs;
    case Phase.LOADING:
      return stall.loadMs;
    case Phase.CONNECTING:
      return stall.connectMs;
    case Phase.WARMING:
      return stall.warmMs;
    default:
      return stall.startMs;
  }
}

function whyStalled({ last, nowMs, seen }: World, limits: ReconcileLimits): string | undefined {
  if (last === undefined || last.incarnation !== seen.record.incarnation || last.leaderAddress !== "") return undefined;
  const standingMs = nowMs - last.progressMs;
  if (standingMs < stallMsOf(last.phase, limits)) return undefined;
  return `nothing has moved for ${secondsText(standingMs)} (${last.cause})`;
}

/**
 * The rank that holds up a step. Ranks compute in lockstep: within a step all stand still with the one that does, so the
 * lowest epoch names it, and where several are lowest the one whose worker does not answer. A leader that has fallen silent
 * itself says nothing of the others any more: it is named. Where all are level and answer the step is long, or the engine
 * knows better: it names whoever has not arrived by its own bound.
 */
function whyBehind(own: readonly (WorkerSeen | undefined)[], world: World, limits: ReconcileLimits): Why | undefined {
  const { steps } = world.seen;
  if (steps === undefined || !steps.isPending || world.goal.kind !== "serve") return undefined;
  const standingMs = world.nowMs - steps.sinceMs;
  if (standingMs < limits.stepMs) return undefined;
  const workers = world.goal.plan.ranks.map(({ worker }) => worker);
  const rank = rankBehind(own, workers, steps, world.nowMs - steps.saidMs >= limits.quietMs);
  if (rank === undefined) return undefined;
  const worker = workers[rank] ?? 0;
  const node = own[worker]?.node;
  const where = node === undefined ? `of worker ${worker}` : `on node ${node}`;
  const step = (steps.epochs[rank] ?? 0n) + 1n;
  const detail = `rank ${rank} ${where} has not finished step ${step} for ${secondsText(standingMs)}`;
  return { detail, blamed: node === undefined ? [] : [node] };
}

function rankBehind(
  own: readonly (WorkerSeen | undefined)[],
  workers: readonly number[],
  { epochs, isHeard }: StepsSeen,
  isQuiet: boolean,
): number | undefined {
  const isSilent = (worker: number): boolean => {
    const state = own[worker]?.state;
    return state?.kind === "running" && state.view.kind === "silent";
  };
  // What it said last is old: another may have been behind for a moment only.
  if (isQuiet || !isHeard) return isSilent(0) ? Math.max(0, workers.indexOf(0)) : undefined;
  const all = workers.map((worker, rank) => ({ worker, rank, epoch: epochs[rank] ?? 0n }));
  const [least = 0n] = all.map(({ epoch }) => epoch).toSorted((one, other) => (one < other ? -1 : 1));
  const behind = all.filter(({ epoch }) => epoch === least);
  const named = behind.find(({ worker }) => isSilent(worker));
  return (named ?? (behind.length < all.length ? behind[0] : undefined))?.rank;
}

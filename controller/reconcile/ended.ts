// Why an incarnation is over, if it is. One rule: whatever is not as it must be ends all of it (I3, I5 of decide.ts).
import { Fault_Kind, WorkerPhase } from "../../proto/gen/muster/v1/worker.ts";
import type { WorkerSeen, WorkerView } from "./cluster.ts";
import type { ReconcileLimits } from "./limits.ts";
import { secondsText } from "./status.ts";
import type { World } from "./world.ts";

export type Ended = { detail: string; isFinal: boolean };

/** `own`: by worker index, undefined where none is seen. Undefined: it goes on. */
export function whyEnded(
  own: readonly (WorkerSeen | undefined)[],
  world: World,
  limits: ReconcileLimits,
): Ended | undefined {
  const detail = whyOver(own, world, limits);
  return detail === undefined ? undefined : { detail, isFinal: own.some(isRefused) };
}

/** What is invalid now is invalid again: a file that is not there, a format nobody reads. */
function isRefused(seen: WorkerSeen | undefined): boolean {
  if (seen?.state.kind !== "running" || seen.state.view.kind !== "described") return false;
  const { phase, fault } = seen.state.view.description;
  return phase === WorkerPhase.FAILED && fault?.kind === Fault_Kind.INVALID;
}

function whyOver(own: readonly (WorkerSeen | undefined)[], world: World, limits: ReconcileLimits): string | undefined {
  const furthest = Math.max(0, ...own.map(phaseOf));
  if (own.every((seen) => seen === undefined)) {
    return world.trouble?.detail ?? "all of its workers are gone without a trace";
  }
  for (const [worker, seen] of own.entries()) {
    const why = seen === undefined ? whyMissing(furthest) : whyLost(worker, seen, { world, limits, furthest });
    if (why !== undefined) return `worker ${worker} ${why}`;
  }
  return whyDisagreeing(own) ?? whyStalled(world, limits);
}

function phaseOf(seen: WorkerSeen | undefined): WorkerPhase {
  if (seen?.state.kind !== "running") return WorkerPhase.UNSPECIFIED;
  const { view } = seen.state;
  const description = view.kind === "described" ? view.description : view.last;
  return description?.phase ?? WorkerPhase.UNSPECIFIED;
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

function whyDisagreeing(own: readonly (WorkerSeen | undefined)[]): string | undefined {
  const ids = new Set<string>();
  for (const seen of own) {
    if (seen?.state.kind !== "running" || seen.state.view.kind !== "described") continue;
    const { phase, numericsId } = seen.state.view.description;
    if (phase === WorkerPhase.SERVING) ids.add(numericsId);
  }
  return ids.size > 1 ? `its workers do not compute alike: ${[...ids].join(" and ")}` : undefined;
}

function whyStalled({ last, nowMs, seen }: World, limits: ReconcileLimits): string | undefined {
  if (last === undefined || last.incarnation !== seen.record.incarnation || last.leaderAddress !== "") return undefined;
  const standingMs = nowMs - last.progressMs;
  if (standingMs < limits.stallMs) return undefined;
  return `nothing has moved for ${secondsText(standingMs)} (${last.cause})`;
}

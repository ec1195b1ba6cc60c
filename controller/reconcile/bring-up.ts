// The way of an incarnation that is whole so far: start, Load, connect, warm up, serve. Owns what is said about it; whether
// it is still whole was decided before (ended.ts).
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { type WorkerDescription, WorkerPhase } from "../../proto/gen/muster/v1/worker.ts";
import type { WorkerSeen } from "./cluster.ts";
import { type Draft, pushRecord, pushStart } from "./draft.ts";
import { stallMsOf } from "./ended.ts";
import type { ReconcileLimits } from "./limits.ts";
import { loadRequest } from "./load.ts";
import { bytesText, type Finding, Phase, secondsText } from "./status.ts";
import type { ServeGoal, World } from "./world.ts";

export type Whole = {
  limits: ReconcileLimits;
  /** By worker index, undefined where it was not started yet. */
  own: readonly (WorkerSeen | undefined)[];
  /** Running workers of other incarnations. */
  others: readonly WorkerSeen[];
};

export function bringUp(draft: Draft, world: World, goal: ServeGoal, whole: Whole): Draft {
  const { record } = world.seen;
  const told = tally(whole.own, goal.plan);
  draft.finding = { ...draft.finding, ...told.figures };
  const say = (phase: Phase, code: string, cause: string): Draft => {
    draft.finding = { ...draft.finding, phase, code, cause };
    return draft;
  };
  for (const wake of deadlines(world, whole)) draft.wakes.push(wake);
  if (told.missing.length > 0) {
    if (whole.others.length > 0)
      return say(Phase.SCHEDULING, "waiting-for-end", "waiting for the end of an older incarnation");
    for (const worker of told.missing) pushStart(draft, world, worker);
    draft.because.push({ code: "start-missing", text: "not all workers of the incarnation were started yet" });
    return say(Phase.SCHEDULING, "starting", `starting worker ${told.missing.join(", ")}`);
  }
  const addresses = whole.own.map((seen) => seen?.address ?? "");
  if (told.phases.every((phase) => phase === WorkerPhase.SERVING)) {
    draft.finding.leaderAddress = addresses[0] ?? "";
    draft.finding.numericsId = told.descriptions[0]?.numericsId ?? "";
    return serving(draft, world, told, { limits: whole.limits, say });
  }
  if (told.silent.length > 0) {
    return say(Phase.SCHEDULING, "not-answering", `waiting for worker ${told.silent.join(", ")} to answer`);
  }
  const comm = told.descriptions.map((description) => description?.commAddress ?? "");
  const idle = told.phases.flatMap((phase, worker) => (phase === WorkerPhase.IDLE ? [worker] : []));
  if (idle.length > 0 && comm.some((address) => address === "")) {
    return say(Phase.SCHEDULING, "no-comm-address", "waiting for the workers to open their links");
  }
  for (const worker of idle) {
    const name = { group: world.seen.group, incarnation: record.incarnation, worker };
    const request = loadRequest(goal, name, { comm, workers: addresses });
    draft.actions.push({ kind: "load-worker", name, request });
  }
  if (idle.length > 0)
    draft.because.push({ code: "load", text: `worker ${idle.join(", ")} gets its part of the model` });
  return loading(draft, world, told, say);
}

type Tally = {
  missing: number[];
  silent: number[];
  phases: WorkerPhase[];
  descriptions: (WorkerDescription | undefined)[];
  figures: Pick<Finding, "readyRanks" | "bytesLoaded" | "bytesTotal" | "progress">;
};

function tally(own: readonly (WorkerSeen | undefined)[], plan: ShardPlan): Tally {
  const told: Tally = {
    missing: [],
    silent: [],
    phases: [],
    descriptions: [],
    figures: { readyRanks: 0, bytesLoaded: 0n, bytesTotal: 0n, progress: "" },
  };
  for (const [worker, seen] of own.entries()) {
    const view = seen?.state.kind === "running" ? seen.state.view : undefined;
    const description = view?.kind === "described" ? view.description : view?.last;
    const phase = description?.phase ?? WorkerPhase.UNSPECIFIED;
    told.descriptions.push(description);
    told.phases.push(phase);
    if (view === undefined) told.missing.push(worker);
    if (view?.kind === "silent") told.silent.push(worker);
    const ranks = plan.ranks.filter((rank) => rank.worker === worker).length;
    if (view?.kind === "described" && phase === WorkerPhase.SERVING) told.figures.readyRanks += ranks;
    told.figures.bytesLoaded += description?.bytesLoaded ?? 0n;
    told.figures.bytesTotal += description?.bytesTotal ?? 0n;
    told.figures.progress += `${phase}:${description?.bytesLoaded ?? ""}:${description?.commAddress ?? ""};`;
  }
  return told;
}

/** When a silent worker becomes a lost one, and when standing still becomes a failure (I5). */
function deadlines(world: World, { limits, own }: Whole): number[] {
  const wakes: number[] = [];
  for (const seen of own) {
    if (seen?.state.kind !== "running" || seen.state.view.kind !== "silent") continue;
    const { sinceMs, last } = seen.state.view;
    wakes.push(sinceMs + (last === undefined ? limits.startMs : limits.silentMs));
  }
  if (world.last?.incarnation === world.seen.record.incarnation && world.last.phase !== Phase.SERVING) {
    wakes.push(world.last.progressMs + stallMsOf(world.last.phase, limits));
  }
  if (world.seen.steps?.isPending === true) {
    const judgedMs = world.seen.steps.sinceMs + limits.stepMs;
    if (judgedMs > world.nowMs) wakes.push(judgedMs);
  }
  return wakes;
}

type Say = (phase: Phase, code: string, cause: string) => Draft;

function serving(
  draft: Draft,
  world: World,
  told: Tally,
  { limits, say }: { limits: ReconcileLimits; say: Say },
): Draft {
  const { record } = world.seen;
  const sinceMs =
    world.last?.incarnation === record.incarnation && world.last.leaderAddress !== ""
      ? world.last.progressMs
      : world.nowMs;
  if (record.failures.length > 0) {
    if (world.nowMs - sinceMs >= limits.stableMs) {
      pushRecord(draft, world, { ...record, begun: true, failures: [] });
      draft.because.push({
        code: "stable",
        text: `serving for ${secondsText(limits.stableMs)}: failures are forgotten`,
      });
    } else draft.wakes.push(sinceMs + limits.stableMs);
  }
  if (told.silent.length > 0) {
    return say(
      Phase.DEGRADED,
      "not-answering",
      `worker ${told.silent.join(", ")} does not answer; streams go on while its links stand`,
    );
  }
  return say(Phase.SERVING, "serving", `all ${told.figures.readyRanks} ranks serve`);
}

/** Files come to the workers before they can be read: their headers alone are known here. */
const isRemote = ({ goal }: World): boolean =>
  goal.kind === "serve" && (goal.plan.model?.files.some(({ path }) => path === "") ?? false);

/** The group is as far as its slowest worker. */
function loading(draft: Draft, world: World, told: Tally, say: Say): Draft {
  const { bytesLoaded, bytesTotal } = told.figures;
  const isAt = (phase: WorkerPhase): boolean => told.phases.includes(phase);
  const isPulling = isAt(WorkerPhase.PULLING) || (isAt(WorkerPhase.IDLE) && isRemote(world));
  if (isPulling || isAt(WorkerPhase.IDLE) || isAt(WorkerPhase.LOADING)) {
    const code = isPulling ? "pulling" : "loading";
    const sinceMs = world.last?.code === code ? world.last.sinceMs : world.nowMs;
    const elapsed = world.nowMs - sinceMs;
    const rest = Number(bytesTotal - bytesLoaded);
    const eta = elapsed >= 2000 && bytesLoaded > 0n ? (rest * elapsed) / Number(bytesLoaded) : undefined;
    if (eta !== undefined) draft.finding.etaMs = world.nowMs + eta;
    const tail = eta === undefined ? "" : `, about ${secondsText(eta)} left`;
    const done = `${bytesText(bytesLoaded)} of ${bytesText(bytesTotal)} are ${isPulling ? "pulled" : "loaded"}`;
    const phase = isPulling ? Phase.PULLING : Phase.LOADING;
    return say(phase, code, `${bytesTotal > 0n ? done : "files are being opened"}${tail}`);
  }
  if (isAt(WorkerPhase.CONNECTING)) {
    const waiting = told.phases.flatMap((phase, worker) => (phase === WorkerPhase.CONNECTING ? [worker] : []));
    return say(Phase.CONNECTING, "connecting", `worker ${waiting.join(", ")} connects to the other ranks`);
  }
  return say(Phase.WARMING, "warming", "first steps run before requests are taken");
}

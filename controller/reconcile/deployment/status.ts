// The status of an owner, whole: phase and cause, conditions, columns, notices. Pure; the same world makes the same status,
// so that a look that shows nothing new writes nothing.
import {
  type Condition,
  type ConditionType,
  PHASES,
  type PhaseName,
  setCause,
  setCondition,
} from "../../api/conditions.ts";
import { draftPoolStatus } from "../../api/draft-pool.ts";
import { sloNotices } from "../../api/mapping.ts";
import { LABELS } from "../../api/meta.ts";
import { modelDeploymentStatus, type Notice } from "../../api/model-deployment.ts";
import { planColumn, spanText, throughputColumn } from "./columns.ts";
import type { Finding, Standing } from "./finding.ts";
import type { Pairing } from "./pairing.ts";
import { isPlaced, isServing } from "./rollout.ts";
import { betterPlan, type Chosen } from "./stored-plan.ts";
import type { OwnerKind, OwnerWish } from "./wish.ts";
import type { DeploymentWorld, GroupView, OwnerStatus, StoredPlan } from "./world.ts";

const NOTICES_MAX = 64;
const TARGETS_MAX = 256;
const MESSAGE_MAX = 2048;

export type Told = {
  finding: Finding;
  wish: OwnerWish;
  standing: Standing;
  pairing: Pairing | undefined;
  nextOrdinal: number;
  targetReplicas: number | undefined;
};

export function statusOf(world: DeploymentWorld, told: Told): OwnerStatus {
  const { owner, nowMs, groups } = world;
  const { wish, standing, finding } = told;
  const before = owner.status;
  const { phase, cause } = setCause(knownCause(before), finding, nowMs);
  const plan = planOf(standing.chosen);
  const inUse = plan ?? planInUse(world, standing.staying);
  const ready = numbers(standing, inUse, groups);
  const status: OwnerStatus = {
    observedGeneration: owner.generation,
    phase,
    cause,
    conditions: [...conditionsOf(world, told)],
    nextOrdinal: told.nextOrdinal,
    selector: `${wish.kind === "DraftPool" ? LABELS.pool : LABELS.deployment}=${owner.name}`,
    ...ready,
    ...(told.targetReplicas === undefined ? {} : { targetReplicas: told.targetReplicas }),
    ...(inUse === undefined ? {} : planFields(inUse, standing.wanted)),
    ...updated(told),
    ...etaOf(finding, nowMs),
    ...(told.pairing === undefined ? {} : { speculation: told.pairing.speculation }),
    ...noticesOf(world, told, plan),
  };
  return wish.kind === "DraftPool" ? withPool(status, world, inUse) : status;
}

/** Only what the kind has: what it has not an API server would drop, and the status would never be as it was written. */
export function statusFor(kind: OwnerKind, status: OwnerStatus): unknown {
  const known = kind === "DraftPool" ? draftPoolStatus.parse(status) : modelDeploymentStatus.parse(status);
  return JSON.parse(JSON.stringify(known));
}

/** For a spec that cannot be read: everything else stands as it was. */
export function refusedStatus(world: DeploymentWorld, finding: Finding): OwnerStatus {
  const { owner, nowMs } = world;
  const before = owner.status;
  const message = finding.cause.message;
  const condition = { type: "Planned", status: "False", reason: "Refused", message } as const;
  const observedGeneration = owner.generation;
  return {
    ...before,
    observedGeneration,
    ...setCause(knownCause(before), finding, nowMs),
    conditions: [...setCondition(before.conditions ?? [], { ...condition, observedGeneration }, nowMs)],
  };
}

function knownCause({ phase, cause }: OwnerStatus) {
  return phase === undefined || cause === undefined ? undefined : { phase, cause };
}

export function planOf(chosen: Chosen): StoredPlan | undefined {
  return chosen.kind === "stored" ? chosen.plan : undefined;
}

/** While the plan of a new wish is not there the columns show what serves. */
function planInUse(world: DeploymentWorld, staying: readonly GroupView[]): StoredPlan | undefined {
  const names = new Set(staying.map(({ spec }) => spec.plan));
  return world.plans.find(({ name }) => names.has(name));
}

function planFields({ name, spec }: StoredPlan, wanted: number): Partial<OwnerStatus> {
  const { model, revision, cut } = spec;
  const { source, digest, format, family, parameters } = model;
  return {
    planName: name,
    revision,
    plan: planColumn(cut, wanted),
    model: { source, digest, format, family, parameters },
  };
}

function numbers({ wanted, staying }: Standing, plan: StoredPlan | undefined, all: readonly GroupView[]) {
  const world = plan?.spec.cut.world ?? 0;
  const ranks = wanted * world;
  const sum = (values: readonly (number | undefined)[]) =>
    values.reduce<number>((total, value) => total + (value ?? 0), 0);
  // A surge has more than are wanted; the column never says 20/16.
  const readyRanks = Math.min(ranks, sum(staying.map(({ status }) => status.readyRanks)));
  const tokensPerSecond = sum(staying.map(({ status }) => status.tokensPerSecond));
  const isMeasured = staying.some(({ status }) => status.tokensPerSecond !== undefined);
  return {
    replicas: all.length,
    readyReplicas: staying.filter(isServing).length,
    readyRanks,
    ranks,
    ready: `${readyRanks}/${ranks}`,
    ...(isMeasured ? { tokensPerSecond, throughput: throughputColumn(tokensPerSecond) } : {}),
  };
}

function updated({ standing, wish }: Told): Partial<OwnerStatus> {
  const { staying, steps, wanted, shortage } = standing;
  if (steps.old === 0 || planOf(standing.chosen) === undefined) return {};
  const replaced = staying.filter((group) => group.spec.plan === wish.planName && isServing(group)).length;
  const text = `${replaced} of ${wanted} replaced${shortage === undefined ? "" : ", short"}`;
  return { updated: text.slice(0, 64) };
}

function etaOf({ phase, cause }: Finding, nowMs: number): Partial<OwnerStatus> {
  const atMs = Date.parse(cause.eta ?? "");
  return phase === "Serving" || Number.isNaN(atMs) ? {} : { eta: spanText(Math.max(0, atMs - nowMs)) };
}

function noticesOf(world: DeploymentWorld, told: Told, plan: StoredPlan | undefined): Partial<OwnerStatus> {
  const { wish, pairing, standing } = told;
  const { shortage } = standing;
  const notices: Notice[] = [
    ...wish.notYet,
    ...refusedPods(wish, standing),
    ...(pairing?.notices ?? []),
    ...(plan === undefined ? [] : sloNotices(wish.slo, plan.spec.prediction)),
    ...(shortage === undefined ? [] : [{ field: "spec.rollout", kind: "Needed" as const, message: shortage }]),
    ...world.needs,
  ];
  const shown = notices.slice(0, NOTICES_MAX).map((one) => ({ ...one, message: one.message.slice(0, MESSAGE_MAX) }));
  return shown.length === 0 ? {} : { notices: shown };
}

/** What the server has answered to a dry-run create of a pod of this patch. A quota is not the patch's fault. */
function refusedPods({ hasPodPatch }: OwnerWish, { staying }: Standing): Notice[] {
  const causes = staying.flatMap(({ status }) => (status.cause?.code === "pod-refused" ? [status.cause.message] : []));
  const message = causes.find((each) => !each.includes("exceeded quota"));
  return hasPodPatch && message !== undefined ? [{ field: "spec.podPatch", kind: "Refused", message }] : [];
}

function withPool(status: OwnerStatus, world: DeploymentWorld, plan: StoredPlan | undefined): OwnerStatus {
  const vocabulary = plan?.spec.model.vocabulary;
  const fits = world.targets.filter((target) => vocabulary !== undefined && target.vocabulary === vocabulary);
  const targets = fits
    .map(({ name }) => name)
    .toSorted()
    .slice(0, TARGETS_MAX);
  return { ...status, targets, ...(vocabulary === undefined ? {} : { vocabulary }) };
}

// ---- conditions ----

type Said = { status: "True" | "False" | "Unknown"; reason: string; message: string };

function conditionsOf(world: DeploymentWorld, told: Told): readonly Condition[] {
  const { owner, nowMs } = world;
  const { standing, finding, wish } = told;
  const said: [ConditionType, Said][] = [
    ["Planned", planned(standing, wish)],
    ["Placed", reached(standing, "Placed", isPlaced)],
    ["Loaded", reached(standing, "Loaded", hasLoaded)],
    ["Serving", serving(standing, finding)],
    ["Degraded", degraded(finding)],
    ...better(world, standing),
  ];
  // BetterPlan goes with the plan that it was about.
  const known = (owner.status.conditions ?? []).filter(({ type }) => said.some(([name]) => name === type));
  return said.reduce<readonly Condition[]>(
    (list, [type, one]) => setCondition(list, { type, ...one, observedGeneration: owner.generation }, nowMs),
    known,
  );
}

function planned({ chosen }: Standing, wish: OwnerWish): Said {
  if (chosen.kind === "stored") {
    const { spec } = chosen.plan;
    const why = spec.reasons.find(({ kind }) => kind === "Chosen")?.text ?? planColumn(spec.cut, 1);
    return { status: "True", reason: "Planned", message: `${wish.planName}: ${why}` };
  }
  if (chosen.kind === "to-store") return { status: "Unknown", reason: "Planning", message: "the plan is being stored" };
  const { why } = chosen;
  switch (why?.kind) {
    case "infeasible": {
      const text = why.reasons.map((each) => each.text).join(" ");
      return { status: "False", reason: "Infeasible", message: `${text} Remedy: ${why.remedy ?? "none was found"}.` };
    }
    case "refused":
      return { status: "False", reason: "Refused", message: `${why.fault.field}: ${why.fault.detail}` };
    case "failed":
      return { status: "Unknown", reason: "SourceUnreadable", message: why.detail };
    default:
      return { status: "Unknown", reason: "Planning", message: "the headers are read and cuts are compared" };
  }
}

const hasLoaded = ({ status }: GroupView): boolean =>
  status.phase !== undefined &&
  PHASES.indexOf(status.phase) >= PHASES.indexOf("Connecting") &&
  status.phase !== "Stopped";

function reached({ wanted, staying }: Standing, reason: string, has: (group: GroupView) => boolean): Said {
  if (wanted === 0) return { status: "False", reason: "NoneWanted", message: "no replicas are wanted" };
  const count = staying.filter(has).length;
  if (count >= wanted) return { status: "True", reason, message: `all ${wanted} replicas` };
  const waits = staying.find((group) => !has(group));
  const cause = waits?.status.cause?.message;
  const rest = waits === undefined ? "" : `; ${waits.name}${cause === undefined ? " is awaited" : `: ${cause}`}`;
  return {
    status: "False",
    reason: waits?.status.phase ?? "Waiting",
    message: `${count} of ${wanted} replicas${rest}`,
  };
}

function serving({ wanted, staying }: Standing, { phase }: Finding): Said {
  const count = staying.filter(isServing).length;
  const message = `${count} of ${wanted} replicas serve`;
  if (count > 0) return { status: "True", reason: "Serving", message };
  return { status: "False", reason: phase, message };
}

function degraded({ phase, cause }: Finding): Said {
  const reason = cause.code === "no-replacement" ? "NoReplacement" : "ReplicaLost";
  if (phase === "Degraded") return { status: "True", reason, message: cause.message };
  return { status: "False", reason: "AsExpected", message: "" };
}

function better(world: DeploymentWorld, { chosen }: Standing): [ConditionType, Said][] {
  const plan = planOf(chosen);
  if (plan === undefined) return [];
  const text = betterPlan(plan, world.better);
  if (text !== undefined) return [["BetterPlan", { status: "True", reason: "MoreTokensPerSecond", message: text }]];
  const before = world.owner.status.conditions?.find(({ type }) => type === "BetterPlan");
  if (before === undefined || world.owner.status.planName !== plan.name) return [];
  // Not looked at again yet (a new leader): what was found stands while it is about this plan.
  const { status, reason, message } = before;
  if (world.better === undefined) return [["BetterPlan", { status, reason, message }]];
  return [
    ["BetterPlan", { status: "False", reason: "NoneKnown", message: "the stored plan is the best that is known" }],
  ];
}

/** Phases and words that a person waits for: a change of these is written at once, numbers later. */
export function headline(status: OwnerStatus): string {
  const { phase, cause, conditions = [], observedGeneration, planName, nextOrdinal, targetReplicas } = status;
  const states = conditions.map((one): [ConditionType, string] => [one.type, one.status]);
  const shown: [PhaseName | undefined, string | undefined] = [phase, cause?.code];
  const { readyReplicas, replicas } = status;
  return JSON.stringify([
    shown,
    states,
    observedGeneration,
    planName,
    nextOrdinal,
    targetReplicas,
    readyReplicas,
    replicas,
  ]);
}

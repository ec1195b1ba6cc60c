// What is to be done for one owner of groups: a pure function of what is seen. The reads before it and the writes after it are
// controller/kube/owners/deployments.ts. Level-triggered: it can be cut off after any action and begun anew.
//
//   E1  a plan is made only for a question that has none stored, and never changed (stored-plan.ts).
//   E2  an object of the owner that cannot be read, or a spec that is refused, changes nothing that runs (R8).
//   E3  every name follows from content: doing an action again changes nothing.
//   E4  an ordinal is written down in the status before its group may be deleted: none is used twice.
import { autoscale, freshState, type ScaleState } from "../autoscale.ts";
import type { Because } from "../world.ts";
import { expectedTokensPerSecond } from "./calibration.ts";
import { spanText } from "./columns.ts";
import { eventsBetween } from "./events.ts";
import { findingOf, refusedFinding, type Standing } from "./finding.ts";
import { type Pairing, pairing } from "./pairing.ts";
import { goneByMs, groupsThatFit, nextSteps, type Steps, surgeMax } from "./rollout.ts";
import { planOf, refusedStatus, statusOf } from "./status.ts";
import { type Chosen, choosePlan, plansToDelete } from "./stored-plan.ts";
import { DRAFT_POOL, DRAIN_UNTIL, groupName, type OwnerWish } from "./wish.ts";
import type {
  DeploymentAction,
  DeploymentDecision,
  DeploymentWorld,
  GroupView,
  OwnerStatus,
  StoredPlan,
} from "./world.ts";

/** Look again even if nothing changes. */
const HEARTBEAT_MS = 30_000;
/** From a decision to a serving replica where none has been measured: a large model from a disk of the node. */
const START_MS = 120_000;

export function decideDeployment(world: DeploymentWorld): DeploymentDecision {
  const { owner, unreadable } = world;
  const idle: DeploymentDecision = {
    actions: [],
    status: owner.status,
    events: [],
    ask: undefined,
    scale: world.scale,
    wakeMs: world.nowMs + HEARTBEAT_MS,
    because: [],
  };
  // What was made for it goes by its owner references.
  if (owner.isLeaving) return { ...idle, wakeMs: Number.POSITIVE_INFINITY };
  if (owner.wish.kind === "refused") return told(world, { ...idle, status: refused(world, owner.wish.fault) });
  const [odd] = unreadable;
  if (odd !== undefined) {
    const fault = {
      field: odd,
      detail: "it cannot be read, so nothing is changed: delete or mend it",
      code: "unreadable",
    };
    return told(world, { ...idle, status: refused(world, fault) });
  }
  return told(world, decided(world, owner.wish.value));
}

function refused(world: DeploymentWorld, fault: { field: string; detail: string; code: string }): OwnerStatus {
  return refusedStatus(world, refusedFinding(fault));
}

/** Events are told of what has been written: from `told` up to the status that the server has. */
function told(world: DeploymentWorld, decision: DeploymentDecision): DeploymentDecision {
  return { ...decision, events: world.told === undefined ? [] : eventsBetween(world.told, world.owner.status) };
}

function decided(world: DeploymentWorld, wish: OwnerWish): DeploymentDecision {
  const { groups, nowMs, owner } = world;
  const chosen = choosePlan(world, wish);
  const plan = planOf(chosen);
  const scaled = scaleOf(world, wish, plan);
  const steps = nextSteps({
    wanted: scaled.wanted,
    planName: plan?.name,
    groups,
    leaving: world.leaving,
    kind: wish.rollout.kind,
    room: roomFor(world, plan),
    usedBelow: owner.status.nextOrdinal ?? 0,
    nowMs,
  });
  const pair =
    wish.draftPool === undefined ? undefined : pairing(wish.draftPool, world.pool, plan?.spec.model.vocabulary);
  const nextOrdinal = Math.max(owner.status.nextOrdinal ?? 0, ...groups.map(({ spec }) => spec.ordinal + 1));
  const actions = actionsOf(world, { wish, chosen, steps, pair, nextOrdinal });
  const staying = groups.filter(({ spec, isLeaving }) => spec.state === "Serving" && !isLeaving);
  const shortage = steps.isShort ? shortageOf(world, plan, { wanted: scaled.wanted, steps }) : undefined;
  const standing: Standing = { chosen, wanted: scaled.wanted, steps, staying, shortage };
  const status = statusOf(world, {
    finding: findingOf(world, standing),
    wish,
    standing,
    pairing: pair,
    nextOrdinal,
    targetReplicas: scaled.targetReplicas,
  });
  return {
    actions,
    status,
    events: [],
    ask: chosen.kind === "none" ? "first" : chosen.kind === "stored" ? "better" : undefined,
    scale: scaled.state,
    wakeMs: wakeOf(world, scaled.wakeMs),
    because: actions.map((action) => becauseOf(action, steps, scaled.wanted)),
  };
}

// ---- how many ----

type Scaled = {
  wanted: number;
  targetReplicas: number | undefined;
  state: ScaleState | undefined;
  wakeMs: number;
};

function scaleOf(world: DeploymentWorld, wish: OwnerWish, plan: StoredPlan | undefined): Scaled {
  const { nowMs, owner } = world;
  const { scale, question } = wish;
  if (scale.kind === "fixed") {
    return { wanted: scale.replicas, targetReplicas: undefined, state: undefined, wakeMs: Number.POSITIVE_INFINITY };
  }
  const begun = owner.status.targetReplicas ?? Math.max(1, scale.min);
  const state = world.scale ?? freshState(begun, nowMs);
  const { min, max, targets } = scale;
  const expected = plan === undefined ? 0 : expectedTokensPerSecond(plan);
  const decision = autoscale({
    nowMs,
    history: world.load,
    state,
    policy: {
      min,
      max,
      targets,
      concurrency: plan?.spec.prediction.concurrency ?? question.plan.concurrency,
      tokensPerSecond: expected > 0 ? expected : undefined,
      startMs: startMsOf(world.groups) ?? START_MS,
    },
  });
  const { targetReplicas } = decision;
  return { wanted: targetReplicas, targetReplicas, state: decision.state, wakeMs: decision.wakeMs };
}

/** As the last group that has never failed has taken; undefined where there is none. */
function startMsOf(groups: readonly GroupView[]): number | undefined {
  const spans = groups
    .filter(({ status }) => (status.restarts ?? 0) === 0)
    .toSorted((one, other) => other.createdMs - one.createdMs)
    .flatMap(({ status, createdMs }) => {
      const serving = status.conditions?.find(({ type }) => type === "Serving");
      return serving?.status === "True" ? Date.parse(serving.lastTransitionTime) - createdMs : [];
    });
  return spans.find((span) => span > 0);
}

// ---- room for a surge ----

function roomFor({ free }: DeploymentWorld, plan: StoredPlan | undefined): number | undefined {
  if (free === undefined || plan === undefined) return undefined;
  return groupsThatFit(free, plan.spec.cut.world, plan.spec.workers);
}

function shortageOf(
  world: DeploymentWorld,
  plan: StoredPlan | undefined,
  { wanted, steps }: { wanted: number; steps: Steps },
): string | undefined {
  if (plan === undefined || world.free === undefined) return undefined;
  const { cut, workers } = plan.spec;
  const each = cut.world / workers;
  const seats = world.free.nodes.filter((node) => node.kind === "gpu" && node.devices.length >= each).length;
  const lacking = Math.max(0, workers - seats) * each;
  if (steps.old === 0) return `another replica needs ${lacking} more GPUs`;
  const out = surgeMax(wanted);
  const startMs = startMsOf(world.groups);
  const turns = Math.ceil(wanted / out);
  const span = startMs === undefined ? "until the new ones serve" : `for about ${spanText(startMs * turns)}`;
  const left = Math.round(((wanted - out) / wanted) * 100);
  return `the new plan needs ${lacking} more GPUs beside the old one; with rollout.kind: inPlace it runs at ${left}% capacity ${span}`;
}

// ---- what is done ----

type Chosens = {
  wish: OwnerWish;
  chosen: Chosen;
  steps: Steps;
  pair: Pairing | undefined;
  nextOrdinal: number;
};

/** What gives devices back comes before what takes some. */
function actionsOf(world: DeploymentWorld, { wish, chosen, steps, pair, nextOrdinal }: Chosens): DeploymentAction[] {
  const { owner, nowMs } = world;
  const actions: DeploymentAction[] = [
    ...steps.remove.map(({ name }): DeploymentAction => ({ kind: "delete-group", name })),
    ...steps.drain.map(
      ({ name }): DeploymentAction => ({ kind: "drain-group", name, untilMs: nowMs + wish.rollout.drainMs }),
    ),
  ];
  if (chosen.kind === "to-store") actions.push(chosen.action);
  const annotations = pair?.isAllowed === true && wish.draftPool !== undefined ? { [DRAFT_POOL]: wish.draftPool } : {};
  for (let index = 0; index < steps.create; index++) {
    const ordinal = nextOrdinal + index;
    const name = groupName(owner.name, wish.planName, ordinal);
    const spec = {
      owner: { kind: owner.kind, name: owner.name },
      plan: wish.planName,
      ordinal,
      state: "Serving" as const,
    };
    actions.push({ kind: "apply-group", name, spec, annotations });
  }
  if (chosen.kind === "stored") actions.push(...plansToDelete(world, wish));
  return actions;
}

function becauseOf(action: DeploymentAction, { old }: Steps, wanted: number): Because {
  const text = `${action.kind} ${action.name}: ${wanted} replicas wanted, ${old} of another plan`;
  return { code: action.kind, text };
}

function wakeOf({ nowMs, groups, answer }: DeploymentWorld, scaleMs: number): number {
  const drains = groups.filter(({ spec, isLeaving }) => spec.state === "Draining" && !isLeaving).map(goneByMs);
  const again = answer?.kind === "failed" ? [answer.againMs] : [];
  const due = [...drains, ...again, scaleMs].filter((atMs) => atMs > nowMs);
  return Math.min(nowMs + HEARTBEAT_MS, ...due);
}

/** Annotations of a group that drains. */
export function drainAnnotations(untilMs: number): Record<string, string> {
  return { [DRAIN_UNTIL]: new Date(untilMs).toISOString() };
}

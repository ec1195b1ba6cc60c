// Which plan an owner's groups are made from. Pure. A stored plan is authoritative:
//
//   D1  a question that has a stored plan is not answered again: neither a newer controller nor another inventory changes it.
//   D2  where only the pods change (podPatch, draftPool), the stored cut is taken over as it is.
//   D3  plans that groups use are kept, and the last few beside them, so that an edit that is taken back finds its plan.
import { invalid } from "../../../proto/fault.ts";
import type { Fault } from "../../../proto/gen/muster/v1/worker.ts";
import { madeWith } from "./calibration.ts";
import { planColumn } from "./columns.ts";
import { type OwnerWish, REPLAN } from "./wish.ts";
import type { Answer, DeploymentAction, DeploymentWorld, StoredPlan } from "./world.ts";

export type Chosen =
  | { kind: "stored"; plan: StoredPlan }
  | { kind: "to-store"; action: DeploymentAction }
  | { kind: "none"; why: Exclude<Answer, { kind: "feasible" }> | undefined };

const HISTORY = 5;
/** A gain below this is not worth a restart, and within what the formulas know. */
const GAIN_MIN = 0.1;

export function choosePlan(world: DeploymentWorld, wish: OwnerWish): Chosen {
  const { plans, answer, image } = world;
  const stored = plans.find(({ name }) => name === wish.planName);
  if (stored !== undefined) return { kind: "stored", plan: stored };
  const { planName: name, podTemplateDigest } = wish;
  const question = wish.question.hash;
  const [same] = plans.filter((plan) => plan.question === question).toSorted(newestFirst);
  if (same !== undefined) {
    const spec = { ...same.spec, image, podTemplateDigest };
    return { kind: "to-store", action: { kind: "store-plan", name, question, spec } };
  }
  if (answer?.kind !== "feasible") return { kind: "none", why: answer };
  const fault = unservable(answer.spec.model, wish);
  if (fault !== undefined) return { kind: "none", why: { kind: "refused", fault } };
  const spec = { ...answer.spec, image, podTemplateDigest };
  return { kind: "to-store", action: { kind: "store-plan", name, question, spec } };
}

/** What can be planned but would not serve. */
function unservable(model: StoredPlan["spec"]["model"], { kind, vocabularies }: OwnerWish): Fault | undefined {
  if (model.planOnly !== undefined) {
    const detail = `it can be planned, not served: ${model.planOnly}; name another source`;
    return invalid("spec.model.source", detail, "plan_only");
  }
  const own = model.vocabulary;
  if (kind !== "DraftPool" || vocabularies === undefined || own === undefined || vocabularies.includes(own))
    return undefined;
  const detail = `the model's vocabulary is ${own}, which is not among them: add it, or name another model`;
  return invalid("spec.vocabularies", detail, "vocabulary_differs");
}

const newestFirst = (one: StoredPlan, other: StoredPlan): number =>
  other.createdMs - one.createdMs || (one.name < other.name ? -1 : 1);

/** D3. */
export function plansToDelete(world: DeploymentWorld, wish: OwnerWish): DeploymentAction[] {
  const used = new Set([wish.planName, ...world.groups.map(({ spec }) => spec.plan)]);
  return world.plans
    .filter(({ name }) => !used.has(name))
    .toSorted(newestFirst)
    .slice(HISTORY)
    .map(({ name }) => ({ kind: "delete-plan", name }));
}

/** Why another plan would be better; undefined where it would not be by much. */
export function betterPlan(stored: StoredPlan, better: DeploymentWorld["better"]): string | undefined {
  if (better === undefined || better.revision === stored.spec.revision) return undefined;
  // With one factor for both: what was measured meanwhile makes no plan better than another.
  const raw = stored.spec.prediction.tokensPerSecond / madeWith(stored.spec.prediction);
  const [before, after] = [raw * madeWith(better.prediction), better.prediction.tokensPerSecond];
  if (before <= 0 || after < before * (1 + GAIN_MIN)) return undefined;
  const gain = `${Math.round((after / before - 1) * 100)}% more tokens per second`;
  const short = better.revision.slice(0, 12);
  return `${planColumn(better.cut, 1)} is predicted to give ${gain}; to take it, set the annotation ${REPLAN}: "${short}"`;
}

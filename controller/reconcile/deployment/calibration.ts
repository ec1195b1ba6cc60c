// What a deployment has measured of itself, as the factor that the planner's roofline takes (F2 of plan/roofline.ts). Pure.
//
//   C1  the factor is a share of the raw roofline: measured tokens per second over those that the stored plan predicts at the
//       same concurrency, times the factor that the plan was predicted with.
//   C2  it is between CALIBRATION_MIN and 1: the raw figures are what good kernels reach on the best day, so what is above
//       them is chance or a formula's error, which no plan shall promise on; what is below a twentieth is no property of the
//       device, but something broken or starved, and would let every prediction vanish.
//   C3  it comes in steps of CALIBRATION_STEP, rounded down: what chance moves is no news.
//   C4  it is asked for only with a question that is asked for another reason and is no part of its hash: no measurement plans
//       anything anew. It scales all cuts alike: none of them is chosen by it.
import { CALIBRATION_START } from "../../plan/roofline.ts";
import type { GroupView, StoredPlan } from "./world.ts";

export const CALIBRATION_MIN = 0.05;
const CALIBRATION_STEP = 0.05;
/** Of the predicted concurrency: nearer is the same. The stored plan has no prediction for any other. */
const CONCURRENCY_TOLERANCE = 0.1;

type Prediction = StoredPlan["spec"]["prediction"];

/** Plans that do not say it were predicted before any had measured itself. */
export function madeWith({ calibration }: Pick<Prediction, "calibration">): number {
  return calibration ?? CALIBRATION_START;
}

export function isSameConcurrency(one: number, other: number): boolean {
  return Math.abs(one - other) <= CONCURRENCY_TOLERANCE * other;
}

/** C1 to C3. `tokensPerSecond`: of one group, without accepted guesses. Undefined at another concurrency than the predicted. */
export function calibrationFrom(
  prediction: Prediction,
  seen: { tokensPerSecond: number; concurrency: number },
): number | undefined {
  const raw = prediction.tokensPerSecond / madeWith(prediction);
  if (raw <= 0 || seen.tokensPerSecond <= 0 || !isSameConcurrency(seen.concurrency, prediction.concurrency))
    return undefined;
  const steps = Math.floor(seen.tokensPerSecond / raw / CALIBRATION_STEP + 1e-9);
  const share = Math.round(steps * CALIBRATION_STEP * 100) / 100;
  return Math.min(1, Math.max(CALIBRATION_MIN, share));
}

/** For a question of this owner: of the wanted plan, else of one that groups follow, else of another; the newest first. */
export function calibrationFor(
  planName: string,
  { plans, groups }: { plans: readonly StoredPlan[]; groups: readonly GroupView[] },
): number | undefined {
  const used = new Set(groups.map(({ spec }) => spec.plan));
  const rank = ({ name }: StoredPlan): number => (name === planName ? 0 : used.has(name) ? 1 : 2);
  const [best] = plans
    .filter(({ measured }) => measured.calibration !== undefined)
    .toSorted((one, other) => rank(one) - rank(other) || other.createdMs - one.createdMs);
  return best?.measured.calibration;
}

/** Tokens per second of one full replica, as far as is known by now: what was predicted, measured, and seen. */
export function expectedTokensPerSecond({ spec: { prediction }, measured }: StoredPlan): number {
  const factor = measured.calibration ?? madeWith(prediction);
  return Math.max((prediction.tokensPerSecond / madeWith(prediction)) * factor, measured.tokensPerSecond ?? 0);
}

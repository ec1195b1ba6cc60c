// Whether and how the experts of a serving group shall move, from what its ranks have counted. Pure: owns the decision; reading
// and packing the weights is the workers' (worker.proto), the balance of a map is controller/plan/experts.ts.
//
//   M1  a map changes at most so many layers at once that what is added fits in `bytesMax` of each rank: old and new weights
//       are held together until the switch. The rest comes with the next look. The first copies come to all layers at once,
//       into the room that the ledger has for them.
//   M2  without a load there is no move; what cannot be decided stays as it is.

import type { ExpertTokens } from "../../proto/gen/muster/v1/experts.ts";
import { type ExpertMap, LedgerClass, type ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { imbalanceOf, isMap, type ExpertMap as PlacedMap, rebalance } from "../plan/experts.ts";
import { worthMoving } from "../plan/experts-moves.ts";

export type ExpertLimits = {
  /** Tokens of the busiest layer in the window; fewer say too little. */
  tokensMin: number;
  /** Share of the experts' time that must be saved. */
  gainMin: number;
  /** At which weights are read and packed beside the steps. */
  moveBytesPerSecond: number;
  /** Of a rank's reserve, for weights that come before the old ones go. */
  reserveShare: number;
};

export const expertLimits: ExpertLimits = {
  tokensMin: 10_000,
  gainMin: 0.03,
  moveBytesPerSecond: 200e6,
  reserveShare: 0.5,
};

export type ExpertQuestion = {
  plan: ShardPlan;
  /** In use. */
  current: ExpertMap;
  /** Of the window since the last look; one entry for each layer of `current`. */
  load: readonly ExpertTokens[];
  stepMs: number;
  /** Until the next look. */
  windowMs: number;
};

export type ExpertVerdict =
  | { kind: "stay"; code: string; text: string }
  | { kind: "move"; map: ExpertMap; text: string; imbalance: { before: number; after: number } };

export function decideExperts(question: ExpertQuestion, limits: ExpertLimits = expertLimits): ExpertVerdict {
  const { plan, current, load } = question;
  const stay = (code: string, text: string): ExpertVerdict => ({ kind: "stay", code, text });
  const { cut } = plan;
  if (cut === undefined || cut.ep < 2) return stay("one-slot", "all experts are on every rank");
  const counts = load.map(({ tokens }) => tokens.map(Number));
  const busiest = Math.max(0, ...counts.map((layer) => layer.reduce((sum, count) => sum + count, 0)));
  if (busiest < limits.tokensMin)
    return stay("load-small", `${busiest} tokens since the last look, ${limits.tokensMin} are needed`);
  const experts = counts[0]?.length ?? 0;
  const shape = { slots: experts + plan.expertCopies, ranks: cut.ep, nodes: nodesOf(plan) };
  const isFirst = (current.layers[0]?.places.length ?? 0) < shape.slots;
  const before = placedOf(current, shape.slots);
  const wanted = rebalance(counts, shape, before);
  if (!isMap(wanted)) return stay(wanted.code, wanted.text);
  const after = isFirst ? wanted : partly(question, { before, wanted }, limits);
  const imbalance = { before: imbalanceOf(counts, before), after: imbalanceOf(counts, after) };
  if (!isFirst) {
    const verdict = worthMoving(counts, { current: before, next: after }, termsOf(question, limits));
    if (!verdict.isWorth) return stay(verdict.code, verdict.text);
  }
  const layers = current.layers.map(({ block }, index) => ({ block, places: [...(after.layers[index] ?? [])] }));
  const map = { version: current.version + 1, slots: cut.ep, layers };
  const what = isFirst ? `${plan.expertCopies} copies in each layer` : "experts by load";
  const text = `${what}: imbalance ${imbalance.before.toFixed(2)} -> ${imbalance.after.toFixed(2)}`;
  return { kind: "move", map, text, imbalance };
}

/** What is held stays where it can: slots that get copies are shown with places that nobody has yet. */
const EMPTY = -1;

function placedOf({ version, slots, layers }: ExpertMap, places: number): PlacedMap {
  const perSlot = places / slots;
  const padded = layers.map(({ places: held }) =>
    Array.from({ length: slots }, (_, slot) => {
      const own = held.slice((slot * held.length) / slots, ((slot + 1) * held.length) / slots);
      return [...own, ...new Array<number>(Math.max(0, perSlot - own.length)).fill(EMPTY)];
    }).flat(),
  );
  return { version, ranks: slots, policy: "flat", layers: padded };
}

/** Slots of one worker are neighbours; where they are not whole, the workers are no nodes to the packing. */
function nodesOf({ workers, cut }: ShardPlan): number {
  return workers > 0 && (cut?.ep ?? 1) % workers === 0 ? workers : 1;
}

/** The layers that gain most, as many as fit (M1); the others stay. */
function partly(
  { plan, load }: ExpertQuestion,
  { before, wanted }: { before: PlacedMap; wanted: PlacedMap },
  limits: ExpertLimits,
): PlacedMap {
  const perExpert = expertBytes(plan);
  const bytesMax = reserveOf(plan) * limits.reserveShare;
  const layers = wanted.layers.map((layer, index) => {
    const old = before.layers[index] ?? [];
    const counts = [(load[index]?.tokens ?? []).map(Number)];
    const one = (places: readonly number[]): PlacedMap => ({ ...wanted, layers: [places] });
    const gain = imbalanceOf(counts, one(old)) - imbalanceOf(counts, one(layer));
    return { index, gain, added: addedMost(old, layer, wanted.ranks) };
  });
  const chosen = new Set<number>();
  let bytes = 0;
  for (const { index, gain, added } of layers.toSorted((a, b) => b.gain - a.gain || a.index - b.index)) {
    const cost = added * perExpert;
    if (gain <= 0 || (chosen.size > 0 && bytes + cost > bytesMax)) continue;
    chosen.add(index);
    bytes += cost;
  }
  return { ...wanted, layers: wanted.layers.map((layer, i) => (chosen.has(i) ? layer : (before.layers[i] ?? layer))) };
}

/** Experts that the slot with most of them gets. */
function addedMost(before: readonly number[], after: readonly number[], slots: number): number {
  const perSlot = after.length / slots;
  const added = Array.from({ length: slots }, (_, slot) => {
    const held = new Set(before.slice(slot * perSlot, (slot + 1) * perSlot));
    return after.slice(slot * perSlot, (slot + 1) * perSlot).filter((expert) => !held.has(expert)).length;
  });
  return Math.max(...added);
}

function classBytes(plan: ShardPlan, type: LedgerClass, pick: (...values: number[]) => number): number {
  const held = plan.ledgers.map(({ lines }) => Number(lines.find((line) => line.class === type)?.bytes ?? 0n));
  return held.length === 0 ? 0 : pick(...held);
}

const reserveOf = (plan: ShardPlan): number => classBytes(plan, LedgerClass.RESERVE, Math.min);

/** Of one expert of one layer on one rank. */
function expertBytes(plan: ShardPlan): number {
  const moe = plan.model?.blocks.flatMap(({ mlp }) => (mlp?.$case === "moe" ? [mlp.value] : [])) ?? [];
  const perSlot = ((moe[0]?.experts ?? 1) + plan.expertCopies) / (plan.cut?.ep ?? 1);
  return classBytes(plan, LedgerClass.EXPERTS, Math.max) / Math.max(1, perSlot * moe.length);
}

function termsOf({ plan, stepMs, windowMs }: ExpertQuestion, { gainMin, moveBytesPerSecond }: ExpertLimits) {
  const step = stepMs > 0 ? stepMs : (plan.prediction?.itlMs ?? 0);
  const weights = plan.ledgers.map(({ lines }) =>
    lines.reduce((sum, { class: type, bytes }) => sum + (WEIGHTS.has(type) ? Number(bytes) : 0), 0),
  );
  const share = classBytes(plan, LedgerClass.EXPERTS, Math.max) / Math.max(1, ...weights);
  return {
    gainMin,
    slotBytes: expertBytes(plan),
    moveBytesPerSecond,
    expertSecondsPerStep: (step / 1000) * Math.min(1, share),
    stepsAhead: step > 0 ? windowMs / step : 0,
  };
}

const WEIGHTS: ReadonlySet<LedgerClass> = new Set([
  LedgerClass.ATTENTION,
  LedgerClass.DENSE,
  LedgerClass.EXPERTS,
  LedgerClass.SHARED,
  LedgerClass.NORMS,
  LedgerClass.HEAD,
]);

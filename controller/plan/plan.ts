// The planner: inventory + model + wishes -> the best of all cuts that fit, or why none does and the smallest change that
// helps. Pure: the same question has the same answer. See DESIGN.md beside this file.
//
//   P1  a plan is answered iff some looked-at cut fits on every rank; the table holds every one that was looked at.
//   P2  more memory never turns a plan into a refusal.
//   P3  a remedy was tried: with it applied the planner answers a plan.
import type { ModelSpec, Reason, ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { type Candidate, evaluate, type Model, modelOf } from "./candidate.ts";
import { enumerateCuts, type Refused, refusedFor } from "./cuts.ts";
import type { Inventory } from "./hardware.ts";
import { reasonsFor } from "./reasons.ts";
import { findRemedy, type Remedy } from "./remedy.ts";
import { revisionOf } from "./revision.ts";
import { CONCURRENCY_MAX, type Wishes } from "./wishes.ts";

/** Everything that was looked at, best first; those that do not fit after those that do. */
export type Table = { candidates: readonly Candidate[]; refused: readonly Refused[] };

export type Planned =
  | { kind: "feasible"; plan: ShardPlan; table: Table }
  | { kind: "infeasible"; reasons: readonly Reason[]; remedy: Remedy | undefined; table: Table };

/** Looks at every cut. Mutates nothing; throws for no input that readModel and parseInventory answer. */
export function planShards(spec: ModelSpec, inventory: Inventory, wishes: Wishes): Planned {
  const model = modelOf(spec);
  const answer = judge(model, inventory, wishes);
  if (answer.kind === "feasible") return answer;
  const question = { spec, inventory, wishes };
  const remedy = findRemedy(question, (change) => judge(model, change.inventory, change.wishes).kind === "feasible");
  return { ...answer, remedy };
}

type Judged = Extract<Planned, { kind: "feasible" }> | { kind: "infeasible"; reasons: Reason[]; table: Table };

function judge(model: Model, inventory: Inventory, wishes: Wishes): Judged {
  const { spec } = model;
  const wrong = wrongWishes(spec, wishes);
  if (wrong.length > 0) return { kind: "infeasible", reasons: wrong, table: { candidates: [], refused: [] } };
  const cuts = enumerateCuts(spec, inventory, wishes);
  const candidates = cuts.placed
    .map(({ cut, placement }) => evaluate(model, cut, placement, wishes))
    .sort((one, other) => compare(one, other));
  const table: Table = { candidates, refused: cuts.refused };
  const [best] = candidates;
  if (best === undefined || !best.fits) return { kind: "infeasible", reasons: refusals(table), table };
  const reasons = reasonsFor(spec, wishes, table);
  return { kind: "feasible", plan: planOf(spec, best, { wishes, reasons }), table };
}

function wrongWishes(spec: ModelSpec, wishes: Wishes): Reason[] {
  const reasons: Reason[] = [];
  const { contextTokens, concurrency, kvBytes, kvBlockTokens } = wishes;
  const positive = Object.entries({ contextTokens, concurrency, kvBytes, kvBlockTokens, ...wishes.pins });
  for (const [name, value] of positive) {
    if (value === undefined || (Number.isSafeInteger(value) && value > 0)) continue;
    reasons.push(refusedFor("wish-not-positive", `${name} is ${value}; it must be a whole number of at least 1.`));
  }
  if (contextTokens !== undefined && contextTokens > spec.contextTokens) {
    const text = `a context of ${contextTokens} tokens is wished for, the model knows ${spec.contextTokens}.`;
    reasons.push(refusedFor("context-over-model", text));
  }
  if (concurrency > CONCURRENCY_MAX) {
    reasons.push(refusedFor("concurrency-too-large", `${concurrency} sequences at once; at most ${CONCURRENCY_MAX}.`));
  }
  return reasons;
}

/** More tokens per second, then more free memory on the fullest rank, then whole experts; without fit, the closest first. */
function compare(one: Candidate, other: Candidate): number {
  if (one.fits !== other.fits) return one.fits ? -1 : 1;
  if (!one.fits) return fullest(one) - fullest(other) || other.cut.ep - one.cut.ep;
  const speed = other.prediction.tokensPerSecond - one.prediction.tokensPerSecond;
  // A thousandth is no difference: the formulas are not that good.
  if (Math.abs(speed) > 1e-3 * one.prediction.tokensPerSecond) return speed;
  return fullest(one) - fullest(other) || other.cut.ep - one.cut.ep || one.cut.world - other.cut.world;
}

function fullest(candidate: Candidate): number {
  return Math.max(...candidate.ledgers.map((ledger) => Number(ledger.used) / Number(ledger.capacity)));
}

/** Each cause once, the most telling first: what lacks least, then what no amount of memory would cure. */
function refusals(table: Table): Reason[] {
  const reasons: Reason[] = [];
  const [closest] = table.candidates;
  if (closest?.misfit !== undefined) reasons.push(refusedFor(closest.misfit.code, `${closest.misfit.text}.`));
  for (const { reasons: causes } of table.refused) {
    for (const cause of causes) if (!reasons.some((known) => known.text === cause.text)) reasons.push(cause);
  }
  return closest === undefined ? reasons : reasons.slice(0, 1);
}

function planOf(spec: ModelSpec, best: Candidate, rest: { wishes: Wishes; reasons: Reason[] }): ShardPlan {
  const { kvBlockTokens, expertCopies } = rest.wishes;
  const { cut, workers, kvBlocks, contextTokens } = best;
  return {
    revision: revisionOf(spec.digest, { cut, workers, kvBlocks, contextTokens, kvBlockTokens, expertCopies }),
    model: spec,
    cut,
    ranks: best.shards,
    ledgers: best.ledgers,
    reasons: rest.reasons,
    prediction: best.prediction,
    workers,
    contextTokens,
    kvBlockTokens,
    kvBlocks,
    expertCopies,
  };
}

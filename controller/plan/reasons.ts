// Why a plan is as it is, for people and for scripts: chosen, runner-up, limit, notes. Codes are stable.
import { type ModelSpec, type Reason, Reason_Kind } from "../../proto/gen/muster/v1/plan.ts";
import { type Candidate, cutName } from "./candidate.ts";
import { isLatent } from "./ledger.ts";
import type { Table } from "./plan.ts";
import { kvHeadsOf } from "./shape.ts";
import type { Wishes } from "./wishes.ts";

/** `table.candidates[0]` is the chosen one and fits. */
export function reasonsFor(spec: ModelSpec, wishes: Wishes, table: Table): Reason[] {
  const [best, ...others] = table.candidates;
  if (best === undefined) return [];
  const reasons = [chosen(spec, wishes, best, others)];
  const runnerUp = others.find((other) => other.fits);
  if (runnerUp !== undefined) reasons.push(second(spec, best, runnerUp));
  reasons.push(...limits(spec, wishes, best), ...notes(spec, wishes, best));
  return reasons;
}

function chosen(spec: ModelSpec, wishes: Wishes, best: Candidate, others: readonly Candidate[]): Reason {
  const { prediction } = best;
  const speed = `${rounded(prediction.tokensPerSecond)} tokens/s for ${prediction.concurrency} sequences`;
  const fitting = others.filter((other) => other.fits).length;
  const isPinned = Object.values(wishes.pins).some((pin) => pin !== undefined);
  const [code, why] =
    fitting > 0
      ? ["most-tokens-per-second", `the fastest of ${fitting + 1} cuts that fit`]
      : isPinned
        ? ["only-cut-of-pins", "the only cut that the pins leave"]
        : ["only-cut-that-fits", "the only cut that fits"];
  const text = `${cutName(best.cut, spec)} on ${ranks(best)}: ${why}; ${speed} are predicted.`;
  return { kind: Reason_Kind.CHOSEN, code, text };
}

function second(spec: ModelSpec, best: Candidate, other: Candidate): Reason {
  const share = 1 - other.prediction.tokensPerSecond / best.prediction.tokensPerSecond;
  const name = `${cutName(other.cut, spec)} on ${ranks(other)}`;
  const lost =
    share > 1e-3 ? `loses ${(share * 100).toFixed(1)} % of the tokens/s` : "is as fast but fills its ranks more";
  return { kind: Reason_Kind.RUNNER_UP, code: "runner-up", text: `${name} ${lost}.` };
}

const ranks = ({ cut, workers }: Candidate): string => `${count(cut.world, "rank")} of ${count(workers, "node")}`;

const count = (number: number, noun: string): string => `${number} ${noun}${number === 1 ? "" : "s"}`;

function rounded(figure: number): string {
  return figure >= 100 ? figure.toFixed(0) : figure.toPrecision(3);
}

const limit = (code: string, text: string): Reason => ({ kind: Reason_Kind.LIMIT, code, text });

/** What a decode step spends its time on. */
function bound(what: string): Reason {
  switch (what) {
    case "compute":
      return limit("arithmetic", "a decode step waits for arithmetic.");
    case "communication":
      return limit("communication", "a decode step waits for messages between ranks most of its time.");
    default:
      return limit("memory-bandwidth", "a decode step waits for memory: the weights and the KV it has to read.");
  }
}

function limits(spec: ModelSpec, wishes: Wishes, best: Candidate): Reason[] {
  const reasons = [bound(best.prediction.bound)];
  if (best.fullSequences < wishes.concurrency) {
    const held = Math.floor(best.fullSequences * 10) / 10;
    const text = `KV holds ${held} of ${wishes.concurrency} sequences of ${best.contextTokens} tokens; shorter ones share it, others wait.`;
    reasons.push(limit("kv-blocks", text));
  }
  const kvHeads = kvHeadsOf(spec);
  if (isLatent(spec) && best.cut.tp > 1) {
    const text = `latent attention: every one of ${best.cut.tp} ranks keeps the whole KV of every sequence.`;
    reasons.push(limit("kv-latent", text));
  } else if (best.cut.tp > kvHeads) {
    const text = `${kvHeads} kv heads on ${best.cut.tp} ranks: each is kept ${best.cut.tp / kvHeads} times, KV does not shrink further.`;
    reasons.push(limit("kv-heads", text));
  }
  return reasons;
}

function notes(spec: ModelSpec, wishes: Wishes, best: Candidate): Reason[] {
  const note = (code: string, text: string): Reason => ({ kind: Reason_Kind.NOTE, code, text });
  const reasons: Reason[] = [];
  if (spec.projected)
    reasons.push(note("projected", "the configuration is a projection: this model was never released."));
  if (spec.planOnly !== "") reasons.push(note("plan-only", `it can be planned, not served: ${spec.planOnly}.`));
  if (wishes.contextTokens === undefined && best.contextTokens < spec.contextTokens) {
    reasons.push(
      note("context-lowered", `context is ${best.contextTokens} tokens; the model knows ${spec.contextTokens}.`),
    );
  }
  return reasons;
}

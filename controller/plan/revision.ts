// The name of a plan: a hash over what makes its ranks compute or hold something else. Never over the weights.
import { createHash } from "node:crypto";
import type { Cut } from "../../proto/gen/muster/v1/plan.ts";

export type RevisionParts = {
  cut: Cut;
  workers: number;
  kvBlocks: number;
  contextTokens: number;
  kvBlockTokens: number;
  expertCopies: number;
};

/** Raised when the meaning of a plan changes without its fields changing. */
const PLAN_FORMAT = 1;

export function revisionOf(digest: string, parts: RevisionParts): string {
  const { cut, workers, kvBlocks, contextTokens, kvBlockTokens, expertCopies } = parts;
  const sizes = [cut.world, cut.tp, cut.dp, cut.ep, cut.etp, cut.pp, workers, kvBlocks, contextTokens, kvBlockTokens];
  // Left out where there are none: plans from before copies keep their names.
  if (expertCopies > 0) sizes.push(expertCopies);
  return createHash("sha256")
    .update(`${PLAN_FORMAT}\n${digest}\n${sizes.join(" ")}\n`)
    .digest("hex")
    .slice(0, 32);
}

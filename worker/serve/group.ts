// All workers of a group as one engine: the own one and the followers. Owns the comparison of what they sampled (L2 of
// leader.ts) and the meaning of their failures: whatever goes wrong in a step, the incarnation is lost.
import { FaultError, lost } from "../../proto/fault.ts";
import type { StepPlan } from "../../proto/gen/muster/v1/worker.ts";
import { type Engine, EngineError, type StepResult } from "../engine/engine.ts";
import type { Followers } from "./followers.ts";

export class Group {
  readonly #engine: Engine;
  readonly #followers: Followers;
  #epoch = 0n;

  constructor(engine: Engine, followers: Followers) {
    this.#engine = engine;
    this.#followers = followers;
  }

  get numericsId(): string {
    return this.#engine.numericsId;
  }

  /** Last step that each worker has finished, by index; 0 before the first. */
  get epochs(): readonly bigint[] {
    return [this.#epoch, ...this.#followers.epochs];
  }

  /** Steps end in the order of their launch. Rejects where a worker is lost or sampled something else. */
  async launch(plan: StepPlan): Promise<StepResult> {
    // Followers first: their work begins with a message's way.
    const digests = this.#followers.launch(plan);
    const own = this.#engine.launch(plan).then((result) => {
      this.#epoch = plan.step;
      return result;
    });
    const [result, others] = await Promise.all([own, digests]);
    const other = others.findIndex((digest) => digest !== result.digest);
    if (other < 0) return result;
    const detail = `step ${plan.step}: follower ${other + 1} sampled other tokens than the leader; the ranks have drifted apart`;
    throw new FaultError(lost("digest_differs", detail));
  }
}

/** What an error of a step means: ranks may have done different things, whoever refused or died. */
export function lostBy(error: unknown): FaultError {
  if (error instanceof FaultError) return error;
  const detail = error instanceof Error ? error.message : String(error);
  const code = error instanceof EngineError ? `engine_${error.fault.code}` : "broken_invariant";
  return new FaultError(lost(code, detail), { cause: error });
}

// Steps that were launched and whose results are still to come. Owns their order and their number.
//
//   F1  at most IN_FLIGHT_MAX at once; results are taken in launch order.
//   F2  nothing is launched behind a step that verifies guesses: how long its sequences become is not known, and an engine
//       refuses a plan that names their slots, be it to close one.
//   F3  a step's blocks come back (step-writer.ts, W2) before its result is taken.
import type { StepPlan } from "../../proto/gen/muster/v1/worker.ts";
import type { StepResult } from "../engine/engine.ts";
import type { Group } from "./group.ts";
import type { StepWriter } from "./step-writer.ts";

/** One computes, one waits behind it, so that no engine idles while results are read. As many as an engine takes. */
const IN_FLIGHT_MAX = 2;

type Flight = { plan: StepPlan; result: Promise<StepResult>; take: (result: StepResult) => void };

export class Flights {
  readonly #group: Group;
  readonly #writer: StepWriter;
  readonly #flights: Flight[] = [];

  constructor(group: Group, writer: StepWriter) {
    this.#group = group;
    this.#writer = writer;
  }

  get isEmpty(): boolean {
    return this.#flights.length === 0;
  }
  get isOpen(): boolean {
    const last = this.#flights.at(-1);
    return last === undefined || (this.#flights.length < IN_FLIGHT_MAX && !isVerifying(last.plan));
  }

  launch(plan: StepPlan, take: (result: StepResult) => void): void {
    const result = this.#group.launch(plan);
    result.catch(() => {}); // land() tells; nobody waits there yet
    this.#flights.push({ plan, result, take });
  }

  /** Waits for the oldest step and takes its result. Rejects with a fault of the group. */
  async land(): Promise<void> {
    const [flight] = this.#flights;
    if (flight === undefined) return;
    const result = await flight.result;
    this.#flights.shift();
    this.#writer.completed(flight.plan.step);
    flight.take(result);
  }
}

const isVerifying = ({ rows }: StepPlan): boolean => rows.some(({ drafts }) => drafts.length > 0);

// The leader's Steps streams to the other workers of the group. Owns the order of plans and the comparison of digests' steps;
// a follower that breaks off, answers out of order or reports a fault is lost, and with it the incarnation.
import type { ClientDuplexStream } from "@grpc/grpc-js";
import { FaultError, lost } from "../../proto/fault.ts";
import { type StepDigest, type StepPlan, WorkerClient } from "../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../proto/grpc.ts";
import { noTrust, type Trust } from "../../proto/trust.ts";

export interface Followers {
  /** Sends the plan to all; resolves with their digests of it, in order of workers. Rejects with a lost fault. */
  launch(plan: StepPlan): Promise<bigint[]>;
  /** Last step that each has finished, in order of workers; 0 before the first. */
  readonly epochs: readonly bigint[];
  close(): void;
}

/** A group of one worker. */
export const noFollowers: Followers = { launch: async () => [], epochs: [], close() {} };

type Waiting = { step: bigint; resolve: (digest: bigint) => void; reject: (error: FaultError) => void };

class Follower {
  readonly #address: string;
  readonly #client: WorkerClient;
  readonly #call: ClientDuplexStream<StepPlan, StepDigest>;
  readonly #waiting: Waiting[] = [];
  readonly #onLost: (error: FaultError) => void;
  #error: FaultError | undefined;
  #isClosing = false;
  epoch = 0n;

  constructor(address: string, trust: Trust, onLost: (error: FaultError) => void) {
    this.#address = address;
    this.#onLost = onLost;
    this.#client = new WorkerClient(address, trust.channel({ role: "worker" }), channelOptions);
    this.#call = this.#client.steps();
    this.#call.on("data", (digest: StepDigest) => this.#answer(digest));
    this.#call.on("error", (error) => this.#lose(error.message));
    this.#call.on("end", () => this.#lose("the follower ended its stream"));
  }

  launch(plan: StepPlan): Promise<bigint> {
    return new Promise((resolve, reject) => {
      if (this.#error !== undefined) return reject(this.#error);
      this.#waiting.push({ step: plan.step, resolve, reject });
      // At most a few steps are in flight, so the stream's buffer is bounded by them.
      this.#call.write(plan);
    });
  }

  close(): void {
    this.#isClosing = true;
    this.#call.end();
    this.#client.close();
  }

  #answer({ step, digest, fault }: StepDigest): void {
    const next = fault === undefined ? this.#waiting.shift() : undefined;
    if (fault !== undefined) this.#lose(fault.detail);
    else if (next?.step !== step)
      this.#lose(`it answered step ${step} where ${next?.step ?? "none"} was expected`, next);
    else {
      this.epoch = step;
      next.resolve(digest);
    }
  }

  #lose(detail: string, answered?: Waiting): void {
    if (this.#isClosing || this.#error !== undefined) return;
    const error = new FaultError(lost("follower_lost", `follower ${this.#address}: ${detail}`));
    this.#error = error;
    answered?.reject(error);
    for (const { reject } of this.#waiting.splice(0)) reject(error);
    this.#onLost(error);
    this.#call.cancel();
  }
}

/** Opens one stream to each address. `onLost` is called at once, also between steps. */
export function connectFollowers(
  addresses: readonly string[],
  onLost: (error: FaultError) => void,
  trust: Trust = noTrust,
): Followers {
  const followers = addresses.map((address) => new Follower(address, trust, onLost));
  return {
    launch: (plan) => Promise.all(followers.map((follower) => follower.launch(plan))),
    get epochs() {
      return followers.map(({ epoch }) => epoch);
    },
    close: () => followers.forEach((follower) => void follower.close()),
  };
}

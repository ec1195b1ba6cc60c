// The calls by which experts are moved, to workers in their pods. They are rare (one question a minute, a move now and then),
// so each has a connection of its own.
//
//   N1  a call ends within its bound; it goes to the pod that is meant (its UID is in the call, and in its certificate).
import { Metadata } from "@grpc/grpc-js";
import type { ExpertLoadResponse, SwitchExpertsResponse } from "../../../proto/gen/muster/v1/experts.ts";
import { type StageExpertsRequest, WorkerClient } from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions, POD_UID_HEADER } from "../../../proto/grpc.ts";
import { noTrust, type Trust } from "../../../proto/trust.ts";
import type { WorkerTarget } from "../workers/worker-link.ts";

const LOAD_MS_MAX = 5_000;
/** Some gigabytes from a disk, beside the steps. */
const STAGE_MS_MAX = 600_000;
/** A step that waits for the one before it. */
const SWITCH_MS_MAX = 30_000;

export interface ExpertLinks {
  expertLoad(leader: WorkerTarget, signal: AbortSignal): Promise<ExpertLoadResponse>;
  stageExperts(target: WorkerTarget, request: StageExpertsRequest, signal: AbortSignal): Promise<void>;
  switchExperts(leader: WorkerTarget, version: number, signal: AbortSignal): Promise<SwitchExpertsResponse>;
}

type Answer<T> = (error: Error | null, value: T) => void;
type Start<T> = (client: WorkerClient, rest: [Metadata, { deadline: number }, Answer<T>]) => { cancel(): void };

export class GrpcExpertLinks implements ExpertLinks {
  readonly #trust: Trust;

  constructor(trust: Trust = noTrust) {
    this.#trust = trust;
  }

  expertLoad(leader: WorkerTarget, signal: AbortSignal): Promise<ExpertLoadResponse> {
    const { incarnation } = leader.name;
    return this.#call(leader, { signal, boundMs: LOAD_MS_MAX }, (client, rest) =>
      client.expertLoad({ incarnation }, ...rest),
    );
  }

  async stageExperts(target: WorkerTarget, request: StageExpertsRequest, signal: AbortSignal): Promise<void> {
    await this.#call(target, { signal, boundMs: STAGE_MS_MAX }, (client, rest) =>
      client.stageExperts(request, ...rest),
    );
  }

  switchExperts(leader: WorkerTarget, version: number, signal: AbortSignal): Promise<SwitchExpertsResponse> {
    const { incarnation } = leader.name;
    return this.#call(leader, { signal, boundMs: SWITCH_MS_MAX }, (client, rest) =>
      client.switchExperts({ incarnation, version }, ...rest),
    );
  }

  async #call<T>(
    { uid, address }: WorkerTarget,
    { signal, boundMs }: { signal: AbortSignal; boundMs: number },
    start: Start<T>,
  ): Promise<T> {
    signal.throwIfAborted();
    const metadata = new Metadata();
    metadata.set(POD_UID_HEADER, uid);
    const client = new WorkerClient(address, this.#trust.channel({ role: "worker", podUid: uid }), channelOptions);
    const { promise, resolve, reject } = Promise.withResolvers<T>();
    const answer: Answer<T> = (error, value) => (error === null ? resolve(value) : reject(error));
    const call = start(client, [metadata, { deadline: Date.now() + boundMs }, answer]);
    const cancel = () => call.cancel();
    signal.addEventListener("abort", cancel, { once: true });
    try {
      return await promise;
    } finally {
      signal.removeEventListener("abort", cancel);
      client.close();
    }
  }
}

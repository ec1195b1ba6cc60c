// The Load of one worker: its part of the plan, and where it finds the others.
import type { LoadRequest } from "../../proto/gen/muster/v1/worker.ts";
import { slicesOf } from "../model/shards.ts";
import type { WorkerName } from "./cluster.ts";
import type { ServeGoal } from "./world.ts";

/** By worker index. */
export type Addresses = { comm: readonly string[]; workers: readonly string[] };

export function loadRequest(goal: ServeGoal, name: WorkerName, addresses: Addresses): LoadRequest {
  return {
    incarnation: name.incarnation,
    plan: goal.plan,
    worker: name.worker,
    slices: slicesOf(goal.plan, name.worker),
    commAddresses: [...addresses.comm],
    workerAddresses: [...addresses.workers],
    engine: goal.engine,
    speculation: goal.speculation,
    limits: goal.limits,
    draft: goal.draft,
    reportsAddress: goal.reports?.address ?? "",
    namespace: goal.reports?.namespace ?? "",
    group: goal.reports?.group ?? "",
  };
}

// Groups to reconcile in tests: small plans and workers in any state.

import { cpuInventory } from "../../../controller/plan/hardware.ts";
import { planShards } from "../../../controller/plan/plan.ts";
import { wishesOf } from "../../../controller/plan/wishes.ts";
import type { GroupRecord, WorkerSeen, WorkerView } from "../../../controller/reconcile/cluster.ts";
import type { ServeGoal } from "../../../controller/reconcile/world.ts";
import type { ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import { type WorkerDescription, WorkerPhase } from "../../../proto/gen/muster/v1/worker.ts";
import { modelSpec } from "../plan/models.ts";

export const GROUP = "nano";

/** Twelve heads: one to four ranks hold it. */
const TINY = modelSpec({
  layers: 2,
  hidden: 64,
  heads: 12,
  kvHeads: 12,
  headDim: 16,
  vocab: 128,
  ffn: 0,
  experts: 4,
  topK: 1,
  expertFfn: 32,
  sharedFfn: 32,
  contextTokens: 2048,
  valueBytes: 2,
  tied: false,
});

/** One rank for each worker. */
export function planOf(workers: number, revision = "r1"): ShardPlan {
  const planned = planShards(TINY, cpuInventory(workers), wishesOf({ pins: { ranks: workers, workers } }));
  if (planned.kind === "infeasible") throw new Error(planned.reasons[0]?.text);
  return { ...planned.plan, revision };
}

export function serveGoal(workers: number, revision = "r1"): ServeGoal {
  return {
    kind: "serve",
    plan: planOf(workers, revision),
    engine: undefined,
    speculation: undefined,
    limits: undefined,
    draft: undefined,
  };
}

export function recordOf(changes: Partial<GroupRecord> = {}): GroupRecord {
  return {
    incarnation: 3n,
    revision: "r1",
    begun: true,
    failures: [],
    notBeforeMs: 0,
    restarts: 2,
    failedNodes: {},
    ...changes,
  };
}

export function describe(worker: number, changes: Partial<WorkerDescription> = {}): WorkerDescription {
  return {
    incarnation: 3n,
    worker,
    phase: WorkerPhase.IDLE,
    commAddress: `127.0.0.1:70${worker}`,
    bytesLoaded: 0n,
    bytesTotal: 100n,
    numericsId: "",
    fault: undefined,
    cpu: "test",
    ...changes,
  };
}

export function seen(worker: number, view: WorkerView, incarnation = 3n): WorkerSeen {
  const name = { group: GROUP, incarnation, worker };
  return { name, address: `127.0.0.1:60${worker}${incarnation}`, state: { kind: "running", view } };
}

export function running(worker: number, changes: Partial<WorkerDescription> = {}, incarnation = 3n): WorkerSeen {
  return seen(worker, { kind: "described", description: describe(worker, { incarnation, ...changes }) }, incarnation);
}

export function exited(worker: number, code: number | null, signal: string | null, incarnation = 3n): WorkerSeen {
  const name = { group: GROUP, incarnation, worker };
  return { name, address: "", state: { kind: "exited", code, signal, detail: "" } };
}

// What a decision is made from, and what it is.
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import type { DraftOptions, EngineOptions, ServeLimits, SpeculationOptions } from "../../proto/gen/muster/v1/worker.ts";
import type { Inventory } from "../plan/hardware.ts";
import type { Action, GroupSeen } from "./cluster.ts";
import type { GroupStatus } from "./status.ts";

export type ServeGoal = {
  kind: "serve";
  plan: ShardPlan;
  engine: EngineOptions | undefined;
  speculation: SpeculationOptions | undefined;
  limits: ServeLimits | undefined;
  /** Where given the group drafts for others instead of serving requests. */
  draft?: DraftOptions | undefined;
  /** Whom its leader reports to, and as what; nobody where not given. */
  reports?: { address: string; namespace: string; group: string } | undefined;
};

export type Goal =
  | ServeGoal
  /** The planner has refused: why, and what would fit. */
  | { kind: "infeasible"; detail: string }
  | { kind: "stop"; graceMs: number };

/** An action has failed, not a worker: what went wrong and since when. */
export type Trouble = { sinceMs: number; detail: string };

export type World = {
  nowMs: number;
  goal: Goal;
  inventory: Inventory;
  seen: GroupSeen;
  last: GroupStatus | undefined;
  trouble: Trouble | undefined;
};

/** Why each action is taken, for logs and traces. */
export type Because = { code: string; text: string };

export type Decision = {
  actions: readonly Action[];
  status: GroupStatus;
  /** Look again then, even if nothing changes. */
  wakeMs: number;
  because: readonly Because[];
};

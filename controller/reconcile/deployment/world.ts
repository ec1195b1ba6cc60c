// What is decided for an owner of groups, and from what. Data alone.

import type { Fault } from "../../../proto/gen/muster/v1/worker.ts";
import type { DraftPoolStatus } from "../../api/draft-pool.ts";
import type { ModelDeploymentStatus, Notice } from "../../api/model-deployment.ts";
import type { ReplicaGroupSpec, ReplicaGroupStatus } from "../../api/replica-group.ts";
import type { ShardPlanSpec } from "../../api/shard-plan.ts";
import type { Inventory } from "../../plan/hardware.ts";
import type { LoadSample, ScaleState } from "../autoscale.ts";
import type { Because } from "../world.ts";
import type { OwnerKind, OwnerWish } from "./wish.ts";

/** What both kinds of owner say of themselves. */
export type OwnerStatus = ModelDeploymentStatus & Pick<DraftPoolStatus, "vocabulary" | "targets">;

export type Owner = {
  kind: OwnerKind;
  name: string;
  generation: number;
  status: OwnerStatus;
  isLeaving: boolean;
  /** A refused spec changes nothing that runs. */
  wish: { kind: "ok"; value: OwnerWish } | { kind: "refused"; fault: Fault };
};

export type StoredPlan = {
  name: string;
  /** Hash of the question that it answers; empty where nobody has noted it. */
  question: string;
  createdMs: number;
  spec: ShardPlanSpec;
  /** What its groups were seen to give; see controller/kube/owners/plan-measured.ts. */
  measured: { tokensPerSecond?: number | undefined; calibration?: number | undefined };
};

export type GroupView = {
  name: string;
  spec: ReplicaGroupSpec;
  status: ReplicaGroupStatus;
  createdMs: number;
  generation: number;
  drainUntilMs: number | undefined;
  /** Deleted already, not gone yet. */
  isLeaving: boolean;
};

/** What the planner has said to the question of the wish. */
export type Answer =
  | { kind: "running"; sinceMs: number }
  | { kind: "feasible"; spec: ShardPlanSpec; isShort: boolean }
  | { kind: "infeasible"; reasons: readonly { code: string; text: string }[]; remedy: string | undefined }
  /** The source or a field is wrong: a person must change something. */
  | { kind: "refused"; fault: Fault }
  /** Asked again at `againMs`. */
  | { kind: "failed"; detail: string; againMs: number };

export type PoolView = { name: string; vocabulary: string | undefined; vocabularies: readonly string[]; ready: number };

export type DeploymentWorld = {
  nowMs: number;
  owner: Owner;
  plans: readonly StoredPlan[];
  groups: readonly GroupView[];
  /** Objects of this owner that cannot be read: nothing is done while there are any (R8). */
  unreadable: readonly string[];
  answer: Answer | undefined;
  /** What the planner would say now to the question of the stored plan. */
  better: ShardPlanSpec | undefined;
  /** Nodes with groups of this owner that are cordoned or about to go, with why ("is cordoned"). */
  leaving: ReadonlyMap<string, string>;
  /** What is free for a group of this wish; undefined: not known. */
  free: Inventory | undefined;
  load: readonly LoadSample[];
  scale: ScaleState | undefined;
  /** The DraftPool that the wish names, undefined where there is none of that name. */
  pool: PoolView | undefined;
  /** Of a DraftPool: deployments that name it, with their vocabulary where it is known. */
  targets: readonly { name: string; vocabulary: string | undefined }[];
  /** What the inventory asks of a person. */
  needs: readonly Notice[];
  /** Worker image for new plans. */
  image: string;
  /** The status that events have been told up to; undefined: nothing is told. */
  told: OwnerStatus | undefined;
};

export type DeploymentAction =
  /** Created where there is none of that name; one that is there stays as it is (D1). */
  | { kind: "store-plan"; name: string; question: string; spec: ShardPlanSpec }
  | { kind: "apply-group"; name: string; spec: ReplicaGroupSpec; annotations: Readonly<Record<string, string>> }
  | { kind: "drain-group"; name: string; untilMs: number }
  | { kind: "delete-group"; name: string }
  | { kind: "delete-plan"; name: string };

export type OwnerEvent = { type: "Normal" | "Warning"; reason: string; action: string; note: string };

export type DeploymentDecision = {
  actions: readonly DeploymentAction[];
  status: OwnerStatus;
  events: readonly OwnerEvent[];
  /** "first": no plan is stored for the question; "better": whether there is a better one by now. */
  ask: "first" | "better" | undefined;
  scale: ScaleState | undefined;
  wakeMs: number;
  because: readonly Because[];
};

// Hand-built worlds for the decisions about owners of groups.

import { parseModelDeployment, parseShardPlan } from "../../../controller/api/parse.ts";
import type { ReplicaGroupStatus } from "../../../controller/api/replica-group.ts";
import { wishOfDeployment } from "../../../controller/reconcile/deployment/wish.ts";
import type { DeploymentWorld, GroupView, StoredPlan } from "../../../controller/reconcile/deployment/world.ts";
import { minimalDeployment, planObject } from "../api/objects.ts";

export const NOW = Date.UTC(2026, 10, 2, 10, 0, 0);

export function wishOf(spec: Record<string, unknown> = {}, annotations?: Record<string, string>) {
  const { metadata, ...rest } = minimalDeployment(spec);
  const parsed = parseModelDeployment({ ...rest, metadata: { ...metadata, ...(annotations ? { annotations } : {}) } });
  if (parsed.kind === "refused") throw new Error(`${parsed.fault.field}: ${parsed.fault.detail}`);
  return wishOfDeployment(parsed.value);
}

export function planSpec(change: Record<string, unknown> = {}) {
  const parsed = parseShardPlan(planObject({}));
  if (parsed.kind === "refused") throw new Error(parsed.fault.detail);
  const { planOnly: _, ...model } = parsed.value.spec.model;
  return { ...parsed.value.spec, model, ...change };
}

export function storedPlan(name: string, question = "", createdMs = NOW): StoredPlan {
  return { name, question, createdMs, spec: planSpec(), measured: {} };
}

export type GroupShape = {
  ordinal: number;
  plan: string;
  state?: "Serving" | "Draining";
  status?: ReplicaGroupStatus;
  isLeaving?: boolean;
  drainUntilMs?: number;
};

export function group({
  ordinal,
  plan,
  state = "Serving",
  status = {},
  isLeaving = false,
  drainUntilMs,
}: GroupShape): GroupView {
  return {
    name: `chat-${plan.slice(5, 10)}-${ordinal}`,
    spec: { owner: { kind: "ModelDeployment", name: "chat" }, plan, ordinal, state },
    status,
    createdMs: NOW - 60_000,
    generation: 1,
    drainUntilMs,
    isLeaving,
  };
}

const placement = [{ worker: 0, node: "gpu-1", pod: "p", firstRank: 0, ranks: 4 }];
export const SERVING: ReplicaGroupStatus = {
  phase: "Serving",
  leader: "10.0.0.1:1",
  placement,
  readyRanks: 4,
  ranks: 4,
};
export const LOADING: ReplicaGroupStatus = { phase: "Loading", placement, readyRanks: 0, ranks: 4 };

export function world(change: Partial<DeploymentWorld> = {}, spec: Record<string, unknown> = {}): DeploymentWorld {
  return {
    nowMs: NOW,
    owner: {
      kind: "ModelDeployment",
      name: "chat",
      generation: 3,
      status: {},
      isLeaving: false,
      wish: { kind: "ok", value: wishOf(spec) },
    },
    plans: [],
    groups: [],
    unreadable: [],
    answer: undefined,
    better: undefined,
    leaving: new Map(),
    free: undefined,
    load: [],
    scale: undefined,
    pool: undefined,
    targets: [],
    needs: [],
    image: "worker@sha256:new",
    told: undefined,
    ...change,
  };
}

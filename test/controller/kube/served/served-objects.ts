// ModelDeployments, ShardPlans and ReplicaGroups as a cluster has them, for tests of what gateways are told.
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { planSpec } from "../../reconcile/deployment-views.ts";

export const NS = "models";

export function deployment(name: string, spec: object = {}, status: object = {}, namespace = NS): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ModelDeployment",
    metadata: { name, namespace, creationTimestamp: "2026-11-02T10:00:00Z" },
    spec: { model: { source: "builtin://nano-maverick" }, ...spec },
    status,
  };
}

export function plan(name: string, change: Record<string, unknown> = {}, namespace = NS): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ShardPlan",
    metadata: { name, namespace },
    spec: planSpec(change),
  };
}

type GroupWish = {
  owner?: string;
  kind?: "ModelDeployment" | "DraftPool";
  plan?: string;
  ordinal?: number;
  state?: "Serving" | "Draining";
  isLeaving?: boolean;
  namespace?: string;
};

export function group(name: string, status: object = {}, wish: GroupWish = {}): KubeObject {
  const { owner = "chat", kind = "ModelDeployment", plan: planName = "chat-p1", ordinal = 0 } = wish;
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ReplicaGroup",
    metadata: {
      name,
      namespace: wish.namespace ?? NS,
      ...(wish.isLeaving ? { deletionTimestamp: "2026-11-02T11:00:00Z" } : {}),
    },
    spec: { owner: { kind, name: owner }, plan: planName, ordinal, state: wish.state ?? "Serving" },
    status,
  };
}

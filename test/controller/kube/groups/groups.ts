// A group, its plan and a template, for tests of what is built for it.
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import type { WorkerIdentity, WorkerTemplate } from "../../../../controller/kube/groups/pods.ts";
import type { RankShard } from "../../../../proto/gen/muster/v1/plan.ts";

export const TEMPLATE: WorkerTemplate = {
  image: "registry.example/muster-worker:1.0",
  imagePullPolicy: "IfNotPresent",
  command: ["muster"],
  serviceAccountName: "muster-worker",
  port: 7440,
  shmSize: "16Gi",
  resources: { requests: { cpu: "8", memory: "64Gi" }, limits: { memory: "128Gi" } },
  drainSeconds: 300,
  tokenSeconds: 3600,
  caConfigMap: "muster-ca",
  userId: 65_532,
};

export function replicaGroup(name: string, namespace = "models"): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ReplicaGroup",
    metadata: { name, namespace, uid: `uid-${name}` },
    spec: { owner: { kind: "ModelDeployment", name: "chat" }, plan: "chat-0a1b", ordinal: 0 },
  };
}

/** `perWorker` ranks on each of `workers`. */
export function planOf(workers: number, perWorker: number): WorkerIdentity["plan"] {
  const ranks = Array.from({ length: workers * perWorker }, (_, rank): RankShard => {
    const worker = Math.floor(rank / perWorker);
    const none = undefined;
    const ranges = { heads: none, kvHeads: none, vocab: none, denseFfn: none, sharedFfn: none, expertFfn: none };
    return { rank, worker, experts: [], ...ranges };
  });
  return { workers, ranks };
}

export function identity(changes: Partial<WorkerIdentity> = {}): WorkerIdentity {
  return {
    group: replicaGroup("chat-0"),
    owner: { kind: "ModelDeployment", name: "chat" },
    planName: "chat-0a1b",
    plan: planOf(2, 8),
    incarnation: 3n,
    worker: 1,
    ...changes,
  };
}

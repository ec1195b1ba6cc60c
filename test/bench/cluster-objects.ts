// What a large cluster is full of, for the bench: nodes with GPUs and pods of others. Objects are as large as real ones: what a
// controller keeps of them is a part of the question. Owns the shapes alone; who writes them where is cluster-world.ts and
// cluster-real.ts.
import type { KubeObject } from "../../controller/kube/api/client.ts";

export const NS = "serving";
export const GPUS_EACH = 8;
export const TEAMS = 40;
const DOMAIN_NODES = 4;
const ZONES = 4;

export function nodeOf(index: number): KubeObject {
  const name = `gpu-${String(index).padStart(5, "0")}`;
  const counts = {
    cpu: "192",
    memory: "2113413756Ki",
    pods: "110",
    "ephemeral-storage": "935Gi",
    "nvidia.com/gpu": String(GPUS_EACH),
  };
  const images = Array.from({ length: 20 }, (_, at) => ({
    names: [`images.example/app-${at}@sha256:${"0".repeat(64)}`],
    sizeBytes: 1e8 + at,
  }));
  const labels = {
    "kubernetes.io/hostname": name,
    "nvidia.com/gpu.product": "NVIDIA-H200",
    "nvidia.com/gpu.memory": "143771",
    "nvidia.com/gpu.count": String(GPUS_EACH),
    "nvidia.com/gpu.clique": `clique-${Math.floor(index / DOMAIN_NODES)}`,
    "topology.kubernetes.io/zone": `zone-${index % ZONES}`,
  };
  return {
    apiVersion: "v1",
    kind: "Node",
    metadata: { name, labels },
    spec: {},
    status: {
      allocatable: counts,
      capacity: counts,
      images,
      conditions: [{ type: "Ready", status: "True", reason: "KubeletReady" }],
    },
  };
}

/** Of somebody else, without GPUs; some 5 KB of JSON, as pods of today have. */
export function strangerOf(index: number, nodes: number): KubeObject {
  const name = `web-${index}`;
  const env = Array.from({ length: 12 }, (_, at) => ({
    name: `SETTING_${at}`,
    value: `value-${at}-of-${name}-${"x".repeat(24)}`,
  }));
  const labels = { app: `web-${index % 500}`, "pod-template-hash": `h${index % 977}`, team: `team-${index % TEAMS}` };
  const probe = {
    httpGet: { path: "/healthz", port: 8080, scheme: "HTTP" },
    periodSeconds: 10,
    timeoutSeconds: 1,
    failureThreshold: 3,
  };
  const time = "2026-01-01T00:00:00Z";
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name,
      namespace: `team-${index % TEAMS}`,
      labels,
      annotations: { "config.example/hash": "a".repeat(64) },
      ownerReferences: [
        {
          apiVersion: "apps/v1",
          kind: "ReplicaSet",
          name: `web-${index % 500}`,
          uid: `rs-${index % 500}`,
          controller: true,
        },
      ],
      ...{ managedFields: [fields("kube-controller-manager"), fields("kubelet")] },
    },
    spec: {
      nodeName: `gpu-${String(index % nodes).padStart(5, "0")}`,
      containers: [
        {
          name: "web",
          image: `images.example/web:${index % 50}`,
          env,
          resources: { requests: { cpu: "1", memory: "1Gi" } },
          livenessProbe: probe,
          readinessProbe: probe,
          volumeMounts: [{ name: "token", mountPath: "/var/run/secrets/kubernetes.io/serviceaccount" }],
        },
      ],
      volumes: [
        {
          name: "token",
          projected: { sources: [{ serviceAccountToken: { path: "token", expirationSeconds: 3607 } }] },
        },
      ],
      tolerations: ["not-ready", "unreachable"].map((key) => ({
        key: `node.kubernetes.io/${key}`,
        operator: "Exists",
        effect: "NoExecute",
        tolerationSeconds: 300,
      })),
    },
    status: {
      phase: "Running",
      podIP: `10.${(index >> 16) & 255}.${(index >> 8) & 255}.${index & 255}`,
      conditions: ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map((type) => ({
        type,
        status: "True",
        lastTransitionTime: time,
      })),
      containerStatuses: [
        {
          name: "web",
          ready: true,
          restartCount: 0,
          image: `images.example/web:${index % 50}`,
          imageID: "b".repeat(71),
          containerID: "c".repeat(78),
          state: { running: { startedAt: time } },
        },
      ],
    },
  };
}

const fields = (manager: string) => ({
  manager,
  operation: "Update",
  apiVersion: "v1",
  time: "2026-01-01T00:00:00Z",
  fieldsType: "FieldsV1",
  fieldsV1: {
    "f:metadata": { "f:labels": { ".": {}, "f:app": {}, "f:team": {} } },
    "f:spec": { "f:containers": { 'k:{"name":"web"}': { ".": {}, "f:env": {}, "f:image": {}, "f:resources": {} } } },
  },
});

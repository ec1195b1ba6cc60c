// Objects of the four kinds as they are written: the smallest, and those in which every field is set.
import { API_VERSION, type Kind } from "../../../controller/api/meta.ts";

type Spec = Record<string, unknown>;

/** Leaves out what is undefined, as JSON does. */
function object<S extends Spec>(kind: Kind, name: string, spec: S) {
  return { apiVersion: API_VERSION, kind, metadata: { name, namespace: "default" }, spec };
}

export function minimalDeployment(spec: Spec) {
  return object("ModelDeployment", "chat", { model: { source: "builtin://nano-maverick" }, ...spec });
}

const podPatch = {
  labels: { team: "search" },
  annotations: { "example.com/note": "a note" },
  queueLabels: { "kueue.x-k8s.io/queue-name": "gpus" },
  env: [{ name: "NCCL_DEBUG", value: "INFO" }],
  resources: { requests: { cpu: 8, memory: "64Gi" }, limits: { "rdma/hca": "1" } },
  tolerations: [{ key: "gpu", operator: "Equal", value: "yes", effect: "NoExecute", tolerationSeconds: 30 }],
  priorityClassName: "high",
  imagePullSecrets: [{ name: "registry" }],
  hostCache: { path: "/var/cache/muster/models" },
  ipcLock: true,
};

const gpu = {
  product: "H200",
  nodeSelector: { pool: "big" },
  tolerations: [{ key: "pool", operator: "Equal", value: "big", effect: "NoSchedule", tolerationSeconds: 0 }],
};

export function fullDeployment(spec: Spec = {}) {
  return object("ModelDeployment", "chat", {
    model: { source: "hf://org/name/file.gguf", revision: "v1", auth: { secretName: "hub", key: "hf-token" } },
    format: { container: "gguf", quantisation: "Q4_K_M" },
    parallelism: { tp: 8, dp: 1, ep: 4, etp: 2, pp: 1 },
    replicas: 2,
    autoscale: { min: 0, max: 4, targets: { queue: 8, ttftMs: 800, itlMs: 40 } },
    slo: { ttftMs: 500, itlMs: 30, contextTokens: 65_536, concurrency: 32 },
    kvCache: { dtype: "fp8", fraction: 0.4, offload: { hostMemory: "64Gi" } },
    experts: { redundant: 8, balancing: "measured" },
    speculation: { draftPool: "drafts", lossless: "L2" },
    gpu: { ...gpu, count: 8, topology: { nodes: 2, within: "zone" } },
    rollout: { kind: "inPlace", drainTimeout: "90s" },
    priority: 10,
    podPatch,
    ...spec,
  });
}

export function draftPool(spec: Spec) {
  return object("DraftPool", "drafts", { model: { source: "builtin://nano-draft" }, ...spec });
}

export function fullPool() {
  return draftPool({
    model: { source: "hf://org/small", revision: "v1", auth: { secretName: "hub", key: "hf-token" } },
    replicas: 3,
    vocabularies: ["00ff00ff00ff00ff"],
    gpu: { ...gpu, count: 1, topology: { nodes: 1, within: "nvlink" } },
    podPatch,
  });
}

export function planObject(spec: Spec) {
  return object("ShardPlan", "chat-0123456789ab", {
    revision: "0123456789abcdef0123456789abcdef",
    model: {
      name: "nano-maverick",
      family: "llama4",
      source: "builtin://nano-maverick",
      digest: "ab".repeat(32),
      format: "safetensors BF16",
      parameters: 12_000_000,
      parametersActive: 5_000_000,
      contextTokens: 2048,
      vocabSize: 2048,
      vocabulary: "00ff00ff00ff00ff",
      hasChatTemplate: true,
      planOnly: "only an example",
      projected: false,
    },
    cut: { world: 4, tp: 4, dp: 1, ep: 2, etp: 2, pp: 1 },
    workers: 2,
    contextTokens: 2048,
    kv: { blockTokens: 16, blocks: 129 },
    shardRules: [{ role: "QUERY", rule: "HEADS" }],
    ledgers: [{ ranks: [{ first: 0, last: 3 }], bytes: { attention: 4096, kv: 1024 }, used: 5120, capacity: 1e9 }],
    reasons: [{ kind: "Chosen", code: "most-tokens-per-second", text: "the fastest of 2 cuts that fit." }],
    prediction: { ttftMs: 1.25, itlMs: 0.5, tokensPerSecond: 2000.5, concurrency: 16, bound: "memory" },
    image: `worker@sha256:${"0".repeat(64)}`,
    podTemplateDigest: "cd".repeat(32),
    ...spec,
  });
}

export function groupObject(spec: Spec) {
  return object("ReplicaGroup", "chat-0", {
    owner: { kind: "ModelDeployment", name: "chat" },
    plan: "chat-0123456789ab",
    ordinal: 0,
    ...spec,
  });
}

// Nodes and Pods as an API server has them, for tests of what is read from them.
import type { KubeObject } from "../../../controller/kube/api/client.ts";

export type NodeWish = {
  gpus?: number;
  labels?: Record<string, string>;
  taints?: { key: string; value?: string; effect: string }[];
  unschedulable?: boolean;
  ready?: boolean;
  resources?: Record<string, string>;
};

export const H200 = { "nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "143771" };

export function node(name: string, wish: NodeWish = {}): KubeObject {
  const { gpus = 8, labels = H200, taints = [], unschedulable, ready = true, resources = {} } = wish;
  const allocatable = {
    cpu: "192",
    memory: "2113413756Ki",
    ...(gpus > 0 ? { "nvidia.com/gpu": String(gpus) } : {}),
    ...resources,
  };
  return {
    apiVersion: "v1",
    kind: "Node",
    metadata: { name, labels: { "kubernetes.io/hostname": name, ...labels } },
    spec: { taints, ...(unschedulable === undefined ? {} : { unschedulable }) },
    status: {
      allocatable,
      capacity: allocatable,
      conditions: [
        { type: "MemoryPressure", status: "False" },
        ready
          ? { type: "Ready", status: "True" }
          : {
              type: "Ready",
              status: "Unknown",
              reason: "NodeStatusUnknown",
              message: "Kubelet stopped posting node status.",
            },
      ],
    },
  };
}

export type PodWish = {
  gpus?: number;
  node?: string;
  phase?: string;
  namespace?: string;
  leaving?: boolean;
  nominated?: string;
  init?: { gpus: number; sidecar?: boolean }[];
  limitsOnly?: boolean;
};

export function pod(name: string, wish: PodWish = {}): KubeObject {
  const {
    gpus = 0,
    node: nodeName,
    phase = "Running",
    namespace = "other",
    leaving,
    nominated,
    init = [],
    limitsOnly,
  } = wish;
  const resources = (count: number) => {
    const list = { cpu: "2", ...(count > 0 ? { "nvidia.com/gpu": String(count) } : {}) };
    return limitsOnly ? { limits: list } : { requests: list, limits: list };
  };
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name,
      namespace,
      uid: `uid-${name}`,
      resourceVersion: "1",
      ...(leaving ? { deletionTimestamp: "2026-11-25T12:00:00Z" } : {}),
    },
    spec: {
      containers: [{ name: "main", resources: resources(gpus) }, { name: "helper" }],
      initContainers: init.map((each, index) => ({
        name: `init-${index}`,
        resources: resources(each.gpus),
        ...(each.sidecar ? { restartPolicy: "Always" } : {}),
      })),
      ...(nodeName ? { nodeName } : {}),
    },
    status: { phase, ...(nominated ? { nominatedNodeName: nominated } : {}) },
  };
}

export function slice(nodeName: string, devices = 8, driver = "gpu.nvidia.com"): KubeObject {
  return {
    apiVersion: "resource.k8s.io/v1",
    kind: "ResourceSlice",
    metadata: { name: `${nodeName}-${driver}` },
    spec: { nodeName, driver, devices: Array.from({ length: devices }, (_, index) => ({ name: `gpu-${index}` })) },
  };
}

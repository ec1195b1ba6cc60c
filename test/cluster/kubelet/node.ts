// The Node object and the Lease that a kubelet keeps: what the scheduler and the node lifecycle controller look at.
import { z } from "zod";
import { ApiRefusal, type RawApi } from "../controlplane/raw-api.ts";

const LEASE_SECONDS = 40; // what kubelets write; the controller manager's grace is what counts
const GPU_PRODUCT = "NVIDIA-H200";

export type NodeWish = {
  name: string;
  /** Devices of `nvidia.com/gpu`; none of them exists. */
  gpus: number;
  labels?: Record<string, string>;
};

const Lease = z.looseObject({ metadata: z.looseObject({ resourceVersion: z.string() }), spec: z.looseObject({}) });

export function nodeObject(wish: NodeWish, hostIp: string): Record<string, unknown> {
  const { name, gpus, labels = {} } = wish;
  const gpuLabels = gpus > 0 ? { "nvidia.com/gpu.product": GPU_PRODUCT, "nvidia.com/gpu.count": String(gpus) } : {};
  return {
    apiVersion: "v1",
    kind: "Node",
    metadata: {
      name,
      labels: {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        ...gpuLabels,
        ...labels,
      },
    },
    spec: { podCIDR: hostIp.replace(/\.1$/, ".0/24") },
  };
}

export function nodeStatus(wish: NodeWish, hostIp: string): Record<string, unknown> {
  const now = new Date().toISOString();
  const sizes = {
    cpu: "64",
    memory: "512Gi",
    "ephemeral-storage": "1Ti",
    pods: "200",
    ...(wish.gpus > 0 ? { "nvidia.com/gpu": String(wish.gpus) } : {}),
  };
  const condition = (type: string, status: "True" | "False", reason: string) => ({
    type,
    status,
    reason,
    message: reason,
    lastHeartbeatTime: now,
    lastTransitionTime: now,
  });
  return {
    capacity: sizes,
    allocatable: sizes,
    addresses: [
      { type: "InternalIP", address: hostIp },
      { type: "Hostname", address: wish.name },
    ],
    conditions: [
      condition("Ready", "True", "KubeletReady"),
      condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
      condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
      condition("PIDPressure", "False", "KubeletHasSufficientPID"),
    ],
    nodeInfo: {
      architecture: "amd64",
      bootID: "",
      containerRuntimeVersion: "process://1",
      kernelVersion: "",
      kubeProxyVersion: "",
      kubeletVersion: "v1.37.2",
      machineID: "",
      operatingSystem: "linux",
      osImage: "process kubelet",
      systemUUID: "",
    },
  };
}

/** Creates or renews the node's lease in kube-node-lease. */
export async function renewLease(api: RawApi, node: string, signal: AbortSignal): Promise<void> {
  const folder = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
  const spec = {
    holderIdentity: node,
    leaseDurationSeconds: LEASE_SECONDS,
    renewTime: new Date().toISOString().replace("Z", "000Z"), // MicroTime
  };
  const lease = { apiVersion: "coordination.k8s.io/v1", kind: "Lease", metadata: { name: node }, spec };
  const found = await api.find(`${folder}/${node}`, signal);
  if (found === undefined) {
    await api.ask({ method: "POST", path: folder, body: lease, signal }).catch((error) => {
      if (!(error instanceof ApiRefusal) || error.code !== 409) throw error;
    });
    return;
  }
  const { resourceVersion } = Lease.parse(found).metadata;
  const body = { ...lease, metadata: { name: node, resourceVersion } };
  await api.ask({ method: "PUT", path: `${folder}/${node}`, body, signal });
}

// What of a Node decides whether it can hold ranks: GPUs, product, memory, what they share, and why nothing may go there.
import type { KubeObject } from "../api/client.ts";
import { countOf, fieldsOf, listOf, textOf } from "../api/fields.ts";
import { GPU_RESOURCE } from "./pod-facts.ts";

export type Taint = { key: string; value: string; effect: string };

export type NodeFacts = {
  name: string;
  labels: Readonly<Record<string, string>>;
  taints: readonly Taint[];
  /** Allocatable whole GPUs of the device plugin. */
  gpus: number;
  /** Cards in the machine, where GPU feature discovery says so: more than `gpus` means that some are not healthy. */
  cards: number | undefined;
  /** As the label has it, without anything done to it. */
  product: string | undefined;
  memoryBytes: number | undefined;
  /** NVLink fabric that reaches over nodes. */
  clique: string | undefined;
  zone: string | undefined;
  isCordoned: boolean;
  /** Why whatever runs there is to go elsewhere, while it still runs: cordoned, or about to be taken away. */
  leaving: string | undefined;
  /** Undefined where it is; else since what and why, as the condition says. */
  notReady: string | undefined;
  /** Why its GPUs are no whole devices. */
  split: { code: "mig" | "shared"; text: string } | undefined;
};

const LABEL = {
  product: "nvidia.com/gpu.product",
  memory: "nvidia.com/gpu.memory",
  count: "nvidia.com/gpu.count",
  clique: "nvidia.com/gpu.clique",
  replicas: "nvidia.com/gpu.replicas",
  sharing: "nvidia.com/gpu.sharing-strategy",
  migStrategy: "nvidia.com/mig.strategy",
  zone: "topology.kubernetes.io/zone",
} as const;

const MIG_PREFIX = "nvidia.com/mig-";
const SHARED_RESOURCE = "nvidia.com/gpu.shared";
const MEBIBYTE = 1024 * 1024;

const known = new WeakMap<KubeObject, NodeFacts>();

export function nodeFacts(node: KubeObject): NodeFacts {
  const found = known.get(node) ?? read(node);
  known.set(node, found);
  return found;
}

function read(node: KubeObject): NodeFacts {
  const labels = node.metadata.labels ?? {};
  const spec = fieldsOf(node.spec);
  const status = fieldsOf(node.status);
  const allocatable = fieldsOf(status.allocatable ?? status.capacity);
  const memory = countOf(labels[LABEL.memory]);
  const taints = listOf(spec.taints).map((each): Taint => {
    const { key, value, effect } = fieldsOf(each);
    return { key: textOf(key) ?? "", value: textOf(value) ?? "", effect: textOf(effect) ?? "" };
  });
  return {
    name: node.metadata.name,
    labels,
    taints,
    gpus: countOf(allocatable[GPU_RESOURCE]),
    cards: countOf(labels[LABEL.count]) || undefined,
    product: labels[LABEL.product] || undefined,
    memoryBytes: memory > 0 ? memory * MEBIBYTE : undefined,
    clique: labels[LABEL.clique] || undefined,
    zone: labels[LABEL.zone] || undefined,
    isCordoned: spec.unschedulable === true,
    leaving: leavingOf(spec.unschedulable === true, taints),
    notReady: notReadyOf(status.conditions),
    split: splitOf(labels, fieldsOf(status.capacity), allocatable),
  };
}

/** Taints by which autoscalers say that they will take the node away. */
const LEAVING_TAINTS: ReadonlySet<string> = new Set(["ToBeDeletedByClusterAutoscaler", "karpenter.sh/disrupted"]);

/** kubectl drain cordons first. */
function leavingOf(isCordoned: boolean, taints: readonly Taint[]): string | undefined {
  if (isCordoned) return "is cordoned";
  const taint = taints.find(({ key }) => LEAVING_TAINTS.has(key));
  return taint === undefined ? undefined : `has the taint ${taint.key}`;
}

function notReadyOf(conditions: unknown): string | undefined {
  const ready = listOf(conditions)
    .map(fieldsOf)
    .find((each) => each.type === "Ready");
  if (ready === undefined) return "it has not reported yet";
  if (ready.status === "True") return undefined;
  return textOf(ready.message) || textOf(ready.reason) || `its condition Ready is ${String(ready.status)}`;
}

/**
 * The label mig.strategy alone splits nothing: the GPU operator writes "single" on every node by default. What is cut shows
 * in the product ("...-MIG-1g.10gb", strategy single) or as resources of its own (strategy mixed).
 */
function splitOf(
  labels: Readonly<Record<string, string>>,
  capacity: Readonly<Record<string, unknown>>,
  allocatable: Readonly<Record<string, unknown>>,
): NodeFacts["split"] {
  const product = labels[LABEL.product] ?? "";
  const slice = [...Object.keys(capacity), ...Object.keys(allocatable)].find(
    (name) => name.startsWith(MIG_PREFIX) && countOf(capacity[name] ?? allocatable[name]) > 0,
  );
  if (product.includes("-MIG-") || slice !== undefined) {
    const what = slice ?? product;
    const strategy = labels[LABEL.migStrategy] ?? "unknown";
    return { code: "mig", text: `its GPUs are cut by MIG (${what}, mig.strategy ${strategy}); ranks need whole GPUs` };
  }
  const replicas = countOf(labels[LABEL.replicas]);
  const strategy = labels[LABEL.sharing] ?? "";
  const isShared = replicas > 1 || product.endsWith("-SHARED") || countOf(allocatable[SHARED_RESOURCE]) > 0;
  if (isShared || (strategy !== "" && strategy !== "none")) {
    const how = replicas > 1 ? `gpu.replicas is ${replicas}` : strategy || SHARED_RESOURCE;
    return { code: "shared", text: `its GPUs are shared between pods (${how}); ranks need GPUs of their own` };
  }
  return undefined;
}

// From Nodes, Pods and ResourceSlices to what there is to plan on and to place on. Owns what counts as a GPU of ours, why a
// node is refused and what a person has to tell us; owns no reservation (reservations.ts) and no request to a server.
//
//   V1  free = allocatable - what every pod that is not over holds there, whoever's it is; never below 0.
//   V2  a node that is refused or closed is named with its reason; none disappears silently.
//   V3  order of input does not matter: nodes come out by name.
import { LABELS } from "../../api/meta.ts";
import { type Device, deviceOf, type Inventory, type InventoryNode } from "../../plan/hardware.ts";
import type { KubeObject } from "../api/client.ts";
import { fieldsOf, listOf, textOf } from "../api/fields.ts";
import { GPU_TOLERATION, isSelected, refusingTaint, type Toleration, taintText } from "../gangs/placing.ts";
import { isReachable, type NodeTerm } from "../sources/volumes.ts";
import { type NodeFacts, nodeFacts, type Taint } from "./node-facts.ts";
import { podFacts } from "./pod-facts.ts";

export type GpuNode = {
  name: string;
  device: Device;
  allocatable: number;
  held: number;
  free: number;
  /** What its GPUs reach by NVLink: the clique, or the node alone. */
  domain: string;
  zone: string | undefined;
  labels: Readonly<Record<string, string>>;
  taints: readonly Taint[];
  /** Undefined where new pods may go there. What runs there goes on. */
  closed: { code: "cordoned" | "not-ready"; text: string } | undefined;
};

export type RefusedNode = { name: string; code: "mig" | "shared" | "dra-only" | "no-labels"; text: string };

/** What a person can say that the cluster does not; said once for all nodes it is about. */
export type Need = {
  code: "gpu-labels" | "unknown-product" | "unhealthy-gpus" | "mig" | "shared" | "dra-only";
  text: string;
  nodes: readonly string[];
};

export type ClusterInventory = { nodes: readonly GpuNode[]; refused: readonly RefusedNode[]; needs: readonly Need[] };

export type ClusterObjects = {
  nodes: readonly KubeObject[];
  pods: readonly KubeObject[];
  /** Empty where the API server has none. */
  slices: readonly KubeObject[];
};

const DRA_DRIVER = "gpu.nvidia.com";
/** Stands in for products without a row of their own: the slowest that is served, so that no promise is too high. */
const UNKNOWN_LIKE = "L40S";

/** What one node is to us. `lacks`: what nobody has said of it, or what is not well with it. */
export type NodeFinding = { node: GpuNode; lacks: readonly ("product" | "cards")[] } | { refused: RefusedNode };

/** `product`: what nodes without labels are taken for, because a person has said so. */
export function inventoryOf(objects: ClusterObjects, product?: string): ClusterInventory {
  const held = heldByNode(objects.pods);
  const sliced = new Set(objects.slices.flatMap((slice) => slicedNode(slice) ?? []));
  const facts = objects.nodes.map(nodeFacts).toSorted((one, other) => (one.name < other.name ? -1 : 1));
  return inventoryFrom(
    facts.flatMap(
      (each) => findingOf(each, { held: held.get(each.name) ?? 0, isSliced: sliced.has(each.name), product }) ?? [],
    ),
  );
}

export type NodeUse = {
  /** GPUs that pods hold there. */
  held: number;
  /** A ResourceSlice offers its GPUs. */
  isSliced: boolean;
  product: string | undefined;
};

/** Undefined for a node that offers no GPU in any way. */
export function findingOf(facts: NodeFacts, { held, isSliced, product }: NodeUse): NodeFinding | undefined {
  const { name } = facts;
  if (facts.split !== undefined) return { refused: { name, ...facts.split } };
  if (facts.gpus === 0) return isSliced ? { refused: { name, code: "dra-only", text: DRA_TEXT } } : undefined;
  const device = deviceOn(facts, product);
  if (device === undefined)
    return { refused: { name, code: "no-labels", text: "neither product nor memory of its GPUs is known" } };
  const lacks: ("product" | "cards")[] = [];
  if (!device.isKnown) lacks.push("product");
  if ((facts.cards ?? 0) > facts.gpus) lacks.push("cards");
  return { node: gpuNode(facts, device.device, held), lacks };
}

/** `findings`: by name (V3). */
export function inventoryFrom(findings: Iterable<NodeFinding>): ClusterInventory {
  const nodes: GpuNode[] = [];
  const refused: RefusedNode[] = [];
  const missing: Missing = { labels: [], unknown: [], unhealthy: [] };
  for (const finding of findings) {
    if ("refused" in finding) {
      refused.push(finding.refused);
      if (finding.refused.code === "no-labels") missing.labels.push(finding.refused.name);
      continue;
    }
    const { node, lacks } = finding;
    if (lacks.includes("product")) missing.unknown.push(node.name);
    if (lacks.includes("cards")) missing.unhealthy.push(node.name);
    nodes.push(node);
  }
  return { nodes, refused, needs: [...needsOf(missing), ...needsOfRefused(refused)] };
}

const DRA_TEXT =
  "its GPUs are offered by DRA (ResourceSlices of gpu.nvidia.com) and not as nvidia.com/gpu; run the device plugin there";

function gpuNode(facts: NodeFacts, device: Device, held: number): GpuNode {
  const { name, gpus, labels, taints, zone } = facts;
  const free = Math.max(0, gpus - held);
  const closed: GpuNode["closed"] =
    facts.notReady !== undefined
      ? { code: "not-ready", text: facts.notReady }
      : facts.isCordoned
        ? { code: "cordoned", text: "it is cordoned" }
        : undefined;
  return { name, device, allocatable: gpus, held, free, domain: facts.clique ?? name, zone, labels, taints, closed };
}

function heldByNode(pods: readonly KubeObject[]): Map<string, number> {
  const held = new Map<string, number>();
  for (const pod of pods) {
    const { node, gpus } = heldBy(pod) ?? { node: "", gpus: 0 };
    if (gpus > 0) held.set(node, (held.get(node) ?? 0) + gpus);
  }
  return held;
}

/** What a pod holds and where; undefined where it holds nothing. */
export function heldBy(object: KubeObject): { node: string; gpus: number } | undefined {
  const pod = podFacts(object);
  // A nominated pod waits for the end of those it preempts; the scheduler keeps the room for it, and so do we. For pods of
  // our own the reservation keeps it already.
  const isOurs = pod.labels[LABELS.group] !== undefined;
  const node = pod.node || (isOurs ? "" : pod.nominated);
  return node === "" || pod.isOver || pod.gpus === 0 ? undefined : { node, gpus: pod.gpus };
}

/** The node whose GPUs a ResourceSlice offers. */
export function slicedNode(slice: KubeObject): string | undefined {
  const spec = fieldsOf(slice.spec);
  return spec.driver === DRA_DRIVER && listOf(spec.devices).length > 0 ? textOf(spec.nodeName) : undefined;
}

/** Names of nodes. */
type Missing = { labels: string[]; unknown: string[]; unhealthy: string[] };

function needsOf(missing: Missing): Need[] {
  const needs: Need[] = [];
  const ask = (code: Need["code"], nodes: string[], text: (count: string) => string): void => {
    const count = nodes.length === 1 ? "1 node" : `${nodes.length} nodes`;
    if (nodes.length > 0) needs.push({ code, nodes, text: text(count) });
  };
  ask(
    "gpu-labels",
    missing.labels,
    (count) => `${count} offer GPUs without saying which: run GPU feature discovery, or write spec.gpu.product`,
  );
  ask(
    "unknown-product",
    missing.unknown,
    (count) =>
      `${count} have GPUs of a product without known speeds: fits are exact, predicted speeds are those of ${UNKNOWN_LIKE}`,
  );
  ask(
    "unhealthy-gpus",
    missing.unhealthy,
    (count) => `${count} have more GPUs than they offer: look at the device plugin there`,
  );
  return needs;
}

/** Nodes named in one text. */
const NAMED_MAX = 4;

/** Nodes whose GPUs nobody can use as they are: one text for each reason, by name. */
function needsOfRefused(refused: readonly RefusedNode[]): Need[] {
  const needs: Need[] = [];
  for (const [text, members] of Map.groupBy(refused, ({ text }) => text)) {
    const nodes = members.map(({ name }) => name);
    const code = members[0]?.code;
    if (code === undefined || code === "no-labels") continue; // asked for above
    const more = nodes.length > NAMED_MAX ? ` and ${nodes.length - NAMED_MAX} more` : "";
    const named = nodes.slice(0, NAMED_MAX).join(", ");
    needs.push({ code, nodes, text: `not used: ${nodes.length === 1 ? "node" : "nodes"} ${named}${more}: ${text}` });
  }
  return needs;
}

// ---- products ----

/** Names that GPU feature discovery writes. PCIe and NVL boards of the same chip are slower and have no row. */
const PRODUCTS: readonly [RegExp, string][] = [
  [/GB200/i, "GB200"],
  [/B200/i, "B200"],
  [/H200/i, "H200"],
  [/H100/i, "H100"],
  [/H800/i, "H800"],
  [/A100-SXM.*80GB/i, "A100-80"],
  [/L40S/i, "L40S"],
];
const SLOW_BOARD = /PCIe|NVL(?!\d)/i;

/** `NVIDIA-H100-80GB-HBM3` -> `H100`; undefined for what has no row in the hardware table. */
export function productOf(label: string): string | undefined {
  const exact = deviceOf(label)?.product;
  if (exact !== undefined) return exact;
  if (SLOW_BOARD.test(label)) return undefined;
  return PRODUCTS.find(([pattern]) => pattern.test(label))?.[1];
}

function deviceOn(facts: NodeFacts, said: string | undefined): { device: Device; isKnown: boolean } | undefined {
  const label = facts.product ?? said;
  const row = label === undefined ? undefined : deviceOf(productOf(label) ?? "");
  if (row !== undefined) {
    // Never more than the table has: a plan made from a notation such as 8xH200 is then the plan of the cluster.
    const memoryBytes = Math.min(row.memoryBytes, facts.memoryBytes ?? row.memoryBytes);
    return { device: { ...row, memoryBytes }, isKnown: true };
  }
  const like = deviceOf(UNKNOWN_LIKE);
  if (facts.memoryBytes === undefined || like === undefined) return undefined;
  return { device: { ...like, product: label ?? "GPU", memoryBytes: facts.memoryBytes }, isKnown: false };
}

// ---- for the planner ----

export type Selection = {
  product?: string | undefined;
  nodeSelector?: Readonly<Record<string, string>> | undefined;
  tolerations?: readonly Toleration[] | undefined;
  /** Nodes that the model's volume reaches; undefined or empty: all. */
  volume?: readonly NodeTerm[] | undefined;
};

/** Why pods of this wish may not go to the node; undefined where they may. */
export function whyNot(node: GpuNode, selection: Selection): string | undefined {
  if (node.closed !== undefined) return node.closed.text;
  if (!isProduct(node, selection.product)) return `its GPUs are ${node.device.product}`;
  if (!isSelected(node.labels, selection.nodeSelector ?? {})) return "the node selector does not match";
  if (!isReachable(selection.volume ?? [], node)) return "the model's volume cannot be mounted there";
  const taint = refusingTaint(node.taints, [GPU_TOLERATION, ...(selection.tolerations ?? [])]);
  return taint === undefined ? undefined : `the taint ${taintText(taint)} is not tolerated`;
}

function isProduct(node: GpuNode, wished: string | undefined): boolean {
  if (wished === undefined) return true;
  const name = productOf(wished) ?? wished;
  return name.toLowerCase() === node.device.product.toLowerCase();
}

/**
 * What the planner may count on: `free` for a group that is to be placed now, `all` for what the hardware could hold if
 * nobody else were there (whether a wish can ever be met). Nodes without any are left out.
 */
export function plannable(view: ClusterInventory, selection: Selection, count: "free" | "all"): Inventory {
  return { nodes: view.nodes.flatMap((node) => plannableNode(node, selection, count) ?? []) };
}

/** Undefined where it has nothing for this selection. */
export function plannableNode(node: GpuNode, selection: Selection, count: "free" | "all"): InventoryNode | undefined {
  const devices = count === "free" ? node.free : node.allocatable;
  if (devices === 0 || whyNot(node, selection) !== undefined) return undefined;
  const { name, device, domain } = node;
  return { kind: "gpu", name, devices: Array.from({ length: devices }, () => device), linkDomain: domain };
}

// Where the ranks of a group sit: which nodes, which device each, what they share. Pure arithmetic over an inventory.
import type { Device, Inventory, InventoryNode } from "./hardware.ts";
import { CPU_RANKS_MAX } from "./hardware.ts";
import type { Backend } from "./ledger.ts";
import type { Rates } from "./roofline.ts";

export type Placement = {
  backend: Backend;
  workers: number;
  /** Device memory of each rank; ranks of one CPU node share it evenly. */
  capacities: readonly number[];
  /** Ranks on one node. */
  perNode: number;
  /** Of the slowest rank. */
  rates: Rates;
};

export type Refusal = { code: string; text: string };

/** Nodes of the kind of the first, the largest devices first: a small node that joins never makes a group worse. */
export function largestFirst({ nodes }: Inventory): readonly InventoryNode[] {
  const kind = nodes[0]?.kind;
  const sized = nodes.filter((node) => node.kind === kind).map((node) => ({ node, memoryBytes: memoryOf(node) }));
  return sized.toSorted((one, other) => other.memoryBytes - one.memoryBytes).map(({ node }) => node);
}

/** Places `world` ranks evenly on the fewest nodes, or on `workers` of them. `nodes`: largest first. */
export function place(
  nodes: readonly InventoryNode[],
  world: number,
  workers: number | undefined,
): Placement | Refusal {
  if (nodes.length === 0) return { code: "no-nodes", text: "the inventory has no nodes" };
  for (const count of workers === undefined ? countsUpTo(nodes.length, world) : [workers]) {
    const chosen = choose(nodes, world, count);
    if (chosen !== undefined) return placed(chosen, world);
  }
  return refuse(nodes, world, workers);
}

function countsUpTo(nodes: number, world: number): number[] {
  return Array.from({ length: Math.min(nodes, world) }, (_, index) => index + 1);
}

function memoryOf(node: InventoryNode): number {
  return node.kind === "cpu" ? node.host.memoryBytes : Math.min(...node.devices.map((device) => device.memoryBytes));
}

const room = (node: InventoryNode): number => (node.kind === "gpu" ? node.devices.length : CPU_RANKS_MAX);

/** The first `count` nodes that hold their share: the search ends with them, because there are thousands of others. */
function choose(nodes: readonly InventoryNode[], world: number, count: number): InventoryNode[] | undefined {
  if (count < 1 || count > world || world % count !== 0) return undefined;
  const chosen: InventoryNode[] = [];
  for (const node of nodes) {
    if (room(node) >= world / count && chosen.push(node) === count) return chosen;
  }
  return undefined;
}

function placed(nodes: readonly InventoryNode[], world: number): Placement {
  const perNode = world / nodes.length;
  const devices = nodes.flatMap((node) =>
    node.kind === "gpu"
      ? node.devices.slice(0, perNode)
      : Array.from({ length: perNode }, () => shareOf(node.host, perNode)),
  );
  const backend: Backend = nodes[0]?.kind ?? "cpu";
  const least = (figure: (device: Device) => number): number => Math.min(...devices.map(figure));
  return {
    backend,
    workers: nodes.length,
    capacities: devices.map((device) => device.memoryBytes),
    perNode,
    rates: {
      kind: backend,
      memoryBytesPerSecond: least((device) => device.memoryBytesPerSecond),
      bf16FlopsPerSecond: least((device) => device.bf16FlopsPerSecond),
      fp8FlopsPerSecond: least((device) => device.fp8FlopsPerSecond),
      linkBytesPerSecond: least((device) => device.linkBytesPerSecond),
      networkBytesPerSecond: least((device) => device.networkBytesPerSecond),
    },
  };
}

/** What each of `ranks` has of a CPU node that they share. */
function shareOf(host: Device, ranks: number): Device {
  return {
    ...host,
    memoryBytes: host.memoryBytes / ranks,
    memoryBytesPerSecond: host.memoryBytesPerSecond / ranks,
    bf16FlopsPerSecond: host.bf16FlopsPerSecond / ranks,
    fp8FlopsPerSecond: host.fp8FlopsPerSecond / ranks,
    linkBytesPerSecond: host.linkBytesPerSecond / ranks,
    networkBytesPerSecond: host.networkBytesPerSecond / ranks,
  };
}

function refuse(nodes: readonly InventoryNode[], world: number, workers: number | undefined): Refusal {
  const all = nodes.reduce((sum, node) => sum + room(node), 0);
  if (world > all) return { code: "devices-short", text: `${world} ranks need ${world} devices, there are ${all}` };
  if (workers !== undefined && workers > nodes.length) {
    return { code: "nodes-short", text: `${workers} nodes are wished for, there are ${nodes.length}` };
  }
  const over = workers === undefined ? "the nodes" : `${workers} nodes`;
  return { code: "ranks-uneven", text: `${world} ranks do not spread evenly over ${over}` };
}

export function isRefusal(answer: Placement | Refusal): answer is Refusal {
  return "code" in answer;
}

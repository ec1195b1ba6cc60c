// Hardware constants and the inventory they describe. Owns numbers and the `8xH200` notation; owns no discovery: whoever
// has a machine or a cluster in hand fills an Inventory.
//
// Sources: vendor data sheets (dense figures, no sparsity); GB are 10^9 bytes, which is slightly less than what a device
// reports, so that a plan never counts on bytes that are not there. CPU figures were measured on a 2-core Zen 5 machine.

export type Device = {
  product: string;
  memoryBytes: number;
  memoryBytesPerSecond: number;
  bf16FlopsPerSecond: number;
  fp8FlopsPerSecond: number;
  /** To a neighbour of the same node, one direction; PCIe where there is no better link. */
  linkBytesPerSecond: number;
  /** Share of the node's network of one device, one direction. */
  networkBytesPerSecond: number;
};

/**
 * A GPU node has its devices. A CPU node has no devices to count: any number of ranks share its memory, its bandwidth and
 * its cores.
 */
export type InventoryNode =
  | { kind: "gpu"; name: string; devices: readonly Device[]; linkDomain: string }
  | { kind: "cpu"; name: string; host: Device; cores: number };

export type Inventory = { nodes: readonly InventoryNode[] };

/** More ranks than this on one CPU node are refused: each costs a thread team and a link to every other. */
export const CPU_RANKS_MAX = 64;
/** Bound of the `--gpus` notation: larger groups are no single replica. */
export const DEVICES_MAX = 1024;
export const GPUS_PER_NODE = 8;

const GB = 1e9;
const TERA = 1e12;

type Row = [memoryGb: number, tbPerSecond: number, bf16: number, fp8: number, linkGb: number, networkGb: number];

const ROWS: Record<string, Row> = {
  "A100-80": [80, 2.04, 312, 312, 300, 25],
  L40S: [48, 0.864, 362, 733, 32, 12.5],
  H100: [80, 3.35, 989, 1979, 450, 50],
  H200: [141, 4.8, 989, 1979, 450, 50],
  H800: [80, 3.35, 989, 1979, 160, 50],
  B200: [180, 8.0, 2250, 4500, 900, 50],
  GB200: [186, 8.0, 2500, 5000, 900, 50],
  MI300X: [192, 5.3, 1307, 2615, 448, 50],
  cpu: [24, 0.083, 1.0, 1.0, 20, 1.25],
};

export const PRODUCTS: readonly string[] = Object.keys(ROWS);

/** Undefined for a product that is not in the table. Letter case does not matter. */
export function deviceOf(product: string): Device | undefined {
  const name = PRODUCTS.find((known) => known.toLowerCase() === product.toLowerCase());
  const row = name === undefined ? undefined : ROWS[name];
  if (name === undefined || row === undefined) return undefined;
  const [memoryGb, tbPerSecond, bf16, fp8, linkGb, networkGb] = row;
  return {
    product: name,
    memoryBytes: memoryGb * GB,
    memoryBytesPerSecond: tbPerSecond * TERA,
    bf16FlopsPerSecond: bf16 * TERA,
    fp8FlopsPerSecond: fp8 * TERA,
    linkBytesPerSecond: linkGb * GB,
    networkBytesPerSecond: networkGb * GB,
  };
}

/** `count` equal GPUs, `perNode` to a node; the last node may have fewer. */
export function gpuInventory(device: Device, count: number, perNode = GPUS_PER_NODE): Inventory {
  const nodes: InventoryNode[] = [];
  for (let first = 0; first < count; first += perNode) {
    const name = `node-${nodes.length}`;
    const devices = Array.from({ length: Math.min(perNode, count - first) }, () => device);
    nodes.push({ kind: "gpu", name, devices, linkDomain: name });
  }
  return { nodes };
}

/** What a real machine has, where it is known; the table's figures stand in for the rest. */
export type CpuMachine = {
  cores?: number;
  memoryBytes?: number;
  memoryBytesPerSecond?: number;
  flopsPerSecond?: number;
};

/** `count` CPU nodes. Nodes that share one machine (a local cluster) are given their share of its memory by the caller. */
export function cpuInventory(count: number, machine: CpuMachine = {}): Inventory {
  const base = deviceOf("cpu");
  if (base === undefined) throw new Error("hardware table has lost its cpu row");
  const flops = machine.flopsPerSecond ?? base.bf16FlopsPerSecond;
  const host: Device = {
    ...base,
    memoryBytes: machine.memoryBytes ?? base.memoryBytes,
    memoryBytesPerSecond: machine.memoryBytesPerSecond ?? base.memoryBytesPerSecond,
    bf16FlopsPerSecond: flops,
    fp8FlopsPerSecond: flops,
  };
  const nodes = Array.from(
    { length: count },
    (_, index): InventoryNode => ({ kind: "cpu", name: `node-${index}`, host, cores: machine.cores ?? 2 }),
  );
  return { nodes };
}

/** Reads `8xH200` or `4xcpu`; `nodes` spreads GPUs over that many nodes. A string says what is wrong. */
export function parseInventory(text: string, nodes?: number): Inventory | string {
  const match = /^(\d{1,5})x([A-Za-z0-9-]+)$/.exec(text.trim());
  const count = Number(match?.[1] ?? 0);
  if (match === null || count < 1) return `"${text}" is not COUNTxPRODUCT, such as 8xH200 or 4xcpu`;
  if (count > DEVICES_MAX) return `"${text}": at most ${DEVICES_MAX} devices`;
  const device = deviceOf(match[2] ?? "");
  if (device === undefined) return `"${match[2]}" is not a known product; known: ${PRODUCTS.join(", ")}`;
  if (device.product === "cpu") return cpuInventory(count);
  if (nodes !== undefined && count % nodes !== 0) return `${count} devices do not spread evenly over ${nodes} nodes`;
  return gpuInventory(device, count, nodes === undefined ? GPUS_PER_NODE : count / nodes);
}

/** How many devices (GPUs), or nodes where they are CPUs. */
export function deviceCount(inventory: Inventory): number {
  return inventory.nodes.reduce((sum, node) => sum + (node.kind === "gpu" ? node.devices.length : 1), 0);
}

/** `16xH200`, `4xcpu`; products joined by `+` where they differ. */
export function inventoryName(inventory: Inventory): string {
  const counts = new Map<string, number>();
  for (const node of inventory.nodes) {
    const devices = node.kind === "gpu" ? node.devices : [node.host];
    for (const device of devices) counts.set(device.product, (counts.get(device.product) ?? 0) + 1);
  }
  return [...counts].map(([product, count]) => `${count}x${product}`).join("+") || "nothing";
}

// The smallest change that turns a refusal into a plan. Owns which changes are tried and in which order of cost to the
// asker; whether a change helps is asked of the planner itself, so that no remedy is ever a guess (P3).
//
// Order: what costs nothing (another pin, fewer sequences' worth of KV), then a shorter context down to an eighth of what was
// wished, then more devices of the same product, then the context down to anything, at last other products.
import type { ModelSpec } from "../../proto/gen/muster/v1/plan.ts";
import { pinnedWorld } from "./cuts.ts";
import {
  CPU_RANKS_MAX,
  DEVICES_MAX,
  deviceCount,
  deviceOf,
  GPUS_PER_NODE,
  gpuInventory,
  type Inventory,
  PRODUCTS,
} from "./hardware.ts";
import { inventoryKind, type Wishes } from "./wishes.ts";

type Change = { inventory: Inventory; wishes: Wishes };

export type Remedy = Change & {
  kind: "ranks" | "pins" | "context" | "kv-bytes" | "devices" | "product";
  /** For a person: "ranks 3 fits". */
  text: string;
};

export type Question = Change & { spec: ModelSpec };

type Helps = (change: Change) => boolean;

/** A context below this share of the wish is no answer to it while there are others. */
const CONTEXT_SHARE_MIN = 8;

export function findRemedy(question: Question, helps: Helps): Remedy | undefined {
  return (
    sane(question, helps) ??
    otherRanks(question, helps) ??
    fewerPins(question, helps) ??
    moreKv(question, helps) ??
    shorterContext(question, helps, CONTEXT_SHARE_MIN) ??
    moreDevices(question, helps) ??
    shorterContext(question, helps, Number.MAX_SAFE_INTEGER) ??
    otherProduct(question, helps)
  );
}

/** Wishes beyond every limit, brought back to it. */
function sane({ spec, inventory, wishes }: Question, helps: Helps): Remedy | undefined {
  if (wishes.contextTokens !== undefined && wishes.contextTokens > spec.contextTokens) {
    const change = { inventory, wishes: { ...wishes, contextTokens: spec.contextTokens } };
    if (helps(change)) return { ...change, kind: "context", text: `context ${tokensText(spec.contextTokens)} fits` };
  }
  return undefined;
}

/** The nearest number of ranks; the larger of two that are as near. Experts stay as they were pinned where that works. */
function otherRanks({ inventory, wishes }: Question, helps: Helps): Remedy | undefined {
  const world = pinnedWorld(wishes.pins);
  if (world === undefined || !Number.isSafeInteger(world) || world < 1) return undefined;
  const most = inventoryKind(inventory) === "gpu" ? deviceCount(inventory) : CPU_RANKS_MAX;
  for (let step = 1; step < Math.max(most, world); step++) {
    for (const ranks of [world + step, world - step]) {
      if (ranks < 1 || ranks > most) continue;
      const { workers, ep } = wishes.pins;
      const pins = { ranks, workers: workers === world ? ranks : workers };
      const loose: Wishes["pins"][] = workers === undefined ? [pins] : [pins, { ranks }];
      for (const kept of ep === undefined || ranks % ep !== 0 ? loose : [{ ...pins, ep }, ...loose]) {
        const change = { inventory, wishes: { ...wishes, pins: kept } };
        if (helps(change)) return { ...change, kind: "ranks", text: `ranks ${ranks} fits` };
      }
    }
  }
  return undefined;
}

/** Fewer pins: experts free, then nodes free, then all free. */
function fewerPins({ inventory, wishes }: Question, helps: Helps): Remedy | undefined {
  const { pins } = wishes;
  const tries: [pins: Wishes["pins"], text: string][] = [
    [{ ...pins, ep: undefined, etp: undefined }, "it fits without pinning ep and etp"],
    [{ ...pins, workers: undefined }, "it fits without pinning the nodes"],
    [{}, "it fits without pins"],
  ];
  for (const [kept, text] of tries) {
    const change = { inventory, wishes: { ...wishes, pins: kept } };
    if (isSmaller(kept, pins) && helps(change)) return { ...change, kind: "pins", text };
  }
  return undefined;
}

const pinCount = (pins: Wishes["pins"]): number => Object.values(pins).filter((pin) => pin !== undefined).length;
const isSmaller = (kept: Wishes["pins"], pins: Wishes["pins"]): boolean => pinCount(kept) < pinCount(pins);

/** KV bytes that were pinned too low or too high. */
function moreKv({ inventory, wishes }: Question, helps: Helps): Remedy | undefined {
  if (wishes.kvBytes === undefined) return undefined;
  const change = { inventory, wishes: { ...wishes, kvBytes: undefined } };
  return helps(change) ? { ...change, kind: "kv-bytes", text: "it fits without pinning the KV bytes" } : undefined;
}

/** The longest context that fits, in whole KV blocks, down to wished / share. */
function shorterContext({ spec, inventory, wishes }: Question, helps: Helps, share: number): Remedy | undefined {
  const wished = wishes.contextTokens;
  const block = wishes.kvBlockTokens;
  if (wished === undefined || wished > spec.contextTokens) return undefined;
  const withContext = (contextTokens: number): Change => ({ inventory, wishes: { ...wishes, contextTokens } });
  let fits = Math.max(1, Math.ceil(wished / share / block));
  if (fits * block >= wished || !helps(withContext(fits * block))) return undefined;
  let over = Math.ceil(wished / block);
  while (over - fits > 1) {
    const middle = Math.floor((fits + over) / 2);
    if (helps(withContext(middle * block))) fits = middle;
    else over = middle;
  }
  const change = withContext(rounded(fits * block, block));
  return { ...change, kind: "context", text: `context ${tokensText(change.wishes.contextTokens ?? 0)} fits` };
}

/** Down to whole thousands of 1,024 where there are some: nobody asks for 16,368 tokens. */
function rounded(tokens: number, block: number): number {
  const step = tokens >= 4096 ? 1024 : block;
  return Math.floor(tokens / step) * step;
}

/** The fewest devices of the same product that fit: within the node first, then whole nodes. */
function moreDevices({ inventory, wishes }: Question, helps: Helps): Remedy | undefined {
  const [node] = inventory.nodes;
  const device = node?.kind === "gpu" ? node.devices[0] : undefined;
  if (node?.kind !== "gpu" || device === undefined) return undefined;
  const have = deviceCount(inventory);
  const perNode = Math.max(node.devices.length, GPUS_PER_NODE);
  for (let count = have + 1; count <= Math.min(DEVICES_MAX, have * 16 + 64); count++) {
    if (count > perNode && count % perNode !== 0) continue;
    const more = gpuInventory(device, count, perNode);
    const open = { ...wishes.pins, ranks: undefined, tp: undefined, workers: undefined };
    // Fewer ranks than devices were refused before: only all of them are new.
    if (!helps({ inventory: more, wishes: { ...wishes, pins: { ...open, ranks: count } } })) continue;
    return {
      inventory: more,
      wishes: { ...wishes, pins: open },
      kind: "devices",
      text: `${count}x${device.product} fit`,
    };
  }
  return undefined;
}

/** As many devices of the smallest other product that fits. */
function otherProduct({ inventory, wishes }: Question, helps: Helps): Remedy | undefined {
  if (inventoryKind(inventory) !== "gpu") return undefined;
  const products = PRODUCTS.map(deviceOf).filter((device) => device !== undefined && device.product !== "cpu");
  for (const device of products
    .filter((known) => known !== undefined)
    .sort((one, other) => one.memoryBytes - other.memoryBytes)) {
    const count = deviceCount(inventory);
    const change = { inventory: gpuInventory(device, count), wishes };
    if (helps(change)) return { ...change, kind: "product", text: `${count}x${device.product} fit` };
  }
  return undefined;
}

/** 16384 -> "16k", 1000 -> "1000". */
export function tokensText(tokens: number): string {
  return tokens >= 1024 && tokens % 1024 === 0 ? `${tokens / 1024}k` : `${tokens}`;
}

// What the cluster has for planning: Nodes, Pods and ResourceSlices as one inventory, made anew when somebody asks after a
// change, at most once a second. Owns which inventory answers which wish; what counts as a GPU is inventory.ts.
import type { Notice } from "../api/model-deployment.ts";
import type { Inventory } from "../plan/hardware.ts";
import type { Grounds } from "../reconcile/deployment/planning.ts";
import type { Question } from "../reconcile/deployment/wish.ts";
import { type ClusterInventory, type GpuNode, inventoryOf, plannable, productOf } from "./inventory.ts";
import { nodeFacts } from "./node-facts.ts";
import type { Store } from "./store.ts";

type ViewStores = { nodes: Store; pods: Store; slices?: Store };

/** Ranks that groups of the asker hold on a node: free for a better plan of theirs. */
export type Held = ReadonlyMap<string, number>;

/** A hundred thousand pods are read in some 20 ms: once a second, not at every change of one. */
const STALE_MS = 1_000;
/** Wishes name a handful of products. */
const PRODUCTS_MAX = 32;

export class ClusterView {
  readonly #stores: ViewStores;
  readonly #nowMs: () => number;
  /** By the product that nodes without labels are taken for. */
  readonly #known = new Map<string, { inventory: ClusterInventory; madeMs: number; isStale: boolean }>();

  constructor(stores: ViewStores, nowMs: () => number) {
    this.#stores = stores;
    this.#nowMs = nowMs;
    const forget = () => {
      for (const known of this.#known.values()) known.isStale = true;
    };
    for (const store of [stores.nodes, stores.pods, stores.slices]) store?.subscribe(forget);
  }

  /** Before all lists are whole nothing is known: absence says nothing. */
  get isSynced(): boolean {
    const { nodes, pods, slices } = this.#stores;
    return nodes.isSynced && pods.isSynced && (slices?.isSynced ?? true);
  }

  async synced(signal: AbortSignal): Promise<void> {
    const { nodes, pods, slices } = this.#stores;
    await Promise.all([nodes.synced(signal), pods.synced(signal), slices?.synced(signal)]);
  }

  /** Told after each change of what it is made from. Answers how to stop. */
  subscribe(listener: () => void): () => void {
    const { nodes, pods, slices } = this.#stores;
    const stops = [nodes, pods, slices].flatMap((store) => store?.subscribe(listener) ?? []);
    return () => {
      for (const stop of stops) stop();
    };
  }

  /** Told the name of each node that begins or ceases to be left. Answers how to stop. */
  subscribeLeaving(listener: (node: string) => void): () => void {
    const known = new Set<string>();
    const { nodes } = this.#stores;
    return nodes.subscribe(({ kind, object }) => {
      const { name } = object.metadata;
      const isLeaving = kind !== "deleted" && nodeFacts(object).leaving !== undefined;
      if (known.has(name) === isLeaving) return;
      if (isLeaving) known.add(name);
      else known.delete(name);
      listener(name);
    });
  }

  /** Of these nodes those that are to be left, with why. */
  leavingOf(names: Iterable<string>): Map<string, string> {
    const leaving = new Map<string, string>();
    for (const name of new Set(names)) {
      const node = this.#stores.nodes.get(name);
      const why = node === undefined ? undefined : nodeFacts(node).leaving;
      if (why !== undefined) leaving.set(name, why);
    }
    return leaving;
  }

  /** Undefined before `isSynced`. */
  groundsFor({ nodes: wish }: Question, held: Held = new Map()): Grounds | undefined {
    if (!this.isSynced) return undefined;
    const seen = this.#inventory(wish.product);
    const view = { ...seen, nodes: within(wish.within, seen.nodes) };
    const mine = { ...view, nodes: view.nodes.map((node) => given(node, held.get(node.name) ?? 0)) };
    return { free: plannable(mine, wish, "free"), all: plannable(view, wish, "all") };
  }

  freeFor(question: Question): Inventory | undefined {
    return this.groundsFor(question)?.free;
  }

  /** What a person can tell us that the cluster does not. */
  needsOf({ nodes: wish }: Question): Notice[] {
    if (!this.isSynced) return [];
    return this.#inventory(wish.product).needs.map(({ text }) => ({
      field: "spec.gpu",
      kind: "Needed",
      message: text,
    }));
  }

  #inventory(product: string | undefined): ClusterInventory {
    const known = this.#known.get(product ?? "");
    const nowMs = this.#nowMs();
    if (known !== undefined && (!known.isStale || nowMs - known.madeMs < STALE_MS)) return known.inventory;
    const { nodes, pods, slices } = this.#stores;
    const objects = { nodes: [...nodes.all()], pods: [...pods.all()], slices: [...(slices?.all() ?? [])] };
    const made = inventoryOf(objects, product === undefined ? undefined : (productOf(product) ?? product));
    if (this.#known.size >= PRODUCTS_MAX) this.#known.clear();
    this.#known.set(product ?? "", { inventory: made, madeMs: nowMs, isStale: false });
    return made;
  }
}

function given(node: GpuNode, held: number): GpuNode {
  return held === 0 ? node : { ...node, free: Math.min(node.allocatable, node.free + held) };
}

/** Of zones or NVLink domains the one with the most free GPUs, then the most of all: a replica has its place in one. */
function within(wish: Question["nodes"]["within"], nodes: readonly GpuNode[]): readonly GpuNode[] {
  if (wish === "any") return nodes;
  const parts = new Map<string, GpuNode[]>();
  for (const node of nodes) {
    const name = wish === "zone" ? (node.zone ?? "") : node.domain;
    parts.set(name, [...(parts.get(name) ?? []), node]);
  }
  const sum = (part: readonly GpuNode[], field: "free" | "allocatable") =>
    part.reduce((all, node) => all + node[field], 0);
  const [best = []] = [...parts.values()].toSorted(
    (one, other) => sum(other, "free") - sum(one, "free") || sum(other, "allocatable") - sum(one, "allocatable"),
  );
  return best;
}

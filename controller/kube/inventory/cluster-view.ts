// What the cluster has for planning: Nodes, Pods and ResourceSlices as one inventory. Owns which inventory answers which wish;
// what counts as a GPU is inventory.ts, keeping it up to date live-inventory.ts.
import type { Notice } from "../../api/model-deployment.ts";
import type { Inventory } from "../../plan/hardware.ts";
import type { Grounds } from "../../reconcile/deployment/planning.ts";
import type { Question } from "../../reconcile/deployment/wish.ts";
import { type GpuNode, plannable, productOf } from "./inventory.ts";
import { type InventoryStores, LiveInventory } from "./live-inventory.ts";
import { nodeFacts } from "./node-facts.ts";

/** Ranks that groups of the asker hold on a node: free for a better plan of theirs. */
export type Held = ReadonlyMap<string, number>;

export class ClusterView {
  readonly #stores: InventoryStores;
  readonly #live: LiveInventory;

  constructor(stores: InventoryStores) {
    this.#stores = stores;
    this.#live = new LiveInventory(stores);
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
    return this.#live.subscribe(listener);
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
  groundsFor(question: Question, held: Held = new Map()): Grounds | undefined {
    if (!this.isSynced) return undefined;
    const of = (count: "free" | "all") => this.#plannable(question, count, held);
    // Read when the question is asked: most turns of an owner ask nothing.
    return {
      get free() {
        return of("free");
      },
      get all() {
        return of("all");
      },
    };
  }

  /** Undefined before `isSynced`. */
  freeFor(question: Question): Inventory | undefined {
    return this.isSynced ? this.#plannable(question, "free", new Map()) : undefined;
  }

  #plannable({ nodes: wish }: Question, count: "free" | "all", held: Held): Inventory {
    const product = productFor(wish.product);
    if (wish.within === "any" && held.size === 0) return this.#live.plannable(wish, count, product);
    const seen = this.#live.of(product);
    const nodes = within(wish.within, seen.nodes);
    const mine = count === "all" ? nodes : nodes.map((node) => given(node, held.get(node.name) ?? 0));
    return plannable({ ...seen, nodes: mine }, wish, count);
  }

  /** What a person can tell us that the cluster does not. */
  needsOf({ nodes: wish }: Question): Notice[] {
    if (!this.isSynced) return [];
    return this.#live.of(productFor(wish.product)).needs.map(({ text }) => ({
      field: "spec.gpu",
      kind: "Needed",
      message: text,
    }));
  }
}

function productFor(wished: string | undefined): string | undefined {
  return wished === undefined ? undefined : (productOf(wished) ?? wished);
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

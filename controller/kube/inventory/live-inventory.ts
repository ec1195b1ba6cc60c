// The cluster's GPUs, kept up to date from changes: a pod or node that changes costs its own reading, not that of 100,000
// others. Owns what is held where and which nodes have changed; what a node counts as is inventory.ts, and the answer is what
// `inventoryOf` would say of the same objects.
import { isDeepStrictEqual } from "node:util";
import type { Inventory, InventoryNode } from "../../plan/hardware.ts";
import { type KubeObject, keyOf } from "../api/client.ts";
import type { Delta, Store } from "../watch/store.ts";
import {
  type ClusterInventory,
  findingOf,
  type GpuNode,
  heldBy,
  inventoryFrom,
  type NodeFinding,
  plannableNode,
  type Selection,
  slicedNode,
} from "./inventory.ts";
import { nodeFacts } from "./node-facts.ts";

export type InventoryStores = {
  nodes: Store;
  /** Of the whole cluster: others' pods hold GPUs too. */
  pods: Store;
  /** Undefined where the server has no ResourceSlices. */
  slices?: Store | undefined;
};

/** Wishes name a handful of products, and of selections. */
const PRODUCTS_MAX = 32;
const SELECTIONS_MAX = 64;

type Plannable = { from: ClusterInventory; judged: WeakMap<GpuNode, InventoryNode | "none">; answer: Inventory };

type View = {
  /** By name of the node, in that order (V3) where `isSorted`. */
  findings: Map<string, NodeFinding>;
  isSorted: boolean;
  /** Names of nodes that have changed since they were judged. */
  stale: Set<string>;
  inventory: ClusterInventory | undefined;
};

export class LiveInventory {
  readonly #stores: InventoryStores;
  /** By pod: what it holds. Pods without GPUs are not in it. */
  readonly #charges = new Map<string, { node: string; gpus: number }>();
  /** By node. */
  readonly #held = new Map<string, number>();
  /** By ResourceSlice: the node whose GPUs it offers; and how many offer those of a node. */
  readonly #slices = new Map<string, string>();
  readonly #sliced = new Map<string, number>();
  /** By the product that nodes without labels are taken for. */
  readonly #views = new Map<string, View>();
  /** By selection. */
  readonly #plannable = new Map<string, Plannable>();
  readonly #listeners = new Set<(node: string) => void>();

  constructor(stores: InventoryStores) {
    this.#stores = stores;
    const { nodes, pods, slices } = stores;
    for (const pod of pods.all()) this.#onPod(pod, true);
    for (const slice of slices?.all() ?? []) this.#onSlice(slice, true);
    pods.subscribe(({ kind, object }) => this.#onPod(object, kind !== "deleted"));
    slices?.subscribe(({ kind, object }) => this.#onSlice(object, kind !== "deleted"));
    nodes.subscribe((delta) => this.#onNode(delta));
  }

  /** Told the name of each node that may count as something else now. Answers how to stop. */
  subscribe(listener: (node: string) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** `product`: what nodes without labels are taken for. The same object as long as nothing has changed. */
  of(product?: string): ClusterInventory {
    const view = this.#views.get(product ?? "") ?? this.#newView(product);
    for (const name of view.stale) this.#judge(view, name, product);
    view.stale.clear();
    if (!view.isSorted) view.findings = new Map([...view.findings].sort(([one], [other]) => (one < other ? -1 : 1)));
    view.isSorted = true;
    view.inventory ??= inventoryFrom(view.findings.values());
    return view.inventory;
  }

  /** Where product and memory are taken from labels alone. */
  nodeOf(name: string): GpuNode | undefined {
    const view = this.#views.get("") ?? this.#newView(undefined);
    if (view.stale.delete(name)) this.#judge(view, name, undefined);
    const finding = view.findings.get(name);
    return finding !== undefined && "node" in finding ? finding.node : undefined;
  }

  /** As `plannable` of inventory.ts, of all nodes; nodes are judged once for each selection that is asked for often. */
  plannable(selection: Selection, count: "free" | "all", product?: string): Inventory {
    const inventory = this.of(product);
    const key = JSON.stringify([count, product, selection]);
    const known = this.#plannable.get(key);
    if (known?.from === inventory) return known.answer;
    const judged = known?.judged ?? new WeakMap<GpuNode, InventoryNode | "none">();
    const nodes = inventory.nodes.flatMap((node) => {
      const found = judged.get(node) ?? plannableNode(node, selection, count) ?? "none";
      judged.set(node, found);
      return found === "none" ? [] : found;
    });
    if (known === undefined && this.#plannable.size >= SELECTIONS_MAX) this.#plannable.clear();
    this.#plannable.set(key, { from: inventory, judged, answer: { nodes } });
    return { nodes };
  }

  #newView(product: string | undefined): View {
    if (this.#views.size >= PRODUCTS_MAX) this.#views.clear();
    const names = [...this.#stores.nodes.all()].map(({ metadata }) => metadata.name);
    const view: View = { findings: new Map(), isSorted: false, stale: new Set(names), inventory: undefined };
    this.#views.set(product ?? "", view);
    return view;
  }

  /** What is as it was stays the same object. */
  #judge(view: View, name: string, product: string | undefined): void {
    const node = this.#stores.nodes.get(name);
    const use = { held: this.#held.get(name) ?? 0, isSliced: (this.#sliced.get(name) ?? 0) > 0, product };
    const finding = node === undefined ? undefined : findingOf(nodeFacts(node), use);
    if (isDeepStrictEqual(view.findings.get(name), finding)) return;
    view.inventory = undefined;
    if (!view.findings.has(name)) view.isSorted = false;
    if (finding === undefined) view.findings.delete(name);
    else view.findings.set(name, finding);
  }

  #onPod(pod: KubeObject, isThere: boolean): void {
    const key = keyOf(pod);
    const before = this.#charges.get(key);
    const now = isThere ? heldBy(pod) : undefined;
    if (before?.node === now?.node && before?.gpus === now?.gpus) return;
    if (before !== undefined) this.#charge(before.node, -before.gpus);
    if (now !== undefined) this.#charge(now.node, now.gpus);
    if (now === undefined) this.#charges.delete(key);
    else this.#charges.set(key, now);
    for (const node of new Set([before?.node, now?.node])) if (node !== undefined) this.#tell(node);
  }

  #charge(node: string, gpus: number): void {
    const held = (this.#held.get(node) ?? 0) + gpus;
    if (held === 0) this.#held.delete(node);
    else this.#held.set(node, held);
  }

  #onSlice(slice: KubeObject, isThere: boolean): void {
    const key = keyOf(slice);
    const before = this.#slices.get(key);
    const now = isThere ? slicedNode(slice) : undefined;
    if (before === now) return;
    if (before !== undefined) this.#sliced.set(before, (this.#sliced.get(before) ?? 0) - 1);
    if (now !== undefined) this.#sliced.set(now, (this.#sliced.get(now) ?? 0) + 1);
    if (now === undefined) this.#slices.delete(key);
    else this.#slices.set(key, now);
    for (const node of [before, now]) if (node !== undefined) this.#tell(node);
  }

  /** A node reports every few seconds and says mostly what it has said. */
  #onNode(delta: Delta): void {
    if (delta.kind === "updated" && isDeepStrictEqual(nodeFacts(delta.before), nodeFacts(delta.object))) return;
    this.#tell(delta.object.metadata.name);
  }

  #tell(node: string): void {
    for (const { stale } of this.#views.values()) stale.add(node);
    for (const listener of this.#listeners) listener(node);
  }
}

// The nodes that an incarnation is on: whether they report, and whether that has changed since one last looked. Owns what was
// seen last; nodes say something every few seconds that changes nothing.

import type { WorkerSeen } from "../../reconcile/cluster.ts";
import type { KubeObject } from "../api/client.ts";
import type { Place } from "../gangs/gang.ts";
import type { OwnPod } from "../groups/pod-starter.ts";
import type { Store } from "../watch/store.ts";
import { nodeFacts } from "./node-facts.ts";
import { podFacts } from "./pod-facts.ts";

export class NodeWatch {
  readonly #nodes: Store;
  readonly #lost = new Map<string, string | undefined>();

  constructor(nodes: Store) {
    this.#nodes = nodes;
  }

  look(own: readonly OwnPod[]): void {
    this.#lost.clear();
    for (const { pod } of own) {
      if (pod.node === "") continue;
      const node = this.#nodes.get(pod.node);
      this.#lost.set(pod.node, node === undefined ? "it has gone" : nodeFacts(node).notReady);
    }
  }

  /** Why the pod's node does not report; undefined where it does, or is not one of those looked at. */
  lostOf(pod: KubeObject): string | undefined {
    return this.#lost.get(podFacts(pod).node);
  }

  get isAnyLost(): boolean {
    return [...this.#lost.values()].some((why) => why !== undefined);
  }

  /** A node as it is now: whether it has begun or ceased to report. */
  hasTurned(node: KubeObject): boolean {
    const { name } = node.metadata;
    return this.#lost.has(name) && (this.#lost.get(name) === undefined) !== (nodeFacts(node).notReady === undefined);
  }
}

/** Nodes on which the incarnation has ended first: the others' workers end with it. */
export function blamedOf(place: Place | undefined, workers: readonly WorkerSeen[]): readonly string[] {
  if (place?.kind === "released") return place.blamed;
  return workers.flatMap(({ state, node }) => (state.kind === "exited" && node !== undefined ? [node] : []));
}

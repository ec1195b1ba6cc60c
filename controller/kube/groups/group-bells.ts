// Who is to look again after which change: an object rings the group that it belongs to and no other, because there are
// thousands of groups and each has objects of its own.
import type { KubeObject } from "../api/client.ts";
import { keyOf } from "../api/client.ts";
import type { GangStores } from "../gangs/gang.ts";
import { nodeFacts } from "../inventory/node-facts.ts";
import type { Delta } from "../watch/store.ts";
import type { BesideStores } from "./group-beside.ts";

export type Bell = {
  ring: () => void;
  /** The node has begun or ceased to report, has come or has gone. */
  onNode: (node: KubeObject) => void;
};

export class GroupBells {
  /** By `namespace/name`: the next of a name may be there before the one before has ended. */
  readonly #bells = new Map<string, Set<Bell>>();

  constructor({ groups, pods, nodes, services, budgets, podGroups }: GangStores & BesideStores) {
    groups.subscribe(({ object }) => this.#ring(keyOf(object)));
    nodes.subscribe((delta) => this.#onNode(delta));
    for (const store of [pods, services, budgets, podGroups])
      store?.subscribe(({ object }) => this.#ringOwners(object));
  }

  /** Answers how to stop. */
  on(group: string, bell: Bell): () => void {
    const bells = this.#bells.get(group) ?? new Set();
    this.#bells.set(group, bells.add(bell));
    return () => {
      if (bells.delete(bell) && bells.size === 0) this.#bells.delete(group);
    };
  }

  #ring(group: string): void {
    for (const { ring } of this.#bells.get(group) ?? []) ring();
  }

  #ringOwners({ metadata }: KubeObject): void {
    for (const { kind, name } of metadata.ownerReferences ?? [])
      if (kind === "ReplicaGroup") this.#ring(`${metadata.namespace}/${name}`);
  }

  #onNode(delta: Delta): void {
    const isReporting = (node: KubeObject) => nodeFacts(node).notReady === undefined;
    if (delta.kind === "updated" && isReporting(delta.before) === isReporting(delta.object)) return;
    for (const bells of this.#bells.values()) for (const { onNode } of bells) onNode(delta.object);
  }
}

// Follows a bed's objects by watch and shows every event to the invariants. Owns its watches; the rules are invariants.ts'.
//
//   W1  what a new list lacks of what was there counts as deleted; a watch that breaks begins anew with a list.
import { type KubeObject, keyOf, type Resource } from "../../../controller/kube/api/client.ts";
import * as kinds from "../../../controller/kube/api/resources.ts";
import { objectOf, pathOf } from "../../../controller/kube/api/wire.ts";
import { until } from "../../until.ts";
import type { Thing } from "../controlplane/raw-api.ts";
import type { Bed } from "./bed.ts";
import { type Bounds, Invariants, WATCHED, type Watched } from "./invariants.ts";
import { pause } from "./probe.ts";

const RETRY_MS = 200;
const LOOK_MS = 1_000;
const NAMESPACE = "default";
const RESOURCES: Readonly<Record<Watched, Resource>> = {
  nodes: kinds.nodes,
  shardplans: kinds.shardPlans,
  replicagroups: kinds.replicaGroups,
  modeldeployments: kinds.modelDeployments,
  pods: kinds.pods,
  leases: kinds.leases,
};

export class Witness {
  readonly invariants: Invariants;
  /** Events seen, by kind. */
  readonly events = new Map<Watched, number>();
  readonly #bed: Bed;
  readonly #stop = new AbortController();
  readonly #done: Promise<unknown>;

  private constructor(bed: Bed, bounds: Bounds) {
    this.#bed = bed;
    this.invariants = new Invariants(bounds);
    this.#done = Promise.all([...WATCHED.map((kind) => this.#follow(kind)), this.#look()]);
  }

  /** Resolves when every kind has been listed. */
  static async begin(bed: Bed, bounds: Bounds): Promise<Witness> {
    const witness = new Witness(bed, bounds);
    await until(() => WATCHED.every((kind) => witness.events.has(kind)), "the witness has listed every kind");
    return witness;
  }

  async stop(): Promise<void> {
    this.#stop.abort();
    await this.#done;
  }

  async #follow(kind: Watched): Promise<void> {
    const { signal } = this.#stop;
    const resource = RESOURCES[kind];
    const there = new Map<string, KubeObject>();
    const see = (type: "ADDED" | "MODIFIED" | "DELETED", object: KubeObject) => {
      if (type === "DELETED") there.delete(keyOf(object));
      else there.set(keyOf(object), object);
      this.events.set(kind, (this.events.get(kind) ?? 0) + 1);
      const seen = { kind, type, object, atMs: Date.now() };
      try {
        this.invariants.see(seen);
      } catch (error) {
        this.invariants.broken.push(`${type} ${kind} ${keyOf(object)}: ${error}`); // an object that nobody can read
      }
    };
    const hear = {
      whole: (items: Thing[]) => {
        this.events.set(kind, this.events.get(kind) ?? 0);
        const listed = new Map(items.map((item) => objectOf(item, resource)).map((item) => [keyOf(item), item]));
        for (const [key, gone] of there) if (listed.get(key)?.metadata.uid !== gone.metadata.uid) see("DELETED", gone);
        for (const [key, object] of listed) see(there.has(key) ? "MODIFIED" : "ADDED", object);
      },
      changed: (type: string, item: Thing) => {
        if (type === "ADDED" || type === "MODIFIED" || type === "DELETED") see(type, objectOf(item, resource));
      },
    };
    const path = pathOf(resource, NAMESPACE);
    while (!signal.aborted) {
      await this.#bed.plane.api.follow(path, hear, signal).catch(() => undefined); // away or stale: list again
      this.invariants.pardon(Date.now());
      await pause(RETRY_MS, signal);
    }
  }

  async #look(): Promise<void> {
    const { signal } = this.#stop;
    while (!signal.aborted) {
      await pause(LOOK_MS, signal);
      this.invariants.look(Date.now());
    }
  }
}

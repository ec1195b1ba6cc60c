// Tells gateways what a cluster serves: whole states from reflectors over ModelDeployments, ShardPlans and ReplicaGroups. Owns
// when a state is told; what is in it is served-entries.ts. Writes nothing.
//
//   M1  nothing is told before all three kinds have been whole once: absence would look like the end of a model.
//   M2  an API server that is away changes nothing that was told; when it is back, what has changed is.
//   M3  changes that come together are told together: a state for each would cost as much as there are replicas, each time.
import type { WatchEvent } from "../../../proto/gen/muster/v1/control.ts";
import type { KubeApi, Resource } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { modelDeployments, replicaGroups, shardPlans } from "../api/resources.ts";
import { Reflector } from "../watch/reflector.ts";
import { Store } from "../watch/store.ts";
import { type ServedStores, servedModelsOf } from "./served-entries.ts";

export type ServedModelsOptions = {
  api: KubeApi;
  clock: Clock;
  /** In [0, 1). */
  random: () => number;
  /** Of this namespace alone; undefined: of all. */
  namespace?: string;
};

/** A death is told this much later at most; routes around it are found without it. */
const TOGETHER_MS = 20;

export class ServedModels {
  readonly source: string;
  readonly #options: ServedModelsOptions;
  readonly #stores: ServedStores = { deployments: new Store(), plans: new Store(), groups: new Store() };
  readonly #reflectors: readonly Reflector[];
  #version = 0n;

  constructor(options: ServedModelsOptions) {
    this.#options = options;
    const { namespace } = options;
    this.source = `the Kubernetes API (${namespace === undefined ? "all namespaces" : `namespace ${namespace}`})`;
    const { deployments, plans, groups } = this.#stores;
    this.#reflectors = [
      this.#reflector(modelDeployments, deployments),
      this.#reflector(shardPlans, plans),
      this.#reflector(replicaGroups, groups),
    ];
  }

  /** Why the state told last may be old; undefined while it is not. */
  get trouble(): string | undefined {
    return this.#reflectors.find(({ trouble }) => trouble !== undefined)?.trouble?.message;
  }

  /** Resolves when aborted; rejects where a part breaks. */
  async run(tell: (event: WatchEvent) => void, signal: AbortSignal): Promise<void> {
    const ended = new AbortController();
    const both = AbortSignal.any([signal, ended.signal]);
    const parts = [...this.#reflectors.map((reflector) => reflector.run(both)), this.#tellAll(tell, both)];
    try {
      await Promise.all(parts);
    } finally {
      ended.abort();
      await Promise.allSettled(parts);
    }
  }

  async #tellAll(tell: (event: WatchEvent) => void, signal: AbortSignal): Promise<void> {
    const { clock } = this.#options;
    const stores = Object.values(this.#stores);
    let changed = Promise.withResolvers<void>();
    const stops = stores.map((store) => store.subscribe(() => changed.resolve()));
    const onAbort = () => changed.resolve();
    signal.addEventListener("abort", onAbort, { once: true });
    try {
      const synced = stores.map((store) => store.synced(signal));
      if (!(await Promise.allSettled(synced)).every(({ status }) => status === "fulfilled")) return;
      while (!signal.aborted) {
        changed = Promise.withResolvers<void>();
        this.#version += 1n;
        tell({ version: this.#version, models: servedModelsOf(this.#stores), drafts: [] });
        await changed.promise;
        await clock.sleep(signal, clock.nowMs() + TOGETHER_MS);
      }
    } finally {
      signal.removeEventListener("abort", onAbort);
      for (const stop of stops) stop();
    }
  }

  #reflector(resource: Resource, store: Store): Reflector {
    const { api, clock, random, namespace } = this.#options;
    return new Reflector({ api, clock, random, resource, store, ...(namespace === undefined ? {} : { namespace }) });
  }
}

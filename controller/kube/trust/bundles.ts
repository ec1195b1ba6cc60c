// The bundle of authorities as ConfigMap `muster-ca` in every namespace that has owners of workers, and in the release's own:
// pods mount it beside their token. Owns those ConfigMaps.
//
//   B1  where there is an owner or a group there is a bundle; what somebody changes in it or deletes comes back. It is looked at
//       one by one: a watch of all would need the right to read the ConfigMaps of namespaces without models.
//   B2  one namespace that refuses (it is being deleted, a quota) holds up no other.
//
// It stays where the last owner has gone: pods may end there still, and it says nothing that is secret.
import { applyOwned } from "../api/apply.ts";
import { type KubeApi, KubeError, type KubeObject } from "../api/client.ts";
import { textsOf } from "../api/fields.ts";
import { configMaps } from "../api/resources.ts";
import type { Stores } from "../run-controller.ts";

export const BUNDLE = "muster-ca";
export const BUNDLE_KEY = "ca.crt";
const OURS = { "app.kubernetes.io/name": "muster", "app.kubernetes.io/managed-by": "muster" };
/** More namespaces with models than one installation is meant for; what is beyond has no bundle and is said. */
export const NAMESPACES_MAX = 2_000;

export type Shortfall = { namespace: string; detail: string };

/** Namespaces that need one; `release` is always the first. */
export function namespacesOf(
  stores: Pick<Stores, "deployments" | "pools" | "groups">,
  release: string,
): ReadonlySet<string> {
  const all = new Set([release]);
  for (const store of [stores.deployments, stores.pools, stores.groups]) {
    for (const { metadata } of store.all()) if (metadata.namespace !== undefined) all.add(metadata.namespace);
  }
  return all;
}

/** One pass over the namespaces. Answers what could not be done. */
export async function keepBundles(
  api: KubeApi,
  bundle: string,
  namespaces: ReadonlySet<string>,
  signal: AbortSignal,
): Promise<Shortfall[]> {
  const shortfalls: Shortfall[] = [];
  for (const [index, namespace] of [...namespaces].entries()) {
    if (signal.aborted) break;
    if (index >= NAMESPACES_MAX) {
      shortfalls.push({ namespace, detail: `more than ${NAMESPACES_MAX} namespaces have models` });
      continue;
    }
    try {
      await keepBundle(api, bundle, namespace, signal);
    } catch (error) {
      if (signal.aborted) break;
      if (!(error instanceof KubeError)) throw error;
      shortfalls.push({ namespace, detail: error.message });
    }
  }
  return shortfalls;
}

export async function keepBundle(api: KubeApi, bundle: string, namespace: string, signal: AbortSignal): Promise<void> {
  const found = await api.get(configMaps, BUNDLE, namespace, signal);
  if (found !== undefined && textsOf(found.data)[BUNDLE_KEY] === bundle) return;
  await applyOwned(api, configMaps, bundleIn(namespace, bundle), { signal });
}

function bundleIn(namespace: string, bundle: string): KubeObject {
  return {
    apiVersion: "v1",
    kind: "ConfigMap",
    metadata: { name: BUNDLE, namespace, labels: OURS },
    data: { [BUNDLE_KEY]: bundle },
  };
}

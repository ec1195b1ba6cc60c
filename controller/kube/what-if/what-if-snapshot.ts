// Reads once what the controller keeps by watching: every object that its decisions are made from, cluster-wide. Reads only.
import { isGone, isNotFound, type KubeApi, KubeError, type KubeObject, type Resource } from "../api/client.ts";
import * as kinds from "../api/resources.ts";
import { KINDS, type Snapshot } from "./what-if-stage.ts";

const PAGE_SIZE = 500;
/** A list that takes longer than the server keeps its version is begun again, at last in one piece. */
const TRIES_MAX = 3;

const RESOURCES: Readonly<Record<(typeof KINDS)[number], Resource>> = {
  nodes: kinds.nodes,
  pods: kinds.pods,
  slices: kinds.resourceSlices,
  deployments: kinds.modelDeployments,
  pools: kinds.draftPools,
  plans: kinds.shardPlans,
  groups: kinds.replicaGroups,
};
/** Without these the inventory is not known; the others may not be served (yet) and are then empty. */
const NEEDED: readonly Resource[] = [kinds.nodes, kinds.pods];

/** `missing`: kinds that the server does not serve. Throws KubeError where a list is refused. */
export async function readSnapshot(
  api: KubeApi,
  signal: AbortSignal,
): Promise<{ snapshot: Snapshot; missing: readonly string[] }> {
  const lists = await Promise.all(KINDS.map((kind) => listAll(api, RESOURCES[kind], signal)));
  const [nodes, pods, slices, deployments, pools, plans, groups] = lists.map((list) => list ?? []);
  const missing = KINDS.filter((kind, index) => kind !== "slices" && lists[index] === undefined);
  return {
    snapshot: {
      nodes: nodes ?? [],
      pods: pods ?? [],
      slices: slices ?? [],
      deployments: deployments ?? [],
      pools: pools ?? [],
      plans: plans ?? [],
      groups: groups ?? [],
    },
    missing: missing.map((kind) => RESOURCES[kind].kind),
  };
}

/** Undefined where the kind is not served. */
async function listAll(api: KubeApi, resource: Resource, signal: AbortSignal): Promise<KubeObject[] | undefined> {
  for (let tries = 1; ; tries++) {
    try {
      return await pagesOf(api, resource, tries < TRIES_MAX, signal);
    } catch (error) {
      if (isNotFound(error) && !NEEDED.includes(resource)) return undefined;
      if (isGone(error) && tries < TRIES_MAX) continue;
      if (!(error instanceof KubeError)) throw error;
      throw new KubeError(error.code, error.reason, `${resource.plural} cannot be listed: ${error.message}`, {
        cause: error,
      });
    }
  }
}

async function pagesOf(api: KubeApi, resource: Resource, isPaged: boolean, signal: AbortSignal) {
  const objects: KubeObject[] = [];
  let next = "";
  do {
    const paging = { ...(isPaged ? { limit: PAGE_SIZE } : {}), ...(next ? { continue: next } : {}) };
    const page = await api.list(resource, paging, signal);
    for (const object of page.items) objects.push(object);
    next = page.continue;
  } while (next !== "");
  return objects;
}

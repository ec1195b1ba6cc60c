// The controller on a cluster: leads, and while it leads, keeps stores and looks after owners of groups. Owns what a term is
// made of and that it ends whole: with the term everything ends, and the next one begins with lists of its own.
//
//   T1  every write of a term goes through its fence; a term begins with fresh lists, so nothing decided in another is acted on.
//   T2  a part that breaks ends the term: half a controller is worse than another one's turn.
import { apiVersionOf, type KubeApi, KubeError, type KubeObject, type Resource, type Selection } from "./api/client.ts";
import type { Clock } from "./api/clock.ts";
import { backoffMs } from "./api/rate-limit.ts";
import * as kinds from "./api/resources.ts";
import { BESIDE_LABELS, type BesideStores } from "./groups/group-beside.ts";
import type { WorkerTemplate } from "./groups/pods.ts";
import { ClusterView } from "./inventory/cluster-view.ts";
import { FencedApi } from "./lease/fenced-api.ts";
import { LeaderElector, type LeaseTimes, type Term } from "./lease/lease.ts";
import type { KubeMetrics } from "./metrics/metrics.ts";
import { Deployments, type DeploymentsOptions } from "./owners/deployments.ts";
import type { Planner } from "./owners/plan-desk.ts";
import type { InspectTarget } from "./sources/inspect-pod.ts";
import { Inspections, type InspectionsDoor } from "./sources/inspections.ts";
import { SourceLooks } from "./sources/source-looks.ts";
import { EventRecorder } from "./status/events.ts";
import { keptNode } from "./watch/kept-node.ts";
import { keptPod } from "./watch/kept-pod.ts";
import { Reflector } from "./watch/reflector.ts";
import { Store } from "./watch/store.ts";

export type Stores = {
  deployments: Store;
  pools: Store;
  plans: Store;
  groups: Store;
  nodes: Store;
  pods: Store;
  /** Undefined where the server has no ResourceSlices. */
  slices: Store | undefined;
} & BesideStores;

/** What the parts of one term work with. */
export type Lead = {
  api: KubeApi;
  stores: Stores;
  view: ClusterView;
  term: Term;
  events: EventRecorder;
  looks: SourceLooks;
};

/** Runs until the term's signal aborts. */
export type Part = (lead: Lead) => Promise<void>;

export type ControllerOptions = Pick<
  DeploymentsOptions,
  "workerImage" | "loadOf" | "onWaiting" | "onBecause" | "onFailure" | "limits"
> & {
  api: KubeApi;
  clock: Clock;
  random: () => number;
  planner: Planner;
  /** Owners of this namespace alone; undefined: of all. Nodes and pods are those of the whole cluster. */
  namespace?: string;
  /** `api`: a line of its own, so that no renewal waits behind other calls until the term is over; default: the same. */
  lease: { namespace: string; name: string; times?: LeaseTimes; api?: KubeApi };
  /** Of this process and no other, ever. */
  identity: string;
  /** Sends pods to sources that only they can reach, and takes in what they find; undefined: such sources are refused. */
  inspect?: { door: InspectionsDoor; template: WorkerTemplate; target: InspectTarget } | undefined;
  /** Beside the owners: groups, their workers, reports. */
  parts?: readonly Part[];
  onLead?: (isLeading: boolean) => void;
  metrics?: KubeMetrics;
};

const CONTROLLER = "muster.dev/controller";

/** Resolves when aborted; rejects where a part breaks. */
export async function runController(options: ControllerOptions, signal: AbortSignal): Promise<void> {
  const { api, clock, random, lease, identity, metrics, onLead } = options;
  const elector = new LeaderElector({ api, clock, random, ...lease, identity, ...(metrics ? { metrics } : {}) });
  while (!signal.aborted) {
    await elector.lead(async (term) => {
      onLead?.(true);
      try {
        await leadOnce(options, term);
      } finally {
        onLead?.(false);
      }
    }, signal);
  }
}

async function leadOnce(options: ControllerOptions, term: Term): Promise<void> {
  const { clock, random, metrics, identity } = options;
  const api = new FencedApi(options.api, term);
  const ended = new AbortController();
  const signal = AbortSignal.any([term.signal, ended.signal]);
  const served = await untilAnswered(options, signal, async () => ({
    slices: await options.api.serves(kinds.resourceSlices, signal),
    podGroups: await options.api.serves(kinds.podGroups, signal),
  }));
  if (served === undefined) return;
  const stores = storesOf(served);
  const { nodes, pods, slices } = stores;
  const view = new ClusterView({ nodes, pods, slices });
  const meters = metrics === undefined ? {} : { metrics };
  const events = new EventRecorder({ api, clock, random, controller: CONTROLLER, instance: identity, ...meters });
  const onChange = (owner: KubeObject) => looks.changed(owner);
  const inspections =
    options.inspect && new Inspections({ ...options.inspect, api, pods, clock, random, onChange }, signal);
  const looks = new SourceLooks({ api, nodes, clock, inspections }, signal);
  const lead: Lead = { api, stores, view, term: { ...termOf(term), signal }, events, looks };
  const deployments = new Deployments({ ...options, api, stores, view, events, looks, ...meters });
  const parts = [
    ...reflectors(options, api, stores).map((reflector) => reflector.run(signal)),
    events.run(signal),
    deployments.run(signal),
    ...(options.parts ?? []).map((part) => part(lead)),
  ];
  if (inspections !== undefined) options.inspect?.door.open(inspections);
  try {
    await Promise.race([Promise.all(parts), broken(parts)]);
  } finally {
    options.inspect?.door.close();
    ended.abort();
    await Promise.allSettled(parts);
    await inspections?.idle();
  }
}

const BACKOFF = { baseMs: 500, maxMs: 10_000 };

/** Undefined where the signal aborts before. */
async function untilAnswered<T>(
  { clock, random }: Pick<ControllerOptions, "clock" | "random">,
  signal: AbortSignal,
  ask: () => Promise<T>,
): Promise<T | undefined> {
  for (let failures = 1; !signal.aborted; failures += 1) {
    try {
      return await ask();
    } catch (error) {
      if (signal.aborted) return undefined;
      if (!(error instanceof KubeError)) throw error;
      await clock.sleep(signal, clock.nowMs() + backoffMs(failures, BACKOFF, random));
    }
  }
  return undefined;
}

const termOf = (term: Term) => ({
  fence: term.fence,
  transitions: term.transitions,
  isHeld: () => term.isHeld(),
});

/** Rejects with the first part that does (T2). */
async function broken(parts: readonly Promise<void>[]): Promise<never> {
  const { promise, reject } = Promise.withResolvers<never>();
  for (const part of parts) part.catch(reject);
  return promise;
}

function storesOf(has: { slices: boolean; podGroups: boolean }): Stores {
  return {
    deployments: new Store(),
    pools: new Store(),
    plans: new Store(),
    groups: new Store(),
    nodes: new Store({ keep: keptNode }),
    pods: new Store({ keep: keptPod }),
    slices: has.slices ? new Store() : undefined,
    services: new Store(),
    budgets: new Store(),
    podGroups: has.podGroups ? new Store() : undefined,
  };
}

function reflectors(
  { namespace, clock, random, metrics }: ControllerOptions,
  api: KubeApi,
  stores: Stores,
): Reflector[] {
  const own = namespace === undefined ? {} : { namespace };
  const beside = { ...own, labelSelector: BESIDE_LABELS };
  const made = (resource: Resource, store: Store, selection: Selection = {}): Reflector =>
    new Reflector({ api, resource, store, clock, random, ...selection, ...(metrics === undefined ? {} : { metrics }) });
  return [
    made(kinds.modelDeployments, stores.deployments, own),
    made(kinds.draftPools, stores.pools, own),
    made(kinds.shardPlans, stores.plans, own),
    made(kinds.replicaGroups, stores.groups, own),
    made(kinds.nodes, stores.nodes),
    made(kinds.pods, stores.pods),
    ...(stores.slices === undefined ? [] : [made(kinds.resourceSlices, stores.slices)]),
    made(kinds.services, stores.services, beside),
    made(kinds.podDisruptionBudgets, stores.budgets, beside),
    ...(stores.podGroups === undefined ? [] : [made(kinds.podGroups, stores.podGroups, beside)]),
  ];
}

/** Kinds that the API server does not serve though the chart installs them: said before anything is tried. */
export async function missingKinds(api: KubeApi, signal: AbortSignal): Promise<string[]> {
  const needed = [kinds.modelDeployments, kinds.draftPools, kinds.shardPlans, kinds.replicaGroups];
  const served = await Promise.all(needed.map((resource) => api.serves(resource, signal)));
  return needed.filter((_, index) => !served[index]).map((resource) => `${resource.kind} (${apiVersionOf(resource)})`);
}

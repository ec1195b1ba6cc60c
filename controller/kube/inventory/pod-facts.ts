// What of a Pod decides where GPUs are: read once for each object, because a cluster has 100,000 of them.
import type { KubeObject } from "../api/client.ts";
import { countOf, type Fields, fieldsOf, listOf, millisOf, textOf } from "../api/fields.ts";

export const GPU_RESOURCE = "nvidia.com/gpu";

export type PodFacts = {
  name: string;
  namespace: string;
  uid: string;
  resourceVersion: string;
  labels: Readonly<Record<string, string>>;
  annotations: Readonly<Record<string, string>>;
  /** Bound to it, empty before; `nominated`: the scheduler makes room there by ending others. */
  node: string;
  nominated: string;
  gpus: number;
  /** Succeeded or Failed: it holds nothing any more. A pod that is being deleted still does. */
  isOver: boolean;
  isLeaving: boolean;
  isReady: boolean;
  /** Names of scheduling gates that are still closed. */
  gates: readonly string[];
  createdMs: number | undefined;
};

const known = new WeakMap<KubeObject, PodFacts>();

/** Objects are never changed in place (A2 of client.ts), so what was read of one stays true. */
export function podFacts(pod: KubeObject): PodFacts {
  const found = known.get(pod) ?? read(pod);
  known.set(pod, found);
  return found;
}

function read(pod: KubeObject): PodFacts {
  const { metadata } = pod;
  const spec = fieldsOf(pod.spec);
  const status = fieldsOf(pod.status);
  const phase = textOf(status.phase);
  return {
    name: metadata.name,
    namespace: metadata.namespace ?? "",
    uid: metadata.uid ?? "",
    resourceVersion: metadata.resourceVersion ?? "",
    labels: metadata.labels ?? {},
    annotations: metadata.annotations ?? {},
    node: textOf(spec.nodeName) ?? "",
    nominated: textOf(status.nominatedNodeName) ?? "",
    gpus: gpusOf(spec),
    isOver: phase === "Succeeded" || phase === "Failed",
    isLeaving: metadata.deletionTimestamp !== undefined,
    isReady: listOf(status.conditions)
      .map(fieldsOf)
      .some((each) => each.type === "Ready" && each.status === "True"),
    gates: listOf(spec.schedulingGates).flatMap((gate) => textOf(fieldsOf(gate).name) ?? []),
    createdMs: millisOf(metadata.creationTimestamp),
  };
}

/**
 * As the scheduler counts: containers run together; init containers run one after the other before them, each beside the
 * sidecars (init containers that restart always) that were started before it.
 */
function gpusOf(spec: Fields): number {
  let sidecars = 0;
  let peak = 0;
  for (const each of listOf(spec.initContainers).map(fieldsOf)) {
    const own = gpusOfContainer(each);
    if (each.restartPolicy === "Always") sidecars += own;
    peak = Math.max(peak, each.restartPolicy === "Always" ? sidecars : sidecars + own);
  }
  const main = listOf(spec.containers).reduce<number>((sum, each) => sum + gpusOfContainer(fieldsOf(each)), 0);
  return Math.max(peak, main + sidecars);
}

/** A limit without a request is the request. */
function gpusOfContainer(container: Fields): number {
  const { requests, limits } = fieldsOf(container.resources);
  return countOf(fieldsOf(requests)[GPU_RESOURCE] ?? fieldsOf(limits)[GPU_RESOURCE]);
}

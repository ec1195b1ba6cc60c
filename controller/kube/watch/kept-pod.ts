// What is kept of a Pod in memory: all of those that carry a label or gate of ours, and of anybody else's no more than what is
// read of it (pod-facts.ts). A cluster has 100,000 of them, of some 15 KB each as an object.
import { GROUP } from "../../api/meta.ts";
import type { KubeObject } from "../api/client.ts";
import { fieldsOf, listOf } from "../api/fields.ts";
import { podFacts } from "../inventory/pod-facts.ts";

const NAME_LABEL = "app.kubernetes.io/name";

/** For the store of pods (StoreOptions.keep). */
export function keptPod(pod: KubeObject): KubeObject {
  return isOurs(pod) ? { ...pod, metadata: withoutManagedFields(pod.metadata) } : stranger(pod);
}

/** Gateways are the chart's and carry its label alone; who they are is told by their account. */
function isOurs({ metadata }: KubeObject): boolean {
  const labels = Object.entries(metadata.labels ?? {});
  return labels.some(([label, value]) => label.startsWith(`${GROUP}/`) || (label === NAME_LABEL && value === "muster"));
}

/** Often half of an object, and nobody here reads it. */
export function withoutManagedFields(
  metadata: KubeObject["metadata"] & { managedFields?: unknown },
): KubeObject["metadata"] {
  const { managedFields: _, ...rest } = metadata;
  return rest;
}

/** One that asks for no GPU holds nothing that anybody here decides by. */
function stranger(pod: KubeObject): KubeObject {
  const { apiVersion, kind, metadata } = pod;
  const { name, namespace, uid, resourceVersion, creationTimestamp, deletionTimestamp } = metadata;
  const kept: KubeObject["metadata"] = {
    name,
    ...(namespace === undefined ? {} : { namespace }),
    ...(uid === undefined ? {} : { uid }),
    ...(resourceVersion === undefined ? {} : { resourceVersion }),
    ...(creationTimestamp === undefined ? {} : { creationTimestamp }),
    ...(deletionTimestamp === undefined ? {} : { deletionTimestamp }),
  };
  if (podFacts(pod).gpus === 0) return { apiVersion, kind, metadata: kept };
  const { nodeName, initContainers, containers } = fieldsOf(pod.spec);
  const { phase, nominatedNodeName } = fieldsOf(pod.status);
  const sizes = (list: unknown) =>
    listOf(list)
      .map(fieldsOf)
      .map(({ name: title, resources, restartPolicy }) => ({ name: title, resources, restartPolicy }));
  return {
    apiVersion,
    kind,
    metadata: kept,
    spec: { nodeName, initContainers: sizes(initContainers), containers: sizes(containers) },
    status: { phase, nominatedNodeName },
  };
}

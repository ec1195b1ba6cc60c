// What stands beside the pods of a group: names for its workers, its protection from drains, and a gang for schedulers that
// know gangs. All are owned by the ReplicaGroup and go with it.
import { LABELS } from "../../api/meta.ts";
import { ownerReferenceTo } from "../api/apply.ts";
import type { KubeObject, ObjectMeta } from "../api/client.ts";
import { podDisruptionBudgets, podGroups, services } from "../api/resources.ts";
import type { Beside } from "./group-beside.ts";
import { groupLabels, type PodWishes, podGroupNameOf, type WorkerIdentity } from "./pods.ts";

export type GroupIdentity = Pick<WorkerIdentity, "group" | "owner" | "planName">;

function metadataOf(who: GroupIdentity, name: string, labels: Record<string, string> = {}): ObjectMeta {
  const { namespace } = who.group.metadata;
  return {
    name,
    ...(namespace === undefined ? {} : { namespace }),
    labels: { ...groupLabels(who), ...labels },
    ownerReferences: [ownerReferenceTo(who.group)],
  };
}

/** All of it for one incarnation, in the order in which it is written. */
export function besideOf(
  who: GroupIdentity,
  { incarnation, workers, port, pods }: { incarnation: bigint; workers: number; port: number; pods: PodWishes },
): Beside[] {
  const { priorityClassName } = pods.patch ?? {};
  const made: Beside[] = [
    { resource: services, object: headlessService(who, port) },
    { resource: podDisruptionBudgets, object: disruptionBudget(who, workers) },
  ];
  if (pods.hasPodGroup === true)
    made.push({ resource: podGroups, object: podGroup(who, incarnation, { workers, priorityClassName }) });
  return made;
}

/**
 * `POD.GROUP.NAMESPACE.svc`: names also for pods that are not ready, because workers meet before they serve. For people, for
 * libraries that look up the host's own name, and in certificates; workers meet by pod addresses, which belong to exactly one
 * incarnation and need no DNS.
 */
export function headlessService(who: GroupIdentity, port: number): KubeObject {
  const { name } = who.group.metadata;
  return {
    apiVersion: "v1",
    kind: "Service",
    metadata: metadataOf(who, name),
    spec: {
      clusterIP: "None",
      publishNotReadyAddresses: true,
      selector: { [LABELS.group]: name },
      ports: [{ name: "grpc", port, targetPort: "grpc", protocol: "TCP", appProtocol: "kubernetes.io/h2c" }],
    },
  };
}

/**
 * No pod of a whole group is evicted: a drain waits until the controller has brought up another group and deletes this one.
 * An integer minAvailable is the only form for pods that no controller with a scale owns. Broken pods hold no drain up.
 */
export function disruptionBudget(who: GroupIdentity, workers: number): KubeObject {
  const { name } = who.group.metadata;
  return {
    apiVersion: "policy/v1",
    kind: "PodDisruptionBudget",
    metadata: metadataOf(who, name),
    spec: {
      minAvailable: workers,
      unhealthyPodEvictionPolicy: "AlwaysAllow",
      selector: { matchLabels: { [LABELS.group]: name } },
    },
  };
}

/** scheduling.k8s.io/v1beta1: bound all or none, and preempted all or none. For each incarnation a fresh one. */
export function podGroup(
  who: GroupIdentity,
  incarnation: bigint,
  { workers, priorityClassName }: { workers: number; priorityClassName?: string | undefined },
): KubeObject {
  return {
    apiVersion: "scheduling.k8s.io/v1beta1",
    kind: "PodGroup",
    metadata: metadataOf(who, podGroupNameOf(who.group, incarnation), { [LABELS.incarnation]: String(incarnation) }),
    spec: {
      schedulingPolicy: { gang: { minCount: workers } },
      disruptionMode: { all: {} },
      ...(priorityClassName === undefined ? {} : { priorityClassName }),
    },
  };
}

// What the simulated API server does differently for each kind: which have a status of their own, whose spec may change,
// what a new one is given. Owns no storage.
import type { KubeObject, Resource } from "../../controller/kube/api/client.ts";
import { KubeError } from "../../controller/kube/api/client.ts";
import * as known from "../../controller/kube/api/resources.ts";
import { isRecord } from "../../controller/kube/api/wire.ts";
import { isEqual } from "./patches.ts";

export type KindRules = {
  resource: Resource;
  /** Whether the status is written through its own subresource alone. */
  hasStatus: boolean;
  /** Whether metadata.generation counts changes outside metadata and status. */
  hasGeneration: boolean;
  /** Status of a new object. */
  initialStatus?: unknown;
  /** Why this update may not be, or undefined. */
  refuseUpdate?: (before: KubeObject, after: KubeObject) => string | undefined;
  /** How long a deleted object stays when nobody says; 0: not at all. */
  graceSeconds: (object: KubeObject) => number;
};

const noGrace = (): number => 0;

const plain = (resource: Resource): KindRules => ({
  resource,
  hasStatus: false,
  hasGeneration: false,
  graceSeconds: noGrace,
});

const custom = (resource: Resource): KindRules => ({
  resource,
  hasStatus: true,
  hasGeneration: true,
  graceSeconds: noGrace,
});

export function defaultKinds(): KindRules[] {
  return [
    {
      resource: known.pods,
      hasStatus: true,
      hasGeneration: true,
      initialStatus: { phase: "Pending" },
      refuseUpdate: refusePodUpdate,
      graceSeconds: podGraceSeconds,
    },
    { ...plain(known.nodes), hasStatus: true },
    { ...plain(known.services), hasStatus: true },
    { ...custom(known.podDisruptionBudgets) },
    { ...custom(known.podGroups) },
    { ...plain(known.podCertificateRequests), hasStatus: true },
    ...[known.configMaps, known.secrets, known.namespaces, known.leases, known.events].map(plain),
    ...[known.endpointSlices, known.resourceSlices].map(plain),
    ...[known.persistentVolumeClaims, known.persistentVolumes].map(plain),
    ...[known.modelDeployments, known.draftPools, known.shardPlans, known.replicaGroups].map(custom),
  ];
}

const fieldOf = (holder: unknown, field: string): unknown => (isRecord(holder) ? holder[field] : undefined);

/** A pod that no kubelet has, or that has ended, goes at once. */
function podGraceSeconds(pod: KubeObject): number {
  const phase = fieldOf(pod.status, "phase");
  if (typeof fieldOf(pod.spec, "nodeName") !== "string" || phase === "Failed" || phase === "Succeeded") return 0;
  const grace = fieldOf(pod.spec, "terminationGracePeriodSeconds");
  return typeof grace === "number" ? grace : 30;
}

/** May change after creation: node (bound once), gates (removed only), affinity and node selector while gated. */
function refusePodUpdate(before: KubeObject, after: KubeObject): string | undefined {
  const gates = gateNames(before);
  if (gateNames(after).some((gate) => !gates.includes(gate))) return "spec.schedulingGates: only deletion is allowed";
  const node = fieldOf(before.spec, "nodeName");
  if (node !== undefined && fieldOf(after.spec, "nodeName") !== node) return "spec.nodeName: is bound already";
  if (fieldOf(after.spec, "nodeName") !== undefined && gateNames(after).length > 0)
    return "spec.nodeName: pod is gated";
  const free = [
    "schedulingGates",
    "nodeName",
    "tolerations",
    ...(gates.length > 0 ? ["affinity", "nodeSelector"] : []),
  ];
  return isEqual(without(before.spec, free), without(after.spec, free))
    ? undefined
    : "spec: Forbidden: pod updates may not change fields other than schedulingGates, tolerations, and affinity while gated";
}

function gateNames(pod: KubeObject): string[] {
  const gates = fieldOf(pod.spec, "schedulingGates");
  return Array.isArray(gates) ? gates.map((gate) => String(fieldOf(gate, "name"))) : [];
}

function without(spec: unknown, fields: readonly string[]): Record<string, unknown> {
  return Object.fromEntries(Object.entries(isRecord(spec) ? spec : {}).filter(([field]) => !fields.includes(field)));
}

const NAME = /^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$/;

/** Throws where the object could not be one of this kind. */
export function checkShape(object: KubeObject, resource: Resource): void {
  const apiVersion = resource.group ? `${resource.group}/${resource.version}` : resource.version;
  if (object.apiVersion !== apiVersion || object.kind !== resource.kind) {
    const wanted = `${apiVersion} ${resource.kind}`;
    throw new KubeError(400, "BadRequest", `expected ${wanted}, got ${object.apiVersion} ${object.kind}`);
  }
  const { name, namespace } = object.metadata;
  if (!NAME.test(name)) throw new KubeError(422, "Invalid", `metadata.name: Invalid value: "${name}"`);
  if (resource.namespaced !== (namespace !== undefined && namespace !== "")) {
    const wish = resource.namespaced ? "is required" : "must not be set";
    throw new KubeError(400, "BadRequest", `metadata.namespace: ${wish} for ${resource.kind} ${name}`);
  }
}

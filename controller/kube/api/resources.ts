// The kinds that Muster reads or writes, by group, version and plural. Owns no shapes: those of Muster's own kinds are in
// controller/api, of the core's in whoever parses them.
import type { Resource } from "./client.ts";

const namespaced = (group: string, version: string, plural: string, kind: string): Resource => ({
  group,
  version,
  plural,
  kind,
  namespaced: true,
});

const clustered = (group: string, version: string, plural: string, kind: string): Resource => ({
  group,
  version,
  plural,
  kind,
  namespaced: false,
});

export const pods = namespaced("", "v1", "pods", "Pod");
export const services = namespaced("", "v1", "services", "Service");
export const configMaps = namespaced("", "v1", "configmaps", "ConfigMap");
export const secrets = namespaced("", "v1", "secrets", "Secret");
export const persistentVolumeClaims = namespaced("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim");
export const persistentVolumes = clustered("", "v1", "persistentvolumes", "PersistentVolume");
export const nodes = clustered("", "v1", "nodes", "Node");
export const namespaces = clustered("", "v1", "namespaces", "Namespace");
export const leases = namespaced("coordination.k8s.io", "v1", "leases", "Lease");
export const events = namespaced("events.k8s.io", "v1", "events", "Event");
export const endpointSlices = namespaced("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice");
export const podDisruptionBudgets = namespaced("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget");
export const resourceSlices = clustered("resource.k8s.io", "v1", "resourceslices", "ResourceSlice");
export const podCertificateRequests = namespaced(
  "certificates.k8s.io",
  "v1",
  "podcertificaterequests",
  "PodCertificateRequest",
);
export const podGroups = namespaced("scheduling.k8s.io", "v1beta1", "podgroups", "PodGroup");

const MUSTER_GROUP = "muster.dev";
const MUSTER_VERSION = "v1alpha1";
export const modelDeployments = namespaced(MUSTER_GROUP, MUSTER_VERSION, "modeldeployments", "ModelDeployment");
export const draftPools = namespaced(MUSTER_GROUP, MUSTER_VERSION, "draftpools", "DraftPool");
export const shardPlans = namespaced(MUSTER_GROUP, MUSTER_VERSION, "shardplans", "ShardPlan");
export const replicaGroups = namespaced(MUSTER_GROUP, MUSTER_VERSION, "replicagroups", "ReplicaGroup");

// What every object of the API group has: group, version, kinds, metadata. Owns the names by which the API server knows
// our kinds; how one talks to it is controller/kube's.
import { z } from "zod";

export const GROUP = "muster.dev";
export const VERSION = "v1alpha1";
export const API_VERSION = `${GROUP}/${VERSION}`;

export const KINDS = ["ModelDeployment", "DraftPool", "ShardPlan", "ReplicaGroup"] as const;
export type Kind = (typeof KINDS)[number];

export type KindNames = { kind: Kind; plural: string; singular: string; shortNames: readonly string[] };

export const NAMES: Readonly<Record<Kind, KindNames>> = {
  ModelDeployment: {
    kind: "ModelDeployment",
    plural: "modeldeployments",
    singular: "modeldeployment",
    shortNames: ["mdep"],
  },
  DraftPool: { kind: "DraftPool", plural: "draftpools", singular: "draftpool", shortNames: ["dpool"] },
  ShardPlan: { kind: "ShardPlan", plural: "shardplans", singular: "shardplan", shortNames: ["splan"] },
  ReplicaGroup: { kind: "ReplicaGroup", plural: "replicagroups", singular: "replicagroup", shortNames: ["rgroup"] },
};

/** The fields we read; whatever else the API server keeps there passes through. */
export const metadata = z.looseObject({
  name: z.string().min(1).max(253),
  namespace: z.string().max(63).optional(),
  uid: z.string().optional(),
  resourceVersion: z.string().optional(),
  generation: z.int().optional(),
  creationTimestamp: z.string().nullable().optional(),
  deletionTimestamp: z.string().optional(),
  labels: z.record(z.string(), z.string()).optional(),
  annotations: z.record(z.string(), z.string()).optional(),
});
export type Metadata = z.infer<typeof metadata>;

/** Labels by which objects made for one owner are found. */
export const LABELS = {
  deployment: `${GROUP}/deployment`,
  pool: `${GROUP}/pool`,
  plan: `${GROUP}/plan`,
  group: `${GROUP}/group`,
  incarnation: `${GROUP}/incarnation`,
  worker: `${GROUP}/worker`,
} as const;

/** Longest name of a ModelDeployment or DraftPool: names of groups, pods and host names (63) are made from it. */
export const OWNER_NAME_MAX = 40;

export type Owner = { kind: "ModelDeployment" | "DraftPool"; name: string };

const REVISION_SHOWN = 12;

/**
 * Name of the ShardPlan of a revision. The letter after the last dash tells what was made for whom: a deployment and a pool
 * may have one name, and another owner's name may look like a name made from this one.
 */
export function planName({ kind, name }: Owner, revision: string): string {
  return `${name}-${kind === "DraftPool" ? "q" : "p"}${revision.slice(0, REVISION_SHOWN)}`;
}

/** Name of the ReplicaGroup with this ordinal; pods append incarnation and worker and stay within 63. */
export function groupName({ kind, name }: Owner, ordinal: number): string {
  return `${name}-${kind === "DraftPool" ? "d" : "g"}${ordinal}`;
}

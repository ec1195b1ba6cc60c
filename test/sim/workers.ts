// A worker of the simulated cluster: what it is and which gang it is of. SimPods (pods.ts) owns which ones there are.
import type { WorkerDescription } from "../../proto/gen/muster/v1/worker.ts";

export type SimWorker = {
  uid: string;
  /** `namespace/name` of its pod. */
  pod: string;
  node: string;
  /** Of the pod. */
  address: string;
  /** `namespace/name` of its ReplicaGroup. */
  group: string;
  /** UID of that group. */
  owner: string;
  description: WorkerDescription;
  isSilent: boolean;
  peers: readonly string[];
};

export function nameOf({ group, description }: SimWorker): string {
  return `${group}#${description.incarnation}/${description.worker}`;
}

export function isOneGang(one: SimWorker, other: SimWorker): boolean {
  return one.owner === other.owner && one.description.incarnation === other.description.incarnation;
}

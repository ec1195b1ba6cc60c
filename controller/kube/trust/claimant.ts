// Who a pod may say it is: from what its token proves and what the stores know of that pod. Pure.
//
//   C1  a pod counts by its UID, while it has not ended; its service account must be the token's.
//   C2  a worker is what its labels and its owner, a ReplicaGroup that is there, say; one of an older incarnation than the
//       group's is nobody any more.
//   C3  a pod that inspects belongs to an owner that is there; it reports, and may nothing else.
//   C4  a gateway is whoever runs under its account in the release's namespace: to make such a pod is that namespace's right.
import type { Identity } from "../../../proto/trust.ts";
import { LABELS } from "../../api/meta.ts";
import type { KubeObject } from "../api/client.ts";
import { fieldsOf, textOf } from "../api/fields.ts";
import { gangPod } from "../gangs/gang-pods.ts";
import { groupOf, recordOf } from "../groups/group-record.ts";
import { podFacts } from "../inventory/pod-facts.ts";
import type { Stores } from "../run-controller.ts";
import type { Claims } from "./tokens.ts";

export type Accounts = { namespace: string; gateway: string };

export type Claimant =
  | { kind: "known"; identity: Identity; dns: string[] }
  | { kind: "refused"; detail: string }
  /** The API server knows more than we do, or will soon. */
  | { kind: "early"; detail: string };

type Read = Pick<Stores, "pods" | "groups" | "deployments" | "pools">;

const COMPONENT = "app.kubernetes.io/component";

export function claimantOf({ namespace, pod, account }: Claims, stores: Read, accounts: Accounts): Claimant {
  const title = `pod ${namespace}/${pod.name}`;
  const refuse = (detail: string): Claimant => ({ kind: "refused", detail: `${title} ${detail}` });
  const early = (detail: string): Claimant => ({ kind: "early", detail: `${title} ${detail}` });
  if (![stores.pods, stores.groups, stores.deployments, stores.pools].every((store) => store.isSynced))
    return early("is not known yet: pods are being listed");
  const object = stores.pods.get(`${namespace}/${pod.name}`);
  // The watch may be behind the kubelet; a pod that has gone is asked for in vain a few times.
  if (object === undefined) return early(`(${pod.uid}) is not there`);
  if (object.metadata.uid !== pod.uid) return refuse(`has UID ${object.metadata.uid}; the token is of ${pod.uid}`);
  if (podFacts(object).isOver) return refuse("has ended");
  const runsAs = textOf(fieldsOf(object.spec).serviceAccountName) ?? "";
  if (runsAs === "") return refuse("is neither a worker nor a gateway"); // of a stranger no more is kept (kept-pod.ts)
  if (runsAs !== account) return refuse(`runs as ${runsAs}; the token is of ${account}`);
  const found = roleOf(object, stores, accounts);
  if (typeof found === "string") return refuse(found);
  const identity = { ...found, namespace, podUid: pod.uid };
  return { kind: "known", identity, dns: namesOf(object, namespace) };
}

function roleOf(object: KubeObject, stores: Read, accounts: Accounts): Pick<Identity, "role" | "name"> | string {
  const { namespace, name } = object.metadata;
  const runsAs = textOf(fieldsOf(object.spec).serviceAccountName);
  if (namespace === accounts.namespace && runsAs === accounts.gateway) return { role: "gateway", name };
  if (object.metadata.labels?.[COMPONENT] === "inspect")
    return isAsked(object, stores) ? { role: "inspect", name } : "is owned by nobody who is there";
  const pod = gangPod(object);
  if (pod === undefined) return `is neither a worker nor a gateway (service account ${runsAs})`;
  const group = stores.groups.get(pod.group);
  if (group === undefined) return `says that it is of ReplicaGroup ${pod.group}, which is not there`;
  const isOwned = object.metadata.ownerReferences?.some(
    ({ kind, uid }) => kind === "ReplicaGroup" && uid === group.metadata.uid,
  );
  if (isOwned !== true) return `is not owned by ReplicaGroup ${pod.group}`;
  const { incarnation } = recordOf(groupOf(group));
  if (pod.incarnation < incarnation) return `is of incarnation ${pod.incarnation}; its group is at ${incarnation}`;
  return { role: "worker", name: group.metadata.name };
}

function isAsked({ metadata }: KubeObject, { deployments, pools }: Read): boolean {
  const owners = [
    { store: deployments, kind: "ModelDeployment", name: metadata.labels?.[LABELS.deployment] },
    { store: pools, kind: "DraftPool", name: metadata.labels?.[LABELS.pool] },
  ];
  return owners.some(({ store, kind, name }) => {
    const owner = name === undefined ? undefined : store.get(`${metadata.namespace}/${name}`);
    return metadata.ownerReferences?.some((each) => each.kind === kind && each.uid === owner?.metadata.uid) ?? false;
  });
}

/** By which others find it, where it stands behind a headless Service. */
function namesOf(object: KubeObject, namespace: string): string[] {
  const { hostname, subdomain } = fieldsOf(object.spec);
  const host = textOf(hostname);
  const zone = textOf(subdomain);
  if (host === undefined || zone === undefined) return [];
  const name = `${host}.${zone}.${namespace}`;
  return [name, `${name}.svc`, `${name}.svc.cluster.local`];
}

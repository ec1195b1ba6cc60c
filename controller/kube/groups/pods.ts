// The pod of one worker: one node's slice of a group, one process over all of its GPUs. Pure: what is built follows from the
// group, its plan, the installation's template and the deployment's wishes, and nothing else.
//
//   O1  a name is used once: group, incarnation and worker are in it, so a late pod of an older life is never taken for a new one.
//   O2  service account, volumes, security context and GPU count are the template's and the plan's; no wish reaches them but by
//       the two opt-ins, host cache and IPC_LOCK, and by the source: its claim is mounted, its secret is the container's alone.
//   O3  a pod is created closed (gang-pods.ts) and without node affinity: its seat comes with the patch that opens it.
//
// There is no liveness or readiness probe: a worker is judged by its reports, rank by rank, and a probe that fails would have
// the kubelet end one pod of a group for reasons the group does not know.

import { CREDENTIALS_FILE } from "../../../proto/enrol.ts";
import type { ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import { LABELS, OWNER_NAME_MAX } from "../../api/meta.ts";
import type { GpuWish } from "../../api/model-deployment.ts";
import { HOST_CACHE, type PodPatch } from "../../api/pod-patch.ts";
import { type JsonOperation, ownerReferenceTo, pointerSegment } from "../api/apply.ts";
import type { KubeObject } from "../api/client.ts";
import { fieldsOf, listOf } from "../api/fields.ts";
import { GANG_GATE, RESERVED_AT, type Reservation, SEATS, seatsText } from "../gangs/gang-pods.ts";
import { GPU_TOLERATION, type Toleration } from "../gangs/placing.ts";
import type { Selection } from "../inventory/inventory.ts";
import { GPU_RESOURCE } from "../inventory/pod-facts.ts";
import { type PodSource, sourceEnv, sourceMounts, sourceVolumes } from "../sources/pod-source.ts";

/** What the installation says of every worker. */
export type WorkerTemplate = {
  image: string;
  imagePullPolicy: "Always" | "IfNotPresent" | "Never";
  /** How `muster` is started in the image. */
  command: readonly string[];
  serviceAccountName: string;
  port: number;
  /** Address in the pod on which it listens; default: all of them. May name $(MUSTER_POD_IP). */
  listenHost?: string | undefined;
  /** Upper bound of what ranks share through memory; it counts as memory of the pod. */
  shmSize: string;
  resources: { requests: Quantities; limits: Quantities };
  /** How long sequences may run on after SIGTERM, where the owner does not say (rollout.drainTimeout). */
  drainSeconds: number;
  tokenSeconds: number;
  /** Bundle of the installation's CA in every workload namespace; undefined before there is one. */
  caConfigMap: string | undefined;
  /** host:port where it gets its certificate; undefined: it needs none, all is in clear. */
  enrol?: string | undefined;
  /** Kubelets bring its certificate where cluster and nodes can; else, and where they fail, it enrols. Default: true. */
  podCertificates?: boolean | undefined;
  /** Whom they ask for it; undefined: the cluster cannot. */
  signer?: string | undefined;
  userId: number;
};

export type Quantities = Readonly<Record<string, string | number>>;

export type GroupOwner = { kind: "ModelDeployment" | "DraftPool"; name: string };

export type WorkerIdentity = {
  /** The ReplicaGroup as it is stored. */
  group: KubeObject;
  owner: GroupOwner;
  planName: string;
  plan: Pick<ShardPlan, "ranks" | "workers">;
  incarnation: bigint;
  worker: number;
};

export type PodWishes = {
  gpu?: GpuWish | undefined;
  patch?: PodPatch | undefined;
  hasPodGroup?: boolean | undefined;
  /** Every kubelet that it may come to knows certificates of pods. */
  hasPodCertificate?: boolean | undefined;
  /** Where the plan's model lies. */
  source?: PodSource | undefined;
};

/** Audience of the token that a worker shows to controller, gateway and peers. */
export const TOKEN_AUDIENCE = "muster";
const IDENTITY = "/var/run/muster";
/** The kind of key of certificates that kubelets ask for. */
export const KEY_TYPE = "ECDSAP256";
/** After the drain: closing files, links and the engine. */
export const END_SECONDS = 10;
/** Host names are at most this long. */
const HOST_NAME_MAX = 63;
/** What `muster worker` takes: the longest drainTimeout. */
const DRAIN_SECONDS_MAX = 86_400;

export function podName({
  group,
  incarnation,
  worker,
}: Pick<WorkerIdentity, "group" | "incarnation" | "worker">): string {
  const name = `${group.metadata.name}-${incarnation}-${worker}`;
  if (name.length > HOST_NAME_MAX) {
    throw new Error(`pod ${name}: a host name has at most ${HOST_NAME_MAX} characters; owners have ${OWNER_NAME_MAX}`);
  }
  return name;
}

/** GPUs of each worker, by index: what a gang asks for. */
export function devicesOf(plan: WorkerIdentity["plan"]): number[] {
  return Array.from(
    { length: plan.workers },
    (_, worker) => plan.ranks.filter((rank) => rank.worker === worker).length,
  );
}

/** Where pods of these wishes may go; the ledger asks by it, and the pods say the same to the scheduler. */
export function selectionOf({ gpu, patch }: PodWishes): Selection {
  return {
    product: gpu?.product,
    nodeSelector: gpu?.nodeSelector,
    tolerations: [...(gpu?.tolerations ?? []), ...(patch?.tolerations ?? [])],
  };
}

/** Labels of every object of a group's incarnation; `worker` only on pods. */
export function groupLabels({
  group,
  owner,
  planName,
}: Pick<WorkerIdentity, "group" | "owner" | "planName">): Record<string, string> {
  return {
    "app.kubernetes.io/name": "muster",
    "app.kubernetes.io/component": "worker",
    "app.kubernetes.io/managed-by": "muster",
    [owner.kind === "DraftPool" ? LABELS.pool : LABELS.deployment]: owner.name,
    [LABELS.group]: group.metadata.name,
    [LABELS.plan]: planName,
  };
}

export function workerPod(who: WorkerIdentity, template: WorkerTemplate, wishes: PodWishes = {}): KubeObject {
  const { group, incarnation, worker } = who;
  const { patch } = wishes;
  const name = podName(who);
  const podGroupName = podGroupNameOf(group, incarnation);
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name,
      ...(group.metadata.namespace === undefined ? {} : { namespace: group.metadata.namespace }),
      labels: {
        ...patch?.labels,
        ...patch?.queueLabels,
        ...groupLabels(who),
        [LABELS.incarnation]: String(incarnation),
        [LABELS.worker]: String(worker),
      },
      ...(patch?.annotations === undefined ? {} : { annotations: patch.annotations }),
      ownerReferences: [ownerReferenceTo(group)],
    },
    spec: {
      restartPolicy: "Never",
      hostname: name,
      subdomain: group.metadata.name,
      schedulingGates: [{ name: GANG_GATE }],
      ...(wishes.hasPodGroup ? { schedulingGroup: { podGroupName } } : {}),
      ...(wishes.gpu?.nodeSelector === undefined ? {} : { nodeSelector: wishes.gpu.nodeSelector }),
      tolerations: tolerationsOf(wishes),
      ...(patch?.priorityClassName === undefined ? {} : { priorityClassName: patch.priorityClassName }),
      ...(patch?.imagePullSecrets === undefined ? {} : { imagePullSecrets: patch.imagePullSecrets }),
      serviceAccountName: template.serviceAccountName,
      automountServiceAccountToken: false,
      enableServiceLinks: false,
      terminationGracePeriodSeconds: drainSecondsOf(template) + END_SECONDS,
      securityContext: podSecurity(template),
      containers: [container(who, template, wishes)],
      volumes: [...volumes(template, wishes), ...sourceVolumes(wishes.source)],
    },
  };
}

function container(who: WorkerIdentity, template: WorkerTemplate, { patch, source }: PodWishes): unknown {
  const { port, listenHost = "0.0.0.0" } = template;
  const flags = { listen: `${listenHost}:${port}`, incarnation: who.incarnation, worker: who.worker };
  const more = { "comm-host": "$(MUSTER_POD_IP)", "drain-seconds": drainSecondsOf(template) };
  const trust = template.enrol === undefined ? {} : { identity: IDENTITY, enrol: template.enrol };
  const args = Object.entries({ ...flags, ...more, ...trust }).flatMap(([flag, value]) => [`--${flag}`, String(value)]);
  return {
    name: "worker",
    image: template.image,
    imagePullPolicy: template.imagePullPolicy,
    command: [...template.command, "worker"],
    args,
    env: [
      { name: "MUSTER_POD_IP", valueFrom: { fieldRef: { fieldPath: "status.podIP" } } },
      // Whose answers are whose: a worker says which pod it is, and refuses what is meant for another.
      { name: "MUSTER_POD_UID", valueFrom: { fieldRef: { fieldPath: "metadata.uid" } } },
      { name: "MUSTER_NODE_NAME", valueFrom: { fieldRef: { fieldPath: "spec.nodeName" } } },
      { name: "MUSTER_CACHE", value: patch?.hostCache?.path ?? HOST_CACHE },
      ...(patch?.env ?? []).map(({ name, value }) => ({ name, value })),
      ...sourceEnv(source), // after the patch: of two of one name the last counts
    ],
    ports: [{ name: "grpc", containerPort: port, protocol: "TCP" }],
    resources: resources(who, template, patch),
    securityContext: {
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ["ALL"], ...(patch?.ipcLock ? { add: ["IPC_LOCK"] } : {}) },
    },
    volumeMounts: [
      { name: "shm", mountPath: "/dev/shm" },
      { name: "identity", mountPath: IDENTITY, readOnly: true },
      { name: "cache", mountPath: patch?.hostCache?.path ?? HOST_CACHE },
      { name: "tmp", mountPath: "/tmp" },
      ...sourceMounts(source),
    ],
    terminationMessagePolicy: "FallbackToLogsOnError",
  };
}

/** What pod security "restricted" asks of a pod. */
export function podSecurity({ userId }: WorkerTemplate): unknown {
  return {
    runAsNonRoot: true,
    runAsUser: userId,
    runAsGroup: userId,
    fsGroup: userId,
    fsGroupChangePolicy: "OnRootMismatch",
    seccompProfile: { type: "RuntimeDefault" },
  };
}

function drainSecondsOf({ drainSeconds }: WorkerTemplate): number {
  return Math.min(DRAIN_SECONDS_MAX, Math.max(0, drainSeconds));
}

function resources({ plan, worker }: WorkerIdentity, template: WorkerTemplate, patch: PodPatch | undefined): unknown {
  const gpus = devicesOf(plan)[worker] ?? 0;
  const own: Quantities = gpus === 0 ? {} : { [GPU_RESOURCE]: gpus };
  return {
    requests: { ...template.resources.requests, ...patch?.resources?.requests, ...own },
    limits: { ...template.resources.limits, ...patch?.resources?.limits, ...own },
  };
}

function volumes(template: WorkerTemplate, { patch, hasPodCertificate }: PodWishes): unknown[] {
  const { caConfigMap, tokenSeconds, shmSize, signer } = template;
  const token = { serviceAccountToken: { audience: TOKEN_AUDIENCE, expirationSeconds: tokenSeconds, path: "token" } };
  const bundle = { configMap: { name: caConfigMap, items: [{ key: "ca.crt", path: "ca.crt" }] } };
  // Beside the token, not in its place: with that the worker helps itself where its kubelet does not renew in time.
  const certificate =
    signer === undefined || !hasPodCertificate
      ? []
      : [{ podCertificate: { signerName: signer, keyType: KEY_TYPE, credentialBundlePath: CREDENTIALS_FILE } }];
  const sources = caConfigMap === undefined ? [token] : [token, bundle, ...certificate];
  const cache = patch?.hostCache;
  return [
    // NCCL and the ranks of one process share memory through files there; the default of 64 MiB ends them.
    { name: "shm", emptyDir: { medium: "Memory", sizeLimit: shmSize } },
    { name: "identity", projected: { sources } },
    cache === undefined
      ? { name: "cache", emptyDir: {} }
      : { name: "cache", hostPath: { path: cache.path, type: "DirectoryOrCreate" } },
    { name: "tmp", emptyDir: {} },
  ];
}

function tolerationsOf(wishes: PodWishes): Toleration[] {
  const all = [GPU_TOLERATION, ...(selectionOf(wishes).tolerations ?? [])];
  const seen = new Map(all.map((toleration) => [JSON.stringify(toleration), toleration]));
  return [...seen.values()];
}

/** A fresh one for each incarnation: a scheduler that has given up on one starts anew. */
export function podGroupNameOf(group: KubeObject, incarnation: bigint): string {
  return `${group.metadata.name}-${incarnation}`;
}

/**
 * Opens the gate of a pod that takes its seat: gate, node affinity and the whole reservation in one patch (W1), for patchSeen,
 * which guards it by the version that was looked at. The API server lets affinity of a closed pod only become narrower: what
 * others have put there stays, and the seat is added to each of its terms.
 */
export function openingOf(pod: KubeObject, worker: number, reservation: Reservation): JsonOperation[] {
  const seat = reservation.seats.find((each) => each.worker === worker);
  const spec = fieldsOf(pod.spec);
  const gate = listOf(spec.schedulingGates).findIndex((each) => fieldsOf(each).name === GANG_GATE);
  if (seat === undefined || gate < 0) throw new Error(`pod ${pod.metadata.name}: no seat or no gate to open`);
  const annotations = {
    [SEATS]: seatsText(reservation.seats),
    [RESERVED_AT]: new Date(reservation.sinceMs).toISOString(),
  };
  const write: JsonOperation[] =
    pod.metadata.annotations === undefined
      ? [{ op: "add", path: "/metadata/annotations", value: annotations }]
      : Object.entries(annotations).map(([key, value]) => ({
          op: "add",
          path: `/metadata/annotations/${pointerSegment(key)}`,
          value,
        }));
  return [...write, ...narrowing(spec.affinity, seat.node), { op: "remove", path: `/spec/schedulingGates/${gate}` }];
}

const REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution";

function narrowing(affinity: unknown, node: string): JsonOperation[] {
  const requirement = { key: "metadata.name", operator: "In", values: [node] };
  const required = { nodeSelectorTerms: [{ matchFields: [requirement] }] };
  const { nodeAffinity } = fieldsOf(affinity);
  if (affinity === undefined)
    return [{ op: "add", path: "/spec/affinity", value: { nodeAffinity: { [REQUIRED]: required } } }];
  if (nodeAffinity === undefined) {
    return [{ op: "add", path: "/spec/affinity/nodeAffinity", value: { [REQUIRED]: required } }];
  }
  const path = `/spec/affinity/nodeAffinity/${REQUIRED}`;
  const terms = listOf(fieldsOf(fieldsOf(nodeAffinity)[REQUIRED]).nodeSelectorTerms);
  if (terms.length === 0) return [{ op: "add", path, value: required }];
  return terms.map((term, index): JsonOperation => {
    const fields = `${path}/nodeSelectorTerms/${index}/matchFields`;
    return fieldsOf(term).matchFields === undefined
      ? { op: "add", path: fields, value: [requirement] }
      : { op: "add", path: `${fields}/-`, value: requirement };
  });
}

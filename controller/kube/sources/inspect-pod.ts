// The pod that looks at a source where only pods can: reads headers, sends them to the controller, ends. Pure. Owns its name and
// form; when one is made is inspections.ts.
//
//   I1  it asks for no GPU, and goes only where workers of its owner may go: what it can mount and reach, they can.
//   I2  it has what reading needs (claim, secret, cache of its own) and nothing else; pod security "restricted" admits it.
import { createHash } from "node:crypto";
import { LABELS } from "../../api/meta.ts";
import { HOST_CACHE } from "../../api/pod-patch.ts";
import { ownerReferenceTo } from "../api/apply.ts";
import type { KubeObject } from "../api/client.ts";
import { GPU_TOLERATION } from "../gangs/placing.ts";
import { type PodWishes, podSecurity, selectionOf, TOKEN_AUDIENCE, type WorkerTemplate } from "../groups/pods.ts";
import { type PodSource, sourceEnv, sourceMounts, sourceVolumes } from "./pod-source.ts";

export type InspectTarget = {
  /** host:port of the service Reports, as pods reach it. */
  to: string;
};

export type InspectOrder = {
  owner: KubeObject;
  source: PodSource;
  pods: PodWishes;
  /** Nodes of which one is to be taken; empty: any. */
  nodes: readonly string[];
};

const IDENTITY = "/var/run/muster";
/** Headers of a terabyte over a slow network take a minute or two. */
export const INSPECT_SECONDS = 600;
/** Terms of one affinity; more nodes than that are as good as these. */
const NODES_MAX = 64;
const HASH = 8;

export function inspectPodName({ owner, source }: Pick<InspectOrder, "owner" | "source">): string {
  const text = JSON.stringify([owner.kind, source.url, source.secret?.name, source.secret?.key]);
  return `${owner.metadata.name}-inspect-${createHash("sha256").update(text).digest("hex").slice(0, HASH)}`;
}

export function inspectPod(order: InspectOrder, template: WorkerTemplate, target: InspectTarget): KubeObject {
  const { owner, pods } = order;
  const { patch, gpu } = pods;
  const { namespace } = owner.metadata;
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name: inspectPodName(order),
      ...(namespace === undefined ? {} : { namespace }),
      labels: {
        "app.kubernetes.io/name": "muster",
        "app.kubernetes.io/component": "inspect",
        "app.kubernetes.io/managed-by": "muster",
        [owner.kind === "DraftPool" ? LABELS.pool : LABELS.deployment]: owner.metadata.name,
      },
      ownerReferences: [ownerReferenceTo(owner)],
    },
    spec: {
      restartPolicy: "Never",
      activeDeadlineSeconds: INSPECT_SECONDS,
      terminationGracePeriodSeconds: 5,
      ...(gpu?.nodeSelector === undefined ? {} : { nodeSelector: gpu.nodeSelector }),
      ...affinityOf(order.nodes),
      tolerations: [GPU_TOLERATION, ...(selectionOf(pods).tolerations ?? [])],
      ...(patch?.priorityClassName === undefined ? {} : { priorityClassName: patch.priorityClassName }),
      ...(patch?.imagePullSecrets === undefined ? {} : { imagePullSecrets: patch.imagePullSecrets }),
      serviceAccountName: template.serviceAccountName,
      automountServiceAccountToken: false,
      enableServiceLinks: false,
      securityContext: podSecurity(template),
      containers: [container(order, template, target)],
      volumes: volumes(order, template),
    },
  };
}

/** A term for each: a requirement on the name takes one value. */
function affinityOf(nodes: readonly string[]): { affinity?: unknown } {
  if (nodes.length === 0) return {};
  const nodeSelectorTerms = nodes
    .slice(0, NODES_MAX)
    .map((node) => ({ matchFields: [{ key: "metadata.name", operator: "In", values: [node] }] }));
  return { affinity: { nodeAffinity: { requiredDuringSchedulingIgnoredDuringExecution: { nodeSelectorTerms } } } };
}

function container({ source, pods }: InspectOrder, template: WorkerTemplate, { to }: InspectTarget): unknown {
  const { enrol } = template;
  const field = (name: string, fieldPath: string) => ({ name, valueFrom: { fieldRef: { fieldPath } } });
  return {
    name: "inspect",
    image: template.image,
    imagePullPolicy: template.imagePullPolicy,
    command: [...template.command, "inspect"],
    args: [source.url, "--to", to, ...(enrol === undefined ? [] : ["--identity", IDENTITY, "--enrol", enrol])],
    env: [
      field("MUSTER_POD_NAMESPACE", "metadata.namespace"),
      field("MUSTER_POD_NAME", "metadata.name"),
      field("MUSTER_POD_UID", "metadata.uid"),
      field("MUSTER_POD_IP", "status.podIP"),
      { name: "MUSTER_CACHE", value: "/tmp/cache" },
      ...(pods.patch?.env ?? []).map(({ name, value }) => ({ name, value })),
      ...sourceEnv(source),
    ],
    resources: { requests: { cpu: "100m", memory: "256Mi" }, limits: { memory: "2Gi" } },
    securityContext: { allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: { drop: ["ALL"] } },
    volumeMounts: [
      { name: "identity", mountPath: IDENTITY, readOnly: true },
      { name: "tmp", mountPath: "/tmp" },
      ...(pods.patch?.hostCache === undefined
        ? []
        : [{ name: "cache", mountPath: pods.patch.hostCache.path, readOnly: true }]),
      ...sourceMounts(source),
    ],
    terminationMessagePolicy: "FallbackToLogsOnError",
  };
}

function volumes({ source, pods }: InspectOrder, { caConfigMap, tokenSeconds }: WorkerTemplate): unknown[] {
  const token = { serviceAccountToken: { audience: TOKEN_AUDIENCE, expirationSeconds: tokenSeconds, path: "token" } };
  const bundle = { configMap: { name: caConfigMap, items: [{ key: "ca.crt", path: "ca.crt" }] } };
  const cache = pods.patch?.hostCache;
  return [
    { name: "identity", projected: { sources: caConfigMap === undefined ? [token] : [token, bundle] } },
    { name: "tmp", emptyDir: {} },
    ...(cache === undefined ? [] : [{ name: "cache", hostPath: { path: cache.path, type: "DirectoryOrCreate" } }]),
    ...sourceVolumes(source),
  ];
}

export const FILE_MEANS = `on a cluster file:// is a path of worker pods: in the worker image, or at or below podPatch.hostCache.path (${HOST_CACHE}) on every node`;

/** Why a file:// source of a cluster cannot work; undefined where it may. */
export function fileFault(url: string): string | undefined {
  if (!url.startsWith("file://") || url.startsWith("file:///")) return undefined;
  return `${url}: ${FILE_MEANS}; write file:///absolute/path, or name a pvc:// source`;
}

// A large cluster behind a real socket, for the bench: nodes with GPUs, pods of others, and a scheduler that binds what may be
// bound. Nothing runs in any pod. Objects are as large as real ones: what a controller keeps of them is a part of the question.
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { KubeObject } from "../../controller/kube/client.ts";
import { podFacts } from "../../controller/kube/pod-facts.ts";
import * as known from "../../controller/kube/resources.ts";
import { SimApiServer } from "../sim/api-server.ts";
import { SimHttpServer } from "../sim/http-server.ts";
import { seatOf } from "../sim/scheduling.ts";
import { realTime } from "../sim/virtual-time.ts";

export const NS = "serving";
export const GPUS_EACH = 8;
const DOMAIN_NODES = 4;
const ZONES = 4;

const resources = Object.values(known).filter((value) => typeof value === "object");
const { signal: never } = new AbortController();

export class World {
  readonly server = new SimApiServer(realTime);
  /** By verb and kind. */
  readonly calls = new Map<string, number>();
  placedGpus = 0;
  #http: SimHttpServer | undefined;

  async fill(nodes: number, strangers: number): Promise<void> {
    for (let index = 0; index < nodes; index++) {
      const node = nodeOf(index);
      const made = await this.server.create(known.nodes, node, never);
      await this.server.replaceStatus(known.nodes, { ...made, status: node.status }, never);
    }
    for (let index = 0; index < strangers; index++)
      await this.server.create(known.pods, strangerOf(index, nodes), never);
    this.server.onChange(({ resource, after }) => {
      if (resource.plural === "pods" && after !== undefined) this.#bind(after);
    });
  }

  async listen(): Promise<string> {
    this.#http = await SimHttpServer.listen(this.server, {
      resources,
      intercept: ({ method = "", url = "" }) => {
        const [path = "", query = ""] = url.split("?");
        const plural = /^\/(?:api|apis\/[^/]+)\/[^/]+\/(?:namespaces\/[^/]+\/)?([a-z]+)/.exec(path)?.[1];
        const kind = resources.find((each) => each.plural === plural)?.kind ?? "discovery";
        const verb = query.includes("watch=true") ? "WATCH" : method;
        const name = `${verb} ${kind}${path.endsWith("/status") ? " status" : ""}`;
        this.calls.set(name, (this.calls.get(name) ?? 0) + 1);
        // The server keeps every request for its tests; here there are too many.
        this.#http?.requests.splice(0);
        return false;
      },
    });
    return this.#http.url;
  }

  async close(): Promise<void> {
    await this.#http?.close();
  }

  /** The scheduler: a seat is a node's name, and nobody else is there who could take it. */
  #bind(pod: KubeObject): void {
    const { node, gates, isLeaving, gpus } = podFacts(pod);
    const seat = seatOf(pod);
    if (node !== "" || gates.length > 0 || isLeaving || seat === undefined) return;
    setImmediate(async () => {
      const { name, namespace } = pod.metadata;
      await this.server.patch(known.pods, name, namespace, { spec: { nodeName: seat } }, { type: "merge" }, never);
      this.placedGpus += gpus;
    });
  }
}

/** A kubeconfig for it; answers its path. */
export function kubeconfigFor(url: string): string {
  const path = join(mkdtempSync(join(tmpdir(), "muster-bench-")), "config");
  const context = { name: "sim", context: { cluster: "sim", user: "sim", namespace: NS } };
  const config = {
    apiVersion: "v1",
    kind: "Config",
    "current-context": "sim",
    clusters: [{ name: "sim", cluster: { server: url } }],
    users: [{ name: "sim", user: { token: "none" } }],
    contexts: [context],
  };
  writeFileSync(path, JSON.stringify(config));
  return path;
}

function nodeOf(index: number): KubeObject {
  const name = `gpu-${String(index).padStart(5, "0")}`;
  const counts = {
    cpu: "192",
    memory: "2113413756Ki",
    pods: "110",
    "ephemeral-storage": "935Gi",
    "nvidia.com/gpu": String(GPUS_EACH),
  };
  const images = Array.from({ length: 20 }, (_, at) => ({
    names: [`images.example/app-${at}@sha256:${"0".repeat(64)}`],
    sizeBytes: 1e8 + at,
  }));
  const labels = {
    "kubernetes.io/hostname": name,
    "nvidia.com/gpu.product": "NVIDIA-H200",
    "nvidia.com/gpu.memory": "143771",
    "nvidia.com/gpu.count": String(GPUS_EACH),
    "nvidia.com/gpu.clique": `clique-${Math.floor(index / DOMAIN_NODES)}`,
    "topology.kubernetes.io/zone": `zone-${index % ZONES}`,
  };
  return {
    apiVersion: "v1",
    kind: "Node",
    metadata: { name, labels },
    spec: {},
    status: {
      allocatable: counts,
      capacity: counts,
      images,
      conditions: [{ type: "Ready", status: "True", reason: "KubeletReady" }],
    },
  };
}

/** Of somebody else, without GPUs; some 5 KB of JSON, as pods of today have. */
function strangerOf(index: number, nodes: number): KubeObject {
  const name = `web-${index}`;
  const env = Array.from({ length: 12 }, (_, at) => ({
    name: `SETTING_${at}`,
    value: `value-${at}-of-${name}-${"x".repeat(24)}`,
  }));
  const labels = { app: `web-${index % 500}`, "pod-template-hash": `h${index % 977}`, team: `team-${index % 40}` };
  const probe = {
    httpGet: { path: "/healthz", port: 8080, scheme: "HTTP" },
    periodSeconds: 10,
    timeoutSeconds: 1,
    failureThreshold: 3,
  };
  const time = "2026-01-01T00:00:00Z";
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name,
      namespace: `team-${index % 40}`,
      labels,
      annotations: { "config.example/hash": "a".repeat(64) },
      ownerReferences: [
        {
          apiVersion: "apps/v1",
          kind: "ReplicaSet",
          name: `web-${index % 500}`,
          uid: `rs-${index % 500}`,
          controller: true,
        },
      ],
      ...{ managedFields: [fields("kube-controller-manager"), fields("kubelet")] },
    },
    spec: {
      nodeName: `gpu-${String(index % nodes).padStart(5, "0")}`,
      containers: [
        {
          name: "web",
          image: `images.example/web:${index % 50}`,
          env,
          resources: { requests: { cpu: "1", memory: "1Gi" } },
          livenessProbe: probe,
          readinessProbe: probe,
          volumeMounts: [{ name: "token", mountPath: "/var/run/secrets/kubernetes.io/serviceaccount" }],
        },
      ],
      volumes: [
        {
          name: "token",
          projected: { sources: [{ serviceAccountToken: { path: "token", expirationSeconds: 3607 } }] },
        },
      ],
      tolerations: ["not-ready", "unreachable"].map((key) => ({
        key: `node.kubernetes.io/${key}`,
        operator: "Exists",
        effect: "NoExecute",
        tolerationSeconds: 300,
      })),
    },
    status: {
      phase: "Running",
      podIP: `10.${(index >> 16) & 255}.${(index >> 8) & 255}.${index & 255}`,
      conditions: ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map((type) => ({
        type,
        status: "True",
        lastTransitionTime: time,
      })),
      containerStatuses: [
        {
          name: "web",
          ready: true,
          restartCount: 0,
          image: `images.example/web:${index % 50}`,
          imageID: "b".repeat(71),
          containerID: "c".repeat(78),
          state: { running: { startedAt: time } },
        },
      ],
    },
  };
}

const fields = (manager: string) => ({
  manager,
  operation: "Update",
  apiVersion: "v1",
  time: "2026-01-01T00:00:00Z",
  fieldsType: "FieldsV1",
  fieldsV1: {
    "f:metadata": { "f:labels": { ".": {}, "f:app": {}, "f:team": {} } },
    "f:spec": { "f:containers": { 'k:{"name":"web"}': { ".": {}, "f:env": {}, "f:image": {}, "f:resources": {} } } },
  },
});

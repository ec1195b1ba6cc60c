// The chart, installed in a bed as a platform team installs it, and its doors: whom it runs, who leads, where to ask. Owns the two
// namespaces (both enforce pod security `restricted`): HOME of the release, WORK of the models.
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { bedEntrypoints, bedValues } from "../../charts/bed-values.ts";
import { CHART } from "../../charts/render.ts";
import { until } from "../../until.ts";
import type { Output } from "../controlplane/start.ts";
import { Bed } from "./bed.ts";
import type { NodeWish } from "./node.ts";

export const HOME = "muster-system";
export const WORK = "models";
export const DEPLOYMENTS = ["muster-controller", "muster-gateway", "muster-nats"];
export const RUN_MS_MAX = 240_000;
/** As pods and as the proxy behind its Service see the API server. */
const API_SERVER = ["10.0.0.1/32", "127.0.0.1/32"];
/** No node dies here; one that a busy machine keeps silent is not to be taken for dead. */
const NODE_GRACE_SECONDS = 120;
const LOG_CHARS_MAX = 3_000;

const Pod = z.looseObject({
  metadata: z.looseObject({ name: z.string(), namespace: z.string(), uid: z.string() }),
  spec: z.looseObject({ nodeName: z.string().optional(), containers: z.array(z.looseObject({ name: z.string() })) }),
  status: z.looseObject({
    podIP: z.string().optional(),
    conditions: z.array(z.looseObject({ type: z.string(), status: z.string() })).default([]),
  }),
});
export type Pod = z.infer<typeof Pod>;
const Slice = z.looseObject({ endpoints: z.array(z.looseObject({ addresses: z.array(z.string()) })) });
const Lease = z.looseObject({ spec: z.looseObject({ holderIdentity: z.string() }) });
const Service = z.looseObject({ spec: z.looseObject({ clusterIP: z.string() }) });
const Secret = z.looseObject({ data: z.record(z.string(), z.string()) });

/** Where clients ask: base URL of OpenAI HTTP, and address of gRPC. */
export type Door = { name: string; url: string; grpc: string };

export class Installation {
  readonly bed: Bed;

  private constructor(bed: Bed) {
    this.bed = bed;
  }

  /** A bed with both namespaces, each pod with a network of its own; nothing is installed yet. */
  static async start(nodes: readonly NodeWish[]): Promise<Installation> {
    const bed = await Bed.start({
      nodes,
      entrypoints: bedEntrypoints(),
      featureGates: { GenericWorkload: true },
      podNetworks: true,
      nodeGraceSeconds: NODE_GRACE_SECONDS,
    });
    const labels = { "pod-security.kubernetes.io/enforce": "restricted" };
    for (const name of [HOME, WORK])
      await bed.make("/api/v1/namespaces", { apiVersion: "v1", kind: "Namespace", metadata: { name, labels } });
    return new Installation(bed);
  }

  async install(): Promise<Output> {
    const values = join(this.bed.plane.dir, "values.json");
    const networkPolicy = { apiServer: { cidrs: API_SERVER } };
    writeFileSync(values, JSON.stringify({ ...bedValues(), workloadNamespaces: [WORK], networkPolicy }));
    return await this.bed.plane.helm(["install", "muster", CHART, "-n", HOME, "-f", values]);
  }

  async rolledOut(...deployments: readonly string[]): Promise<void> {
    for (const name of deployments)
      await this.succeeds(`${name} is rolled out`, [
        "rollout",
        "status",
        "-n",
        HOME,
        `deployment/${name}`,
        "--timeout=30s",
      ]);
  }

  /** Repeats a kubectl command until it succeeds; in vain, its last words, the pods and what the controllers said are told. */
  async succeeds(what: string, args: readonly string[]): Promise<void> {
    let last = "";
    const isDone = async () => {
      const { code, stdout, stderr } = await this.bed.plane.kubectl(args);
      last = `${stdout}${stderr}`;
      return code === 0;
    };
    await this.waits(isDone, what, () => last);
  }

  /** `until`, with what there is instead in the error. */
  async waits(isSo: () => boolean | Promise<boolean>, what: string, last: () => string = () => ""): Promise<void> {
    await until(isSo, what, RUN_MS_MAX).catch(async (error) => {
      throw new Error(`${error.message}: ${last()}\n${await this.scene()}`);
    });
  }

  /** What an engineer would look at: pods, owners, the end of each controller's words. */
  async scene(): Promise<string> {
    const { stdout } = await this.bed.plane.kubectl(["get", "pods,mdep,draftpools,replicagroups", "-A", "-o", "wide"]);
    const logs = (await this.podsOf("controller")).map((pod) => this.logOf(pod));
    return [stdout, ...logs].join("\n");
  }

  /** The end of what a pod's only container wrote. */
  logOf({ metadata, spec }: Pod): string {
    const file = this.bed.kubelet(spec.nodeName).logFile(metadata, spec.containers[0]?.name ?? "");
    return `${metadata.name}: ${file === undefined ? "" : readEnd(file)}`;
  }

  /** Pods of a component that are not being deleted, in the order of their names. */
  async podsOf(component: string, namespace = HOME): Promise<Pod[]> {
    const path = `/api/v1/namespaces/${namespace}/pods?labelSelector=app.kubernetes.io/component%3D${component}`;
    const { items } = await this.bed.plane.api.list(path);
    return items
      .filter(({ metadata }) => !("deletionTimestamp" in metadata))
      .map((item) => Pod.parse(item))
      .toSorted((one, other) => one.metadata.name.localeCompare(other.metadata.name));
  }

  /** Process id of the pod's only container; 0 where it does not run. */
  pidOf({ metadata, spec }: Pod): number {
    const pids = this.bed.kubelet(spec.nodeName).pids(metadata.namespace, metadata.name);
    return pids.get(spec.containers[0]?.name ?? "") ?? 0;
  }

  /** Processor time in ns, by thread, of the threads that the native engine has made: named as the one that made them. */
  engineTimes(pod: Pod): Map<string, number> {
    const pid = this.pidOf(pod);
    const read = (thread: string, file: string) => readFileSync(`/proc/${pid}/task/${thread}/${file}`, "utf8");
    const own = String(pid);
    const name = read(own, "comm");
    const threads = readdirSync(`/proc/${pid}/task`).filter(
      (thread) => thread !== own && read(thread, "comm") === name,
    );
    return new Map(threads.map((thread) => [thread, Number(read(thread, "schedstat").split(" ")[0])]));
  }

  /** What `kubectl get` shows of one object of WORK, by column. */
  async columns(kind: string, name: string): Promise<Record<string, string>> {
    const { stdout } = await this.bed.plane.kubectl(["get", kind, name, "-n", WORK]);
    const [head = "", row = ""] = stdout.split("\n");
    const heads = [...head.matchAll(/\S+/g)];
    const cells = heads.map(({ index }, i) => row.slice(index, heads[i + 1]?.index).trim());
    return Object.fromEntries(heads.map(([column], i) => [column, cells[i] ?? ""]));
  }

  /** Without grace: its processes end as by SIGKILL, and whoever owns it makes another. */
  async kill({ metadata: { name, namespace } }: Pod): Promise<void> {
    await this.bed.remove(`/api/v1/namespaces/${namespace}/pods/${name}?gracePeriodSeconds=0`);
  }

  /** Who holds the Lease, and the pod that the Service of the leader leads to; undefined while they do not agree. */
  async leader(): Promise<{ holder: string; pod: Pod } | undefined> {
    const { api } = this.bed.plane;
    const lease = Lease.safeParse(
      await api.find(`/apis/coordination.k8s.io/v1/namespaces/${HOME}/leases/muster-controller`),
    );
    const slice = Slice.safeParse(
      await api.find(`/apis/discovery.k8s.io/v1/namespaces/${HOME}/endpointslices/muster-leader`),
    );
    const address = slice.data?.endpoints[0]?.addresses[0];
    const pod = (await this.podsOf("controller")).find(({ status }) => status.podIP === address);
    const holder = lease.data?.spec.holderIdentity ?? "";
    return pod && holder.startsWith(`${pod.metadata.name}-`) ? { holder, pod } : undefined;
  }

  /** The gateways' Service, then each gateway. */
  async doors(): Promise<Door[]> {
    const path = `/api/v1/namespaces/${HOME}/services/muster-gateway`;
    const { clusterIP } = Service.parse(await this.bed.plane.api.find(path)).spec;
    const pods = await this.podsOf("gateway");
    return await Promise.all([
      this.#door("service", clusterIP),
      ...pods.map(({ metadata, status }) => this.#door(metadata.name, status.podIP ?? "")),
    ]);
  }

  async #door(name: string, address: string): Promise<Door> {
    const { space } = this.bed.plane;
    const [http, grpc] = await Promise.all([space.forward(address, 8080), space.forward(address, 8081)]);
    return { name, url: `http://127.0.0.1:${http.port}`, grpc: `127.0.0.1:${grpc.port}` };
  }

  /** The key that clients send. */
  async key(): Promise<string> {
    const { data } = Secret.parse(await this.bed.plane.api.find(`/api/v1/namespaces/${HOME}/secrets/muster-api-key`));
    return Buffer.from(data.key ?? "", "base64").toString();
  }
}

const readEnd = (file: string): string => (existsSync(file) ? readFileSync(file, "utf8").slice(-LOG_CHARS_MAX) : "");

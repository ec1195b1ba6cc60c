// A process kubelet: one Node with devices that are not there and pods that are: each container runs as a local process.
// Owns its Node object, its Lease and the pods bound to it. Containers' views and probes live beside it; images, logs over
// the API, resource limits and security contexts are deliberately absent.
//
//   U1  while the node is heard, lease and status are fresh; dead or severed, not one request leaves it.
//   U2  a pod is deleted from the API (grace 0) only when none of its processes runs.
//   U3  pods that ask for more devices than are free fail on arrival: a double booking is seen, never hidden.
//   U4  whether a pod is ready is this node's to say: what others have said while it was silent is put right.
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { isDeepStrictEqual } from "node:util";
import { ApiRefusal, type Thing } from "../controlplane/raw-api.ts";
import { API_PORT, type ControlPlane } from "../controlplane/start.ts";
import { type Connection, Connections, type Watched } from "./connections.ts";
import { Names } from "./names.ts";
import { type NodeWish, nodeObject, nodeStatus, renewLease } from "./node.ts";
import { Pod, podKey, resourceOf } from "./pod.ts";
import { pause } from "./probe.ts";
import { NETWORK, RunningPod, type Site } from "./running-pod.ts";
import { type PodStatus, phaseOf, podStatus } from "./status.ts";
import { Updates } from "./updates.ts";

const LEASE_MS = 1_000; // well inside the control plane's grace for nodes
const STATUS_EVERY = 4; // leases to one status: after an outage of the API server NotReady must be contradicted
const RETRY_MS = 300;
const PODS_MAX = 200; // addresses of a node's /24, less its own
const DEVICE = "nvidia.com/gpu";

/** heard: as it should be. dead: the machine is off, its processes too. severed: processes live, nobody hears from it. */
export type Mode = "heard" | "dead" | "severed";
type Held = {
  running: RunningPod;
  isPosting: boolean;
  isDirty: boolean;
  posted: PodStatus | undefined;
  isGone: boolean;
};

/** What all nodes of a cluster share. */
export class Nodes {
  readonly #plane: ControlPlane;
  readonly #names: Names;
  readonly #updates = new Updates();
  readonly #entrypoints: Readonly<Record<string, readonly string[]>>;
  readonly #kubelets: ProcessKubelet[] = [];
  readonly #connections: Connections | undefined;

  /** `entrypoints`: what an image (without tag) runs where a pod gives no command. */
  constructor(
    plane: ControlPlane,
    entrypoints: Readonly<Record<string, readonly string[]>> = {},
    hasPodNetworks = false,
  ) {
    this.#plane = plane;
    this.#entrypoints = entrypoints;
    if (hasPodNetworks) this.#connections = new Connections(() => this.#kubelets.flatMap((each) => each.networks()));
    this.#names = new Names(join(plane.dir, "hosts"));
    void this.#names.follow(plane.api);
    void this.#updates.follow(plane.api);
    this.#proxyServices();
  }

  /** Registers a node; resolves when its Node is Ready in the API. */
  async add(wish: NodeWish): Promise<ProcessKubelet> {
    const { api, space, processes, dir } = this.#plane;
    const hasPodNetworks = this.#connections !== undefined;
    const site = {
      api,
      space,
      processes,
      names: this.#names,
      updates: this.#updates,
      entrypoints: this.#entrypoints,
      hasPodNetworks,
    };
    const index = this.#kubelets.length + 1;
    const kubelet = new ProcessKubelet(site, wish, { index, folder: join(dir, "nodes", wish.name) });
    this.#kubelets.push(kubelet);
    await kubelet.register();
    return kubelet;
  }

  /** Throws where pods have no networks of their own. */
  connections(): Connection[] {
    if (this.#connections === undefined) throw new Error("start the bed with podNetworks: pods share one network");
    return this.#connections.all();
  }

  #proxyServices(): void {
    const { dir, ca, token, space, processes } = this.#plane;
    const access = join(dir, "service-proxy.json");
    writeFileSync(access, JSON.stringify({ url: `https://127.0.0.1:${API_PORT}`, ca, token }), { mode: 0o600 });
    const program = join(import.meta.dirname, "service-proxy.ts");
    const inside = space.inside(process.execPath, [program, access]);
    const env = { PATH: process.env.PATH ?? "" };
    processes.on("line", (id, line) => id === "service-proxy" && this.#connections?.joined(line));
    processes.spawn({
      id: "service-proxy",
      ...inside,
      env,
      log: join(dir, "logs", "service-proxy.log"),
      watchesStdin: true,
    });
  }

  /** Ends every node and its processes; the objects stay in the API. */
  async stop(): Promise<void> {
    this.#names.stop();
    this.#updates.stop();
    this.#connections?.stop();
    await Promise.all(this.#kubelets.map((kubelet) => kubelet.stop()));
  }
}

export class ProcessKubelet {
  readonly name: string;
  readonly #site: Site;
  readonly #wish: NodeWish;
  readonly #seat: { index: number; folder: string };
  readonly #pods = new Map<string, Held>(); // by uid
  readonly #stop = new AbortController();
  #session = new AbortController(); // ends when the node is no longer heard
  #mode: Mode = "heard";
  #lastAddress = 1;

  constructor(site: Site, wish: NodeWish, seat: { index: number; folder: string }) {
    this.#site = site;
    this.#wish = wish;
    this.#seat = seat;
    this.name = wish.name;
    mkdirSync(seat.folder, { recursive: true });
  }

  get hostIp(): string {
    return `10.244.${this.#seat.index}.1`;
  }

  async register(): Promise<void> {
    const body = nodeObject(this.#wish, this.hostIp);
    await this.#site.api.ask({ method: "POST", path: "/api/v1/nodes", body });
    await this.#postNode();
    this.#hear();
  }

  /** Process ids of a pod's containers, by container; empty where it does not run here. */
  pids(namespace: string, name: string): Map<string, number> {
    return this.#find(namespace, name)?.running.pids() ?? new Map();
  }

  /** Of the pods that run here and have one. */
  networks(): Watched[] {
    return [...this.#pods.values()].flatMap(({ running: { network, pod, lease } }) => {
      const { namespace, name, labels } = pod.metadata;
      return network === undefined ? [] : [{ namespace, name, labels, ip: lease.place.ip, pid: network.pid }];
    });
  }

  /** Path of a container's output. */
  logFile(pod: { namespace: string; name: string }, container: string): string | undefined {
    return this.#find(pod.namespace, pod.name)?.running.logFile(container);
  }

  /** The machine loses power: processes end at once, nothing is said to anyone. Its pods have failed when it is heard again. */
  die(): void {
    this.#silence("dead");
    for (const { running } of this.#pods.values()) void running.stop(0);
  }

  /** The network is cut: processes go on, nothing is said or heard. */
  sever(): void {
    this.#silence("severed");
  }

  /** The node is heard again and catches up: what was deleted meanwhile ends, what ended meanwhile is said. */
  async revive(): Promise<void> {
    if (this.#mode === "heard") return;
    if (this.#mode === "dead") await Promise.all([...this.#pods.values()].map(({ running }) => running.done));
    this.#mode = "heard";
    this.#session = new AbortController();
    await this.#postNode();
    this.#hear();
    for (const held of this.#pods.values()) this.#post(held);
  }

  async stop(): Promise<void> {
    this.#stop.abort();
    this.#session.abort();
    await Promise.all([...this.#pods.values()].map(({ running }) => running.stop(0)));
  }

  #find(namespace: string, name: string): Held | undefined {
    return [...this.#pods.values()].findLast(({ running }) => podKey(running.pod) === `${namespace}/${name}`);
  }

  #silence(mode: "dead" | "severed"): void {
    this.#mode = mode;
    this.#session.abort();
  }

  #hear(): void {
    const signal = AbortSignal.any([this.#stop.signal, this.#session.signal]);
    void this.#renew(signal);
    void this.#follow(signal);
  }

  /** Renews the lease until `signal`. A refusal is tried again: the node's word must not depend on one request. */
  async #renew(signal: AbortSignal): Promise<void> {
    for (let count = 1; !signal.aborted; count++) {
      await pause(LEASE_MS, signal);
      if (signal.aborted) return;
      const word = count % STATUS_EVERY === 0 ? this.#postNode() : renewLease(this.#site.api, this.name, signal);
      await word.catch(() => undefined);
      if (!signal.aborted) for (const held of this.#pods.values()) this.#insistOnReady(held);
    }
  }

  /** U4: a node that was silent for a while has had its pods said to be not ready: heard again, it says what is. */
  #insistOnReady(held: Held): void {
    const said = readyOf(held.running.pod.status.conditions);
    if (held.posted === undefined || said === undefined || said === readyOf(held.posted.conditions)) return;
    held.posted = undefined;
    this.#post(held);
  }

  async #follow(signal: AbortSignal): Promise<void> {
    const path = `/api/v1/pods?fieldSelector=spec.nodeName%3D${this.name}`;
    const hear = {
      whole: (items: Thing[]) => {
        const there = new Set(items.map(({ metadata }) => metadata.uid));
        for (const [uid, held] of this.#pods) if (!there.has(uid)) this.#vanished(held);
        for (const item of items) this.#seen(Pod.parse(item));
      },
      changed: (type: string, item: Thing) => {
        const held = this.#pods.get(item.metadata.uid);
        if (type === "DELETED") held && this.#vanished(held);
        else if (type !== "BOOKMARK") this.#seen(Pod.parse(item));
      },
    };
    while (!signal.aborted) {
      await this.#site.api.follow(path, hear, signal).catch(() => undefined); // away or stale: list again
      await pause(RETRY_MS, signal);
    }
  }

  #seen(pod: Pod): void {
    const held = this.#pods.get(pod.metadata.uid);
    if (!held) {
      const isFinal = pod.status.phase === "Failed" || pod.status.phase === "Succeeded";
      if (pod.metadata.deletionTimestamp || isFinal) void this.#insist(() => this.#forget(pod));
      else this.#admit(pod);
      return;
    }
    held.running.pod = pod;
    if (!pod.metadata.deletionTimestamp) return;
    void held.running.stop(pod.metadata.deletionGracePeriodSeconds ?? pod.spec.terminationGracePeriodSeconds);
    this.#post(held); // a pod that is over already has nothing left to say but that it is gone
  }

  #admit(pod: Pod): void {
    const wanted = resourceOf(pod, DEVICE);
    const taken = new Set(this.#living().flatMap(({ running }) => running.lease.devices));
    const free = Array.from({ length: this.#wish.gpus }, (_, index) => index).filter((index) => !taken.has(index));
    if (wanted > free.length) return void this.#refuse(pod, `wants ${wanted} ${DEVICE}, ${free.length} are free`);
    const address = this.#freeAddress();
    if (!address) return void this.#refuse(pod, `the node has ${PODS_MAX} pods`);
    const { uid } = pod.metadata;
    const lease = {
      place: { ip: address, hostIp: this.hostIp, node: this.name },
      folder: join(this.#seat.folder, uid),
      devices: free.slice(0, wanted),
    };
    const changed = () => {
      const held = this.#pods.get(uid);
      if (held) this.#post(held);
    };
    const running = new RunningPod(this.#site, pod, lease, changed);
    this.#pods.set(uid, { running, isPosting: false, isDirty: false, posted: undefined, isGone: false });
    changed();
  }

  #living(): Held[] {
    return [...this.#pods.values()].filter(({ running }) => {
      const phase = phaseOf(running.view());
      return phase === "Pending" || phase === "Running";
    });
  }

  #freeAddress(): string | undefined {
    const used = new Set([...this.#pods.values()].map(({ running }) => running.lease.place.ip));
    for (let tried = 0; tried < PODS_MAX; tried++) {
      this.#lastAddress = this.#lastAddress >= PODS_MAX ? 2 : this.#lastAddress + 1; // a freed one rests longest
      const address = `10.244.${this.#seat.index}.${this.#lastAddress}`;
      if (!used.has(address)) return address;
    }
    return undefined;
  }

  async #refuse(pod: Pod, why: string): Promise<void> {
    const status = { phase: "Failed", reason: "UnexpectedAdmissionError", message: `node ${this.name}: ${why}` };
    await this.#insist(() => this.#patchStatus(pod, status));
  }

  /** Repeats a request until the API server has taken it or says that it is about nothing; ends when the node is not heard. */
  async #insist(request: () => Promise<void>): Promise<void> {
    const { signal } = this.#session;
    while (!signal.aborted) {
      const isSettled = await request().then(
        () => true,
        (error) => isPointless(error),
      );
      if (isSettled) return;
      await pause(RETRY_MS, signal);
    }
  }

  /** The object is gone from the API: its processes go at once. */
  #vanished(held: Held): void {
    held.isGone = true;
    void held.running.stop(0).then(() => this.#drop(held));
  }

  #drop({ running }: Held): void {
    this.#pods.delete(running.pod.metadata.uid);
    const { initContainers, containers } = running.pod.spec;
    for (const name of [...initContainers, ...containers].map((each) => each.name).concat(NETWORK))
      this.#site.processes.forget(`${running.pod.metadata.uid}/${name}`);
    rmSync(running.lease.folder, { recursive: true, force: true });
  }

  /** Posts the pod's status until the API has the newest one; one request at a time for a pod. */
  #post(held: Held): void {
    held.isDirty = true;
    if (!held.isPosting) void this.#postAll(held);
  }

  async #postAll(held: Held): Promise<void> {
    held.isPosting = true;
    while (held.isDirty && this.#mode === "heard" && !held.isGone && !this.#stop.signal.aborted) {
      held.isDirty = false;
      await this.#insist(() => this.#postOnce(held));
    }
    held.isPosting = false;
  }

  async #postOnce(held: Held): Promise<void> {
    const view = held.running.view();
    const status = podStatus(view, held.posted?.conditions ?? []);
    if (!isDeepStrictEqual(status, held.posted)) await this.#patchStatus(held.running.pod, status);
    held.posted = status;
    if (view.isOver) await this.#forget(held.running.pod);
  }

  async #patchStatus(pod: Pod, status: Record<string, unknown>): Promise<void> {
    const { name, namespace, uid } = pod.metadata;
    await this.#site.api.ask({
      method: "PATCH",
      path: `/api/v1/namespaces/${namespace}/pods/${name}/status`,
      patch: "strategic-merge-patch", // conditions of others stay
      body: { metadata: { uid }, status },
      signal: this.#session.signal,
    });
  }

  /** Nothing of the pod runs: the API may forget it (U2). */
  async #forget(pod: Pod): Promise<void> {
    if (!pod.metadata.deletionTimestamp) return;
    const { name, namespace, uid } = pod.metadata;
    const path = `/api/v1/namespaces/${namespace}/pods/${name}`;
    const body = { kind: "DeleteOptions", apiVersion: "v1", gracePeriodSeconds: 0, preconditions: { uid } };
    await this.#site.api.ask({ method: "DELETE", path, body, signal: this.#session.signal });
  }

  async #postNode(): Promise<void> {
    const { api } = this.#site;
    const { signal } = this.#session;
    await renewLease(api, this.name, signal);
    const path = `/api/v1/nodes/${this.name}/status`;
    const body = { status: nodeStatus(this.#wish, this.hostIp) };
    await api.ask({ method: "PATCH", path, patch: "strategic-merge-patch", body, signal });
  }
}

const readyOf = (conditions: readonly { type: string; status: string }[]): string | undefined =>
  conditions.find(({ type }) => type === "Ready")?.status;

/** Whether a refused request is about a pod that is no more. Throws where the request itself is wrong. */
function isPointless(error: unknown): boolean {
  if (!(error instanceof ApiRefusal)) return false; // not reached
  if (error.code === 400 || error.code === 422) throw error;
  return error.code === 404 || (error.code === 409 && error.message.includes("UID"));
}

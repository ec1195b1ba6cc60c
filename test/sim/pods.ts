// Scheduler, kubelets and workers of a simulated cluster, in virtual time: binds pods whose gates are open, runs a worker in
// memory for each, reports what became of it, ends what is deleted, and lets workers crash, vanish and fall silent by chance.
// Owns processes and addresses; objects are the simulated API server's. Writes go to the server itself: nodes have no bad days
// but those asked for.
//
//   D1  a pod is bound only where its affinity, its node and the GPUs that are free there let it.
//   D2  an address is given to another pod as soon as it is free: whoever remembers it talks to a stranger.
//   D3  a worker ends with its pod, but for those on a node that is dead.
import { type KubeObject, keyOf } from "../../controller/kube/api/client.ts";
import { fieldsOf, listOf } from "../../controller/kube/api/fields.ts";
import { nodes, pods } from "../../controller/kube/api/resources.ts";
import { gangPod } from "../../controller/kube/gangs/gang-pods.ts";
import { podFacts } from "../../controller/kube/inventory/pod-facts.ts";
import type { DescribeAnswer, WorkerLinks, WorkerTarget } from "../../controller/kube/workers/worker-link.ts";
import { type LoadRequest, WorkerPhase } from "../../proto/gen/muster/v1/worker.ts";
import type { SimApiServer } from "./api-server.ts";
import { hasRoom } from "./scheduling.ts";
import type { VirtualClock } from "./virtual-clock.ts";
import { isOneGang, nameOf, type SimWorker } from "./workers.ts";

/** Chances are for each pod, drawn when it starts, while `untilMs` is not reached. */
export type PodFaults = {
  untilMs: number;
  /** The worker dies within `withinMs`; its pod is Failed soon after. */
  crash: number;
  /** The pod is taken away by force within `withinMs`, and its worker with it. */
  vanish: number;
  /** It does not answer for up to 30 s. */
  silence: number;
  /** The image does not come for up to a minute. */
  slowImage: number;
  withinMs: number;
};

export const wellBehaved: PodFaults = { untilMs: 0, crash: 0, vanish: 0, silence: 0, slowImage: 0, withinMs: 30_000 };

export type SimPodsOptions = { server: SimApiServer; time: VirtualClock; random: () => number; faults?: PodFaults };

const BYTES = 1000n;
const forever = new AbortController().signal;
const COMM_PORT = 7000;
const DESCRIBE_TIMEOUT_MS = 2_000;

export class SimPods implements WorkerLinks {
  /** Whatever the cluster was made to do that it must not. */
  readonly violations: string[] = [];
  /** How many of each fault have happened. */
  readonly happened = new Map<string, number>();
  /** Names (group and its UID, incarnation, worker) of all workers that ever ran. */
  readonly started = new Set<string>();
  /** A worker has got on with its Load, as its stream would say. */
  onNews: (group: string) => void = () => {};
  /** The scheduler never comes to the next pod of a gang whose gates open. */
  isNextHeld = false;
  readonly #server: SimApiServer;
  readonly #time: VirtualClock;
  readonly #random: () => number;
  readonly #faults: PodFaults;
  /** By address. */
  readonly #workers = new Map<string, SimWorker>();
  readonly #deadNodes = new Set<string>();
  /** Names, or UIDs, of pods that the scheduler passes over. */
  readonly #held = new Set<string>();
  /** Pods (by UID) that scheduler or kubelet have at work. */
  readonly #scheduling = new Set<string>();
  readonly #ending = new Set<string>();

  constructor({ server, time, random, faults = wellBehaved }: SimPodsOptions) {
    this.#server = server;
    this.#time = time;
    this.#random = random;
    this.#faults = faults;
    server.onChange(({ resource, before, after }) => {
      if (resource.plural !== "pods") return;
      if (after === undefined) this.#gone(before);
      else this.#see(after);
    });
  }

  get workers(): readonly SimWorker[] {
    return [...this.#workers.values()];
  }

  // ---- what tests do ----

  crash(worker: SimWorker): void {
    if (!this.#end(worker)) return;
    this.#count("crash");
    this.#after(100 + this.#random() * 400, () => void this.#failed(worker.uid, 137));
  }

  vanish(worker: SimWorker): void {
    if (!this.#end(worker)) return;
    this.#count("vanish");
    const [namespace, name = ""] = worker.pod.split("/");
    const options = { preconditions: { uid: worker.uid }, gracePeriodSeconds: 0 };
    void this.#server.delete(pods, name, namespace, options, forever).catch(() => {}); // it may have gone by itself
  }

  /** The scheduler never comes to this pod. */
  hold(pod: string): void {
    this.#held.add(pod);
  }

  fallSilent(worker: SimWorker, forMs: number): void {
    this.#count("silence");
    worker.isSilent = true;
    this.#after(forMs, () => {
      worker.isSilent = false;
    });
  }

  /** The victim is gone and nobody has said so; at its address another worker answers. */
  impersonate(victim: SimWorker, stranger: SimWorker): void {
    this.#end(victim);
    this.#workers.set(victim.address, stranger);
  }

  /** Its kubelet reports no more and ends nothing; its workers are dead, but for `isZombie`. */
  async killNode(name: string, { isZombie = false } = {}): Promise<void> {
    this.#deadNodes.add(name);
    for (const worker of this.workers) if (worker.node === name && !isZombie) this.#end(worker);
    await this.#report(name, { status: "Unknown", message: "Kubelet stopped posting node status." });
  }

  async #report(name: string, ready: { status: string; message?: string }): Promise<void> {
    const node = this.#server.objects(nodes).find(({ metadata }) => metadata.name === name);
    if (node === undefined) throw new Error(`no node ${name}`);
    const status = { ...fieldsOf(node.status), conditions: [{ type: "Ready", ...ready }] };
    await this.#server.replaceStatus(nodes, { ...node, status }, forever);
  }

  /** The kubelet is back: it reports, ends what shall have gone meanwhile, and says what of its pods has died. */
  async reviveNode(name: string): Promise<void> {
    if (!this.#deadNodes.delete(name)) return;
    await this.#report(name, { status: "True" });
    const there = this.#server.objects(pods).filter((pod) => podFacts(pod).node === name);
    for (const worker of this.workers)
      if (worker.node === name && !there.some(({ metadata }) => metadata.uid === worker.uid)) this.#end(worker);
    for (const pod of there) {
      const { uid, isLeaving, isOver } = podFacts(pod);
      const isRunning = this.workers.some((worker) => worker.uid === uid);
      if (isLeaving) this.#stop(pod);
      else if (!isOver && !isRunning && gangPod(pod) !== undefined) await this.#failed(uid, 137);
    }
  }

  // ---- WorkerLinks ----

  async describe(target: WorkerTarget, signal: AbortSignal, boundMs = DESCRIBE_TIMEOUT_MS): Promise<DescribeAnswer> {
    await this.#time.sleep(signal, this.#time.nowMs() + 2 + this.#random() * 8);
    const worker = this.#at(target.address);
    if (worker === undefined) return { kind: "silent", detail: "connection refused" };
    if (worker.isSilent) {
      await this.#time.sleep(signal, this.#time.nowMs() + boundMs);
      return { kind: "silent", detail: "deadline exceeded" };
    }
    return { kind: "answered", uid: worker.uid, description: { ...worker.description } };
  }

  async load(target: WorkerTarget, request: LoadRequest, signal: AbortSignal): Promise<void> {
    await this.#time.sleep(signal, this.#time.nowMs() + 2 + this.#random() * 8);
    signal.throwIfAborted();
    const worker = this.#at(target.address);
    if (worker === undefined || worker.isSilent) throw new Error("connection refused");
    // As the worker does with the header: it is another's Load.
    if (worker.uid !== target.uid) throw new Error(`this is pod ${worker.uid}`);
    const { description } = worker;
    if (request.incarnation !== description.incarnation || request.worker !== description.worker) {
      this.violations.push(`Load of ${request.incarnation}.${request.worker} reached ${nameOf(worker)}`);
    }
    if (description.phase !== WorkerPhase.IDLE) return;
    description.phase = WorkerPhase.LOADING;
    worker.peers = request.commAddresses.filter((_, index) => index !== request.worker);
    this.#later(worker, 300 + this.#random() * 1_000, () => {
      description.bytesLoaded = BYTES;
      this.#enter(worker, WorkerPhase.CONNECTING);
      this.#connect(worker);
    });
  }

  forget(): void {}

  // ---- scheduler ----

  #see(pod: KubeObject): void {
    const facts = podFacts(pod);
    if (facts.isLeaving) {
      this.#stop(pod);
      return;
    }
    if (facts.isOver || facts.node !== "" || facts.gates.length > 0 || this.#scheduling.has(facts.uid)) return;
    if (this.isNextHeld && gangPod(pod) !== undefined) {
      this.isNextHeld = false;
      this.#held.add(facts.uid);
      this.#count("hold");
    }
    if (this.#held.has(facts.name) || this.#held.has(facts.uid)) return;
    this.#scheduling.add(facts.uid);
    this.#after(20 + this.#random() * 200, () => void this.#schedule(pod));
  }

  async #schedule(seen: KubeObject): Promise<void> {
    const pod = this.#live(seen);
    if (pod === undefined || podFacts(pod).node !== "") return;
    const node = this.#server.objects(nodes).find((each) => hasRoom(this.#server, each, pod));
    const { name, namespace } = pod.metadata;
    if (node === undefined) {
      const message = "0 nodes are available: insufficient nvidia.com/gpu or no match for node affinity";
      const condition = { type: "PodScheduled", status: "False", reason: "Unschedulable", message };
      if (fieldsOf(listOf(fieldsOf(pod.status).conditions)[0]).reason !== "Unschedulable")
        await this.#writeStatus(pod, { conditions: [{ ...condition, lastTransitionTime: this.#timeText() }] });
      this.#after(1_000, () => void this.#schedule(pod));
      return;
    }
    const seated = { spec: { nodeName: node.metadata.name } };
    await this.#server.patch(pods, name, namespace, seated, { type: "merge" }, forever);
    const conditions = [{ type: "PodScheduled", status: "True", lastTransitionTime: this.#timeText() }];
    await this.#writeStatus(pod, { conditions });
    const isSlow = this.#strikes(this.#faults.slowImage, "slowImage");
    this.#after(50 + this.#random() * (isSlow ? 60_000 : 500), () => void this.#run(pod));
  }

  // ---- kubelet ----

  async #run(seen: KubeObject): Promise<void> {
    const pod = this.#live(seen);
    const gang = pod && gangPod(pod);
    if (pod === undefined || gang === undefined || gang.isLeaving || this.#deadNodes.has(gang.node)) return;
    const worker: SimWorker = {
      uid: podFacts(pod).uid,
      pod: keyOf(pod),
      node: gang.node,
      address: this.#freeAddress(),
      group: gang.group,
      owner: pod.metadata.ownerReferences?.[0]?.uid ?? "",
      description: {
        incarnation: gang.incarnation,
        worker: gang.worker,
        phase: WorkerPhase.IDLE,
        commAddress: "",
        bytesLoaded: 0n,
        bytesTotal: BYTES,
        numericsId: "",
        fault: undefined,
        cpu: "sim",
      },
      isSilent: true,
      peers: [],
    };
    this.#checkStart(worker);
    worker.description.commAddress = `${worker.address}:${COMM_PORT}`;
    this.#workers.set(worker.address, worker);
    this.#later(worker, 20 + this.#random() * 500, () => {
      worker.isSilent = false;
    });
    this.#drawFaults(worker);
    const state = { running: { startedAt: this.#timeText() } };
    await this.#writeStatus(pod, {
      phase: "Running",
      podIP: worker.address,
      containerStatuses: [{ name: "worker", state }],
    });
  }

  #checkStart(worker: SimWorker): void {
    const name = nameOf(worker);
    const id = `${name} of ${worker.owner}`;
    if (this.started.has(id)) this.violations.push(`C1: ${name} is started twice`);
    this.started.add(id);
    const { incarnation } = worker.description;
    const other = this.workers.find(
      (each) =>
        each.owner === worker.owner && each.description.incarnation !== incarnation && !this.#deadNodes.has(each.node),
    );
    if (other !== undefined) this.violations.push(`I2: ${name} starts while ${nameOf(other)} runs`);
  }

  #drawFaults(worker: SimWorker): void {
    const { crash, vanish, silence, withinMs } = this.#faults;
    const within = () => this.#random() * withinMs;
    if (this.#strikes(crash)) this.#later(worker, within(), () => this.crash(worker));
    else if (this.#strikes(vanish)) this.#later(worker, within(), () => this.vanish(worker));
    if (this.#strikes(silence)) this.#later(worker, within(), () => this.fallSilent(worker, this.#random() * 30_000));
  }

  /** Deleted: its worker drains a while, then pod and worker are gone. */
  #stop(pod: KubeObject): void {
    const { uid, node } = podFacts(pod);
    if (node === "" || this.#deadNodes.has(node) || this.#ending.has(uid)) return;
    this.#ending.add(uid);
    const worker = this.workers.find((each) => each.uid === uid);
    if (worker !== undefined) worker.description.phase = WorkerPhase.DRAINING;
    const graceMs = (pod.metadata.deletionGracePeriodSeconds ?? 0) * 1000;
    this.#after(Math.min(graceMs, this.#random() * 1_500), () => {
      if (worker !== undefined) this.#end(worker);
      const { name, namespace } = pod.metadata;
      const options = { preconditions: { uid }, gracePeriodSeconds: 0 };
      void this.#server.delete(pods, name, namespace, options, forever).catch(() => {}); // taken away by force meanwhile
    });
  }

  /** The object has gone, in whatever way: so has the process. */
  #gone(pod: KubeObject | undefined): void {
    const uid = pod?.metadata.uid;
    const worker = this.workers.find((each) => each.uid === uid);
    if (worker !== undefined && !this.#deadNodes.has(worker.node)) this.#end(worker);
  }

  async #failed(uid: string, exitCode: number): Promise<void> {
    const pod = this.#server.objects(pods).find(({ metadata }) => metadata.uid === uid);
    if (pod === undefined || this.#deadNodes.has(podFacts(pod).node)) return;
    const terminated = { exitCode, reason: "Error" };
    await this.#writeStatus(pod, { phase: "Failed", containerStatuses: [{ name: "worker", state: { terminated } }] });
  }

  // ---- workers ----

  #at(target: string): SimWorker | undefined {
    return this.#workers.get(target.slice(0, target.lastIndexOf(":")));
  }

  #connect(worker: SimWorker): void {
    const peers = worker.peers.map((address) => this.#at(address));
    const isReady = peers.every(
      (peer) => peer !== undefined && peer.description.phase >= WorkerPhase.CONNECTING && isOneGang(peer, worker),
    );
    if (!isReady) {
      this.#later(worker, 100, () => this.#connect(worker));
      return;
    }
    this.#enter(worker, WorkerPhase.WARMING);
    this.#later(worker, 50 + this.#random() * 300, () => {
      if (worker.description.phase !== WorkerPhase.WARMING) return;
      worker.description.numericsId = "sim";
      this.#enter(worker, WorkerPhase.SERVING);
    });
  }

  #enter(worker: SimWorker, phase: WorkerPhase): void {
    worker.description.phase = phase;
    this.onNews(worker.group);
  }

  /** Answers false where it had ended before. Its peers notice. */
  #end(worker: SimWorker): boolean {
    if (this.#workers.get(worker.address) !== worker) return false;
    this.#workers.delete(worker.address);
    for (const peer of this.workers) {
      if (!isOneGang(peer, worker) || peer.description.phase < WorkerPhase.CONNECTING) continue;
      this.#later(peer, this.#random() * 500, () => {
        if (peer.description.phase !== WorkerPhase.DRAINING) peer.description.phase = WorkerPhase.FAILED;
      });
    }
    return true;
  }

  #freeAddress(): string {
    for (let last = 1; ; last++) if (!this.#workers.has(`10.0.0.${last}`)) return `10.0.0.${last}`;
  }

  // ---- inside ----

  #live({ metadata }: KubeObject): KubeObject | undefined {
    return this.#server.objects(pods).find((each) => each.metadata.uid === metadata.uid);
  }

  async #writeStatus(pod: KubeObject, status: Record<string, unknown>): Promise<void> {
    const live = this.#live(pod);
    if (live === undefined) return;
    await this.#server.replaceStatus(pods, { ...live, status: { ...fieldsOf(live.status), ...status } }, forever);
  }

  #timeText(): string {
    return new Date(this.#time.nowMs()).toISOString();
  }

  #strikes(chance: number, name?: string): boolean {
    const does = this.#time.nowMs() < this.#faults.untilMs && this.#random() < chance;
    if (does && name !== undefined) this.#count(name);
    return does;
  }

  #count(fault: string): void {
    this.happened.set(fault, (this.happened.get(fault) ?? 0) + 1);
  }

  #after(delayMs: number, run: () => void): void {
    this.#time.at(this.#time.nowMs() + delayMs, run);
  }

  /** Not where the worker has ended by then. */
  #later(worker: SimWorker, delayMs: number, run: () => void): void {
    this.#after(delayMs, () => {
      if (this.#workers.get(worker.address) === worker) run();
    });
  }
}

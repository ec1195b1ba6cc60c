// A bed for disruptions: nodes with spares, controllers and gateways behind the proxy, one deployment of two workers over two
// nodes, and a witness of the invariants. Owns what is started and its names; what is done to it is the tests'.
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";
import { z } from "zod";
import { chunksOf, openSse } from "../../controller/gateway/sse-client.ts";
import { until } from "../../until.ts";
import { ApiProxy, type Fate } from "./api-proxy.ts";
import { Bed, POD_PATH } from "./bed.ts";
import { installCrds, MAIN, startController } from "./controller.ts";
import type { Bounds } from "./invariants.ts";
import { Group, groupsOf } from "./serving.ts";
import { Witness } from "./witness.ts";

export const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const CORE = "/api/v1/namespaces/default";
const HTTP_PORT = 8080;
const REPORTS_PORT = 7441;
/** The least that is allowed: what is tested is what happens, not how long the default is. */
export const LEASE_SECONDS = 3;
/** Engines, a control plane and the test share a small machine. */
export const SERVE_MS_MAX = 180_000;
const SAID_CHARS_MAX = 3_000;

/**
 * A controller learns of the end of a pod within a second; half of T of the ledger is left to whoever takes over. A write
 * that was on its way when its writer was replaced may promise a GPU twice until the next one has looked.
 */
export const BOUNDS: Bounds = { servingMs: 15_000, staleMs: 45_000, halfMs: 150_000, overdrawnMs: 15_000 };

export const DEPLOYMENT = {
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "nano" },
  spec: {
    model: { source: "builtin://nano-maverick" },
    replicas: 1,
    gpu: { count: 2, topology: { nodes: 2 } },
    parallelism: { tp: 2 },
    slo: { concurrency: 8 },
    rollout: { drainTimeout: "2s" },
  },
};
/** Seconds of work, so that it is under way when something dies. */
const LONG = {
  model: "nano",
  prompt: "My fellow citizens,",
  max_tokens: 600,
  n: 4,
  temperature: 0.7,
  seed: 11,
  ignore_eos: true,
  stream: true,
  stream_options: { include_usage: true },
  muster: { return_token_ids: true },
};
const LeaseSeen = z.looseObject({ spec: z.looseObject({ holderIdentity: z.string().optional() }) });

export type Answer = { ids: number[]; texts: string[] };

export class DisruptionBed {
  readonly bed: Bed;
  readonly proxy: ApiProxy;
  readonly witness: Witness;
  readonly #gateways = new Map<string, string>();
  #controllers = 0;
  /** Of the controllers that have been started and not been ended by the test. */
  readonly running = new Set<string>();

  private constructor(bed: Bed, proxy: ApiProxy, witness: Witness) {
    this.bed = bed;
    this.proxy = proxy;
    this.witness = witness;
  }

  /** `nodes` of one GPU each. */
  static async start(nodes: number, bounds: Bounds = BOUNDS): Promise<DisruptionBed> {
    const wishes = Array.from({ length: nodes }, (_, index) => ({ name: `gpu-${index}`, gpus: 1 }));
    const bed = await Bed.start({ nodes: wishes });
    await installCrds(bed);
    await bed.make(`${CORE}/services`, {
      metadata: { name: "muster-leader" },
      spec: { clusterIP: "None", ports: [{ name: "reports", port: REPORTS_PORT }] },
    });
    return new DisruptionBed(bed, await ApiProxy.open(bed), await Witness.begin(bed, bounds));
  }

  async stop(): Promise<void> {
    await this.witness.stop();
    await this.proxy.close();
    await this.bed.stop();
  }

  /** A controller of its own name and address behind the proxy; `fate`: where it dies, and what then. Answers its name. */
  startController(fate?: Fate, leaseSeconds = LEASE_SECONDS): string {
    const index = this.#controllers++;
    const id = `controller-${index}`;
    const address = `10.244.${200 + Math.floor(index / 200)}.${1 + (index % 200)}`;
    const own = fate && {
      ...fate,
      die: () => {
        this.kill(id);
        fate.die();
      },
    };
    const flags = {
      kubeconfig: this.proxy.kubeconfig(id, own),
      listen: `${address}:${REPORTS_PORT}`,
      advertise: "muster-leader.default.svc",
      "lease-seconds": String(leaseSeconds),
    };
    startController(this.bed, flags, { id, env: { MUSTER_POD_IP: address } });
    this.running.add(id);
    return id;
  }

  /** As by `kill -9`, at once: nothing goes through the guard. */
  kill(id: string): void {
    const seen = this.bed.plane.processes.children.get(id);
    if (seen?.state !== "running") throw new Error(`${id} does not run: ${JSON.stringify(seen)}`);
    this.running.delete(id);
    process.kill(seen.pid, "SIGKILL");
  }

  /** A gateway on ports of its own; resolves when it is ready. */
  async startGateway(id: string): Promise<void> {
    const { plane } = this.bed;
    const port = HTTP_PORT + 2 * this.#gateways.size;
    const listen = ["--http", `127.0.0.1:${port}`, "--grpc", `127.0.0.1:${port + 1}`];
    const args = ["gateway", "--kubernetes", "--kubeconfig", this.proxy.kubeconfig(id), ...listen];
    plane.processes.spawn({
      id,
      ...plane.space.inside(process.execPath, [MAIN, ...args]),
      env: { PATH: process.env.PATH ?? "", HOME: process.env.HOME ?? "/" },
      log: join(plane.dir, `${id}.log`),
      watchesStdin: false,
    });
    const url = `http://127.0.0.1:${(await plane.space.forward("127.0.0.1", port)).port}`;
    this.#gateways.set(id, url);
    const isReady = async () => {
      if (!plane.processes.isRunning(id)) throw new Error(`${id} has ended`);
      const { ok } = await fetch(`${url}/readyz`).catch(() => ({ ok: false }));
      return ok;
    };
    await until(isReady, `${id} is ready`, SERVE_MS_MAX).catch((error) => this.explain(error));
  }

  /** The one group of the deployment, once a whole incarnation serves that is newer than `after`. */
  async serving(after = 0): Promise<Group> {
    let found: Group | undefined;
    const isServing = async () => {
      this.expectHeld();
      // The API server may be away, or not know us yet.
      [found] = await groupsOf(this.bed, "nano").catch(() => []);
      return found?.status.phase === "Serving" && (found.status.incarnation ?? 0) > after;
    };
    await until(isServing, `an incarnation after ${after} serves`, SERVE_MS_MAX).catch((error) =>
      this.explain(new Error(`${error.message}; ${JSON.stringify(found?.status)}`)),
    );
    return Group.parse(found);
  }

  /** Something is about to end an incarnation of the group, and may end `more` until it serves again. */
  allowRestart({ status }: Group, more = 0): void {
    this.witness.invariants.restartsMax = (status.restarts ?? 0) + 1 + more;
  }

  pidOf({ status }: Group, worker: number): number {
    const { node, pod } = this.seatOf({ status }, worker);
    const pid = this.bed.kubelet(node).pids("default", pod).get("worker");
    if (pid === undefined) throw new Error(`${pod} does not run`);
    return pid;
  }

  seatOf({ status }: Pick<Group, "status">, worker: number): { node: string; pod: string } {
    const seat = status.placement.find((each) => each.worker === worker);
    if (seat === undefined) throw new Error(`worker ${worker} has no place`);
    return seat;
  }

  /** The long answer through a gateway; `meanwhile` runs when it has begun. Rejects where the stream breaks. */
  async answer(gateway: string, meanwhile: () => unknown = () => {}): Promise<Answer & { resumes: number }> {
    const response = await openSse(this.#gateways.get(gateway) ?? "", "/v1/completions", LONG);
    let isOver = false;
    const ending = chunksOf(response).finally(() => {
      isOver = true;
    });
    ending.catch(() => {}); // it is awaited below
    await meanwhile();
    // What was to happen meanwhile has; a stream that breaks of it is over, too, and rejects.
    if (isOver) await ending.then(() => this.explain(new Error("the stream was over before it was disturbed")));
    const got = await ending;
    if (!got.isDone || got.error) this.explain(new Error(`the stream has ended: ${JSON.stringify(got.error)}`));
    expect(got.usage.completion_tokens).toBe(LONG.max_tokens * LONG.n);
    return { ids: got.ids, texts: got.texts, resumes: got.usage.muster?.resumes ?? 0 };
  }

  /** Who has the Lease; empty for nobody. */
  async leader(): Promise<string> {
    const path = "/apis/coordination.k8s.io/v1/namespaces/default/leases/muster-controller";
    const found = LeaseSeen.safeParse(await this.bed.plane.api.find(path));
    return found.success ? (found.data.spec.holderIdentity ?? "") : "";
  }

  /** Whose name it is that leads: what it wrote is told apart by its log. */
  async leads(): Promise<string> {
    let found: string | undefined;
    const isKnown = async () => {
      const holder = await this.leader();
      found = [...this.running].find((id) => holder !== "" && this.said(id).includes(holder));
      return found !== undefined;
    };
    await until(isKnown, "a controller that runs leads", SERVE_MS_MAX).catch((error) => this.explain(error));
    return found ?? "";
  }

  said(id: string): string {
    const path = join(this.bed.plane.dir, `${id}.log`);
    return existsSync(path) ? readFileSync(path, "utf8") : "";
  }

  /** The invariants, and that nobody ended whom nobody killed. */
  expectHeld(): void {
    for (const id of this.running)
      if (!this.bed.plane.processes.isRunning(id)) throw new Error(`${id} has ended: ${this.said(id).slice(-1_000)}`);
    expect(this.witness.invariants.broken).toEqual([]);
  }

  /** What there is of the deployment and what was made for it, once there is nothing. */
  async gone(): Promise<void> {
    const labelled = (path: string) => `${path}?labelSelector=muster.dev/group`;
    const paths = [
      ...["modeldeployments", "shardplans", "replicagroups"].map((kind) => `${OURS}/${kind}`),
      POD_PATH,
      labelled(`${CORE}/services`),
      labelled("/apis/policy/v1/namespaces/default/poddisruptionbudgets"),
    ];
    let left: string[] = [];
    const isEmpty = async () => {
      const lists = await Promise.all(paths.map((path) => this.bed.plane.api.list(path)));
      left = lists.flatMap(({ items }) => items.map(({ metadata }) => metadata.name));
      return left.length === 0;
    };
    await until(isEmpty, "objects and pods are gone", SERVE_MS_MAX).catch((error) =>
      this.explain(new Error(`${error.message}: ${left.join(", ")}`)),
    );
  }

  async explain(error: Error): Promise<never> {
    const { stdout } = await this.bed.plane.kubectl(["get", "pods,rgroup,nodes", "-o", "wide"]);
    const said = [...this.running, ...this.#gateways.keys()].map(
      (id) => `${id}: ${this.said(id).slice(-SAID_CHARS_MAX)}`,
    );
    throw new Error(`${error.message}\n${stdout}\n${said.join("\n")}`, { cause: error });
  }
}

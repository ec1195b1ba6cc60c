// A large cluster on a real control plane, for the bench: etcd, API server and scheduler as Kubernetes ships them, nodes and
// pods of others written through the API. No kubelet and no controller manager: nobody renews leases of these nodes, so its
// controllers would take them for dead and evict everything. What it would have made first (service accounts, nodes without
// the taint of a newcomer) is written here. Pods of others are bound from their creation on and have no status.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { z } from "zod";
import { LABELS } from "../../controller/api/meta.ts";
import type { KubeObject, Resource } from "../../controller/kube/api/client.ts";
import * as known from "../../controller/kube/api/resources.ts";
import { podFacts } from "../../controller/kube/inventory/pod-facts.ts";
import { whyNoControlPlane } from "../cluster/controlplane/binary.ts";
import { ApiRefusal, type Ask, type Thing } from "../cluster/controlplane/raw-api.ts";
import { API_PORT, type ControlPlane, startControlPlane } from "../cluster/controlplane/start.ts";
import { installCrds } from "../cluster/kubelet/controller.ts";
import { NS, nodeOf, strangerOf, TEAMS } from "./cluster-objects.ts";
import { kubeconfigFor, type World } from "./cluster-world.ts";
import { cpuSeconds, memoryMb } from "./process-cost.ts";

/** Writes at a time while the cluster is filled. */
const WRITERS = 32;
const TRIES_MAX = 6;
const PAUSE_MS = 1_000;
const PAGE_ITEMS = 500;
const SAY_EACH = 10_000;
const TOKEN_SECONDS = 6 * 3600;
const ANSWER_MS_MAX = 30_000;
const WATCHES_FAILED_MAX = 20;

const Page = z.looseObject({
  metadata: z.looseObject({ continue: z.string().optional() }),
  items: z.array(z.looseObject({ metadata: z.looseObject({ name: z.string() }) })),
});
const Version = z.looseObject({ gitVersion: z.string() });
const TokenAnswer = z.looseObject({ status: z.looseObject({ token: z.string() }) });

export class RealWorld implements World {
  readonly title: string;
  readonly #plane: ControlPlane;
  #kubeconfig = "";
  /** Of bound pods of gangs, by namespace and name. */
  readonly #gpus = new Map<string, number>();
  readonly #closing = new AbortController();
  #watching: Promise<void> = Promise.resolve();
  #failure: unknown;

  private constructor(plane: ControlPlane, version: string) {
    this.#plane = plane;
    this.title = `Kubernetes ${version}; bound by kube-scheduler`;
  }

  /** Throws where no control plane can run on this machine. */
  static async open(): Promise<RealWorld> {
    const why = whyNoControlPlane();
    if (why !== undefined) throw new Error(`--server real: no control plane can run here: ${why}`);
    const dir = mkdtempSync(join(tmpdir(), "muster-bench-plane-"));
    const plane = await startControlPlane({ dir, followers: ["kube-scheduler"] });
    const { gitVersion } = Version.parse(await plane.api.ask({ method: "GET", path: "/version" }));
    return new RealWorld(plane, gitVersion);
  }

  get kubeconfig(): string {
    return this.#kubeconfig;
  }

  get placedGpus(): number {
    if (this.#failure !== undefined) throw this.#failure;
    return [...this.#gpus.values()].reduce((sum, each) => sum + each, 0);
  }

  async fill(nodes: number, strangers: number): Promise<void> {
    const plane = this.#plane;
    await installCrds({ plane });
    const names = [NS, ...Array.from({ length: TEAMS }, (_, index) => `team-${index}`)];
    for (const name of names) {
      await this.create(known.namespaces, { apiVersion: "v1", kind: "Namespace", metadata: { name } });
      await this.#account(name, "default");
    }
    await this.#account(NS, "muster-worker");
    this.#kubeconfig = await this.#controllersKubeconfig();
    await inTurn(nodes, (index) => this.#addNode(nodeOf(index)));
    await inTurn(strangers, async (index) => {
      await this.create(known.pods, strangerOf(index, nodes));
      if ((index + 1) % SAY_EACH === 0) console.log(`${index + 1} pods of others are written; ${this.costs()}`);
    });
    this.#watching = this.#watchPods().catch((error: unknown) => {
      this.#failure = error;
    });
  }

  async create(resource: Resource, object: KubeObject): Promise<void> {
    await this.#write({ method: "POST", path: pathOf(resource, object.metadata.namespace), body: object });
  }

  async *objects(resource: Resource): AsyncIterable<KubeObject> {
    let next = "";
    do {
      const path = `${pathOf(resource)}?limit=${PAGE_ITEMS}${next && `&continue=${encodeURIComponent(next)}`}`;
      const page = Page.parse(await this.#plane.api.ask({ method: "GET", path }));
      for (const item of page.items) yield { apiVersion: resource.version, kind: resource.kind, ...item };
      next = page.metadata.continue ?? "";
    } while (next !== "");
  }

  inside(command: string, args: readonly string[]) {
    return this.#plane.space.inside(command, args);
  }

  async answerOf(port: number, path: string): Promise<string> {
    const target = { address: "127.0.0.1", port, path };
    return (await this.#plane.space.get(target, AbortSignal.timeout(ANSWER_MS_MAX))).body;
  }

  costs(): string {
    const parts = [...this.#plane.processes.children].flatMap(([id, seen]) =>
      seen.state === "running" ? [`${id} ${cpuSeconds(seen.pid).toFixed(0)} s ${memoryMb(seen.pid, "VmRSS")} MB`] : [],
    );
    return parts.join(", ");
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#watching;
    await this.#plane.stop();
  }

  /** Rights of an administrator, but heard under priority and fairness as any controller is (system:masters is not). */
  async #controllersKubeconfig(): Promise<string> {
    const name = "muster-controller";
    await this.#account(NS, name);
    const group = "rbac.authorization.k8s.io";
    await this.#write({
      method: "POST",
      path: `/apis/${group}/v1/clusterrolebindings`,
      body: {
        metadata: { name },
        roleRef: { apiGroup: group, kind: "ClusterRole", name: "cluster-admin" },
        subjects: [{ kind: "ServiceAccount", name, namespace: NS }],
      },
    });
    const answer = await this.#plane.api.ask({
      method: "POST",
      path: `/api/v1/namespaces/${NS}/serviceaccounts/${name}/token`,
      body: { spec: { expirationSeconds: TOKEN_SECONDS } },
    });
    const server = `https://127.0.0.1:${API_PORT}`;
    const authority = Buffer.from(this.#plane.ca).toString("base64");
    const { token } = TokenAnswer.parse(answer).status;
    return kubeconfigFor({ server, "certificate-authority-data": authority }, token);
  }

  async #account(namespace: string, name: string): Promise<void> {
    await this.#write({
      method: "POST",
      path: `/api/v1/namespaces/${namespace}/serviceaccounts`,
      body: { metadata: { name } },
    });
  }

  /** A newcomer is tainted by admission until somebody sees that it is ready. */
  async #addNode(node: KubeObject): Promise<void> {
    await this.create(known.nodes, node);
    const path = `/api/v1/nodes/${node.metadata.name}`;
    await this.#write({ method: "PATCH", path, patch: "merge-patch", body: { spec: { taints: null } } });
  }

  /** Until it has happened: what is not answered may have been done, and then it is there already. */
  async #write(ask: Ask): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      try {
        await this.#plane.api.ask(ask);
        return;
      } catch (error) {
        const code = error instanceof ApiRefusal ? error.code : 0;
        if (code === 409 && attempt > 1) return;
        if ((code >= 400 && code < 500 && code !== 429) || attempt === TRIES_MAX) throw error;
        await new Promise((done) => setTimeout(done, PAUSE_MS * attempt));
      }
    }
  }

  async #watchPods(): Promise<void> {
    const path = `/api/v1/pods?labelSelector=${encodeURIComponent(LABELS.group)}`;
    const hear = {
      whole: (things: Thing[]) => {
        this.#gpus.clear();
        for (const thing of things) this.#see("ADDED", thing);
      },
      changed: (type: string, thing: Thing) => this.#see(type, thing),
    };
    let failed = 0;
    while (!this.#closing.signal.aborted) {
      try {
        await this.#plane.api.follow(path, hear, this.#closing.signal);
      } catch (error) {
        failed += 1;
        if (this.#closing.signal.aborted) return;
        if (failed > WATCHES_FAILED_MAX) throw error;
        await new Promise((done) => setTimeout(done, PAUSE_MS));
      }
    }
  }

  #see(type: string, thing: Thing): void {
    const { node, gpus, name, namespace } = podFacts({ apiVersion: "v1", kind: "Pod", ...thing });
    const key = `${namespace}/${name}`;
    if (type === "DELETED" || node === "") this.#gpus.delete(key);
    else this.#gpus.set(key, gpus);
  }
}

function pathOf({ group, version, plural }: Resource, namespace?: string): string {
  const root = group === "" ? `/api/${version}` : `/apis/${group}/${version}`;
  return namespace === undefined ? `${root}/${plural}` : `${root}/namespaces/${namespace}/${plural}`;
}

/** All of `count`, WRITERS at a time. */
async function inTurn(count: number, work: (index: number) => Promise<void>): Promise<void> {
  let next = 0;
  const writer = async () => {
    while (next < count) await work(next++);
  };
  await Promise.all(Array.from({ length: WRITERS }, writer));
}

// A large cluster for the bench, as its controller is to see it. Owns what a world is, and the one of an API server in memory
// behind a real socket, with a scheduler that binds what may be bound. Nothing runs in any pod. The other is cluster-real.ts.
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { KubeObject, Resource } from "../../controller/kube/api/client.ts";
import * as known from "../../controller/kube/api/resources.ts";
import { podFacts } from "../../controller/kube/inventory/pod-facts.ts";
import { SimApiServer } from "../sim/api-server.ts";
import { SimHttpServer } from "../sim/http-server.ts";
import { seatOf } from "../sim/scheduling.ts";
import { realTime } from "../sim/virtual-time.ts";
import { NS, nodeOf, strangerOf } from "./cluster-objects.ts";

export interface World {
  /** Which API server it is, and who binds pods; a cell of the row. */
  readonly title: string;
  /** Path of the controller's. */
  readonly kubeconfig: string;
  /** GPUs of gangs' pods that are bound. Throws where it is not known any more. */
  readonly placedGpus: number;
  fill(nodes: number, strangers: number): Promise<void>;
  create(resource: Resource, object: KubeObject): Promise<void>;
  /** The truth, read from the server. */
  objects(resource: Resource): AsyncIterable<KubeObject>;
  /** Command line of a process that reaches the server. */
  inside(command: string, args: readonly string[]): { command: string; args: readonly string[] };
  /** Body of a GET at a loopback port of such a process. */
  answerOf(port: number, path: string): Promise<string>;
  /** What the cluster's own processes have used so far, for a person. */
  costs(): string;
  close(): Promise<void>;
}

const resources = Object.values(known).filter((value) => typeof value === "object");
const { signal: never } = new AbortController();

export class SimWorld implements World {
  readonly title = "in memory";
  readonly kubeconfig: string;
  placedGpus = 0;
  readonly #server: SimApiServer;
  readonly #http: SimHttpServer;

  private constructor(server: SimApiServer, http: SimHttpServer) {
    this.#server = server;
    this.#http = http;
    this.kubeconfig = kubeconfigFor({ server: http.url }, "none");
  }

  static async open(): Promise<SimWorld> {
    const server = new SimApiServer(realTime);
    const http: SimHttpServer = await SimHttpServer.listen(server, {
      resources,
      intercept: () => {
        // The server keeps every request for its tests; here there are too many.
        http.requests.splice(0);
        return false;
      },
    });
    return new SimWorld(server, http);
  }

  async fill(nodes: number, strangers: number): Promise<void> {
    for (let index = 0; index < nodes; index++) {
      const node = nodeOf(index);
      const made = await this.#server.create(known.nodes, node, never);
      await this.#server.replaceStatus(known.nodes, { ...made, status: node.status }, never);
    }
    for (let index = 0; index < strangers; index++)
      await this.#server.create(known.pods, strangerOf(index, nodes), never);
    this.#server.onChange(({ resource, after }) => {
      if (resource.plural === "pods" && after !== undefined) this.#bind(after);
    });
  }

  async create(resource: Resource, object: KubeObject): Promise<void> {
    await this.#server.create(resource, object, never);
  }

  async *objects(resource: Resource): AsyncIterable<KubeObject> {
    yield* this.#server.objects(resource);
  }

  inside(command: string, args: readonly string[]) {
    return { command, args };
  }

  async answerOf(port: number, path: string): Promise<string> {
    return await (await fetch(`http://127.0.0.1:${port}${path}`)).text();
  }

  costs(): string {
    const { user, system } = process.cpuUsage();
    return `the API server in this process ${((user + system) / 1e6).toFixed(0)} s`;
  }

  async close(): Promise<void> {
    await this.#http.close();
  }

  /** The scheduler: a seat is a node's name, and nobody else is there who could take it. */
  #bind(pod: KubeObject): void {
    const { node, gates, isLeaving, gpus } = podFacts(pod);
    const seat = seatOf(pod);
    if (node !== "" || gates.length > 0 || isLeaving || seat === undefined) return;
    setImmediate(async () => {
      const { name, namespace } = pod.metadata;
      await this.#server.patch(known.pods, name, namespace, { spec: { nodeName: seat } }, { type: "merge" }, never);
      this.placedGpus += gpus;
    });
  }
}

/** Path of a kubeconfig, in a folder of its own; `cluster`: its entry of that name. */
export function kubeconfigFor(cluster: Readonly<Record<string, string>>, token: string): string {
  const path = join(mkdtempSync(join(tmpdir(), "muster-bench-")), "config");
  const config = {
    apiVersion: "v1",
    kind: "Config",
    "current-context": "bench",
    clusters: [{ name: "bench", cluster }],
    users: [{ name: "bench", user: { token } }],
    contexts: [{ name: "bench", context: { cluster: "bench", user: "bench", namespace: NS } }],
  };
  writeFileSync(path, JSON.stringify(config), { mode: 0o600 });
  return path;
}

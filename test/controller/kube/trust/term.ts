// One term of a controller's trust for tests: a simulated API server, stores as reflectors fill them, pods as controller and
// kubelet make them, the service on a port of loopback. Certificates are checked by real TLS, so that the clock is of today.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { onTestFinished } from "vitest";
import type { KubeApi, KubeObject } from "../../../../controller/kube/api/client.ts";
import { type WorkerIdentity, workerPod } from "../../../../controller/kube/groups/pods.ts";
import { type ControllerTrust, openTrust, type TrustOptions } from "../../../../controller/kube/trust/open.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { until } from "../../../until.ts";
import { identity, replicaGroup, TEMPLATE } from "../groups/groups.ts";
import { ClusterKeys } from "./cluster-keys.ts";

export const RELEASE = "muster";
export const { signal } = new AbortController();

export const storesNow = () => {
  const stores = { pods: new Store(), groups: new Store(), deployments: new Store(), pools: new Store() };
  for (const store of Object.values(stores)) store.replace([], "1");
  return stores;
};

/** `at`: the incarnation of the record. */
export function groupAt(name: string, at: number, namespace = "models"): KubeObject {
  const { metadata, ...group } = replicaGroup(name, namespace);
  const record = { incarnation: at, revision: "r", begun: true, failures: [], restarts: 0 };
  return { ...group, metadata: { ...metadata, resourceVersion: "10" }, status: { record } };
}

/** As it runs; `changes` are of the whole object. */
export function workerRunning(
  changes: Partial<WorkerIdentity> = {},
  ip = "10.244.1.5",
): KubeObject & { spec: { serviceAccountName: string } } {
  const pod = workerPod(identity(changes), TEMPLATE);
  const metadata = { ...pod.metadata, uid: `uid-${pod.metadata.name}`, resourceVersion: "10" };
  const spec = { ...(typeof pod.spec === "object" ? pod.spec : {}), serviceAccountName: TEMPLATE.serviceAccountName };
  return { ...pod, metadata, spec, status: { phase: "Running", podIP: ip } };
}

export const gatewayRunning = (namespace = RELEASE, serviceAccountName = "muster-gateway") => ({
  apiVersion: "v1",
  kind: "Pod",
  metadata: { name: "muster-gateway-7f", namespace, uid: "uid-gateway", resourceVersion: "10" },
  spec: { serviceAccountName, containers: [] },
  status: { phase: "Running", podIP: "10.244.2.2" },
});

export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  const bound = server.address();
  await new Promise((done) => server.close(done));
  if (bound === null || typeof bound === "string") throw new Error("a server listens on a port");
  return bound.port;
}

export class TrustTerm {
  readonly time: VirtualClock;
  readonly server: SimApiServer;
  readonly stores = storesNow();
  readonly keys: ClusterKeys;
  readonly enrol: string;
  readonly troubles: string[] = [];
  readonly news: string[] = [];
  readonly opened: ControllerTrust;
  readonly #stop = new AbortController();
  readonly #ended: Promise<void>;

  private constructor(parts: {
    time: VirtualClock;
    server: SimApiServer;
    api: KubeApi;
    keys: ClusterKeys;
    enrol: string;
    opened: ControllerTrust;
    said: Said;
  }) {
    this.time = parts.time;
    this.server = parts.server;
    this.keys = parts.keys;
    this.enrol = parts.enrol;
    this.opened = parts.opened;
    this.troubles = parts.said.troubles;
    this.news = parts.said.news;
    this.#ended = parts.opened.part({ api: parts.api, stores: this.stores, term: { signal: this.#stop.signal } });
    this.#ended.catch(() => {});
  }

  static async begin(
    options: Partial<TrustOptions> & { server?: SimApiServer; time?: VirtualClock; keys?: ClusterKeys } = {},
  ): Promise<TrustTerm> {
    const time = options.time ?? new VirtualClock(Date.now());
    const server = options.server ?? new SimApiServer(time);
    const api = options.api ?? server;
    const keys = options.keys ?? (await ClusterKeys.make());
    const enrol = `127.0.0.1:${await freePort()}`;
    const said: Said = { troubles: [], news: [] };
    const opened = await openTrust(
      {
        readDocument: keys.read,
        clock: time,
        random: () => 0.5,
        namespace: RELEASE,
        pod: { name: "muster-controller-1", uid: "uid-controller", ip: "127.0.0.1" },
        dns: ["localhost"],
        enrol,
        onTrouble: (detail) => said.troubles.push(detail),
        onNews: (detail) => said.news.push(detail),
        ...options,
        api,
      },
      signal,
    );
    const term = new TrustTerm({ time, server, api, keys, enrol, opened, said });
    onTestFinished(() => term.end());
    return term;
  }

  async end(): Promise<void> {
    this.#stop.abort();
    await this.#ended;
  }

  /** Lets virtual time pass until it is so. */
  async till(isTrue: () => boolean, what: string, stepMs = 1_000): Promise<void> {
    await until(async () => {
      if (isTrue()) return true;
      await this.time.runFor(stepMs);
      return isTrue();
    }, what);
  }

  /** The identity folder of a pod. */
  folder(token: string, bundle: string): string {
    const folder = mkdtempSync(join(tmpdir(), "muster-identity-"));
    onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
    writeFileSync(join(folder, "token"), token);
    writeFileSync(join(folder, "ca.crt"), bundle);
    return folder;
  }
}

type Said = { troubles: string[]; news: string[] };

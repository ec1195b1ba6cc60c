// Who of an installation may talk to whom, judged from the rendered NetworkPolicies: the edges that exist are open, all others
// between its pods are closed. And the one server whose configuration the chart writes, run with it.
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { connect, type NatsConnection } from "@nats-io/transport-node";
import { describe, expect, test } from "vitest";
import { z } from "zod";
import { workerPod } from "../../../controller/kube/groups/pods.ts";
import { findNatsServer } from "../../../controller/local/nats.ts";
import { type Connection, type End, type PodEnd, Policies, podEndOf } from "../../charts/policies.ts";
import {
  deploymentOf,
  find,
  podOf,
  RELEASE_NAMESPACE,
  type Rendered,
  render,
  type Values,
} from "../../charts/render.ts";
import { identity, replicaGroup, TEMPLATE } from "../../controller/kube/groups/groups.ts";
import { until } from "../../until.ts";
import { BUILD_TIMEOUT_MS, whyNoControlPlane } from "../controlplane/binary.ts";

const why = whyNoControlPlane();
const TLS = join(import.meta.dirname, "../../controller/kube/api/tls");
const REDIS = { redis: { enabled: true, passwordSecret: "queue" } };
const NAMED = { "kubernetes.io/metadata.name": "monitoring" };

/** A worker's pod as the controller builds it. */
function workerOf(namespace: string, name: string, ip: string): PodEnd {
  const pod = workerPod(identity({ group: replicaGroup(name, namespace) }), TEMPLATE);
  return podEndOf({ ...pod, status: { podIP: ip } });
}

function worldOf(objects: readonly Rendered[]) {
  const stranger = { kind: "pod", namespace: "elsewhere", name: "app", labels: { app: "x" }, ip: "10.1.9.1" } as const;
  const ends = {
    controller: podOf(objects, "muster-controller", "10.1.0.1"),
    gateway: podOf(objects, "muster-gateway", "10.1.0.3"),
    nats: podOf(objects, "muster-nats", "10.1.0.4"),
    redis: podOf(objects, "muster-redis", "10.1.0.5"),
    leader: workerOf("team-a", "chat-g0", "10.1.1.1"),
    follower: workerOf("team-a", "chat-g0", "10.1.1.2"),
    near: workerOf(RELEASE_NAMESPACE, "nano-g0", "10.1.2.1"),
    stranger,
    prometheus: { ...stranger, namespace: "monitoring", name: "prometheus", ip: "10.1.9.2" },
    dns: { ...stranger, namespace: "kube-system", name: "dns", labels: { "k8s-app": "kube-dns" }, ip: "10.1.9.3" },
    ours: { ...stranger, namespace: RELEASE_NAMESPACE, name: "new", labels: { "app.kubernetes.io/name": "muster" } },
    node: { kind: "node", name: "n", ip: "192.168.0.2" },
    client: { kind: "address", ip: "198.51.100.7" },
    apiServer: { kind: "address", ip: "10.0.0.1" },
    hub: { kind: "address", ip: "203.0.113.9" },
  } satisfies Record<string, End>;
  return ends;
}
type World = ReturnType<typeof worldOf>;
type Edge = readonly [keyof World, keyof World, number];

const WORKERS = ["leader", "follower", "near"] as const;
const ALL = ["controller", "gateway", "nats", "redis", ...WORKERS] as const;
const OPEN: readonly Edge[] = [
  ...(["client", "stranger"] as const).flatMap((from): Edge[] => [
    [from, "gateway", 8080],
    [from, "gateway", 8081],
  ]),
  ...[7441, 7442].flatMap((port): Edge[] => [
    ["gateway", "controller", port],
    ...WORKERS.map((worker): Edge => [worker, "controller", port]),
  ]),
  ...WORKERS.flatMap((worker): Edge[] => [
    ["gateway", worker, 7440],
    ["controller", worker, 7440],
    [worker, "nats", 4222],
    [worker, "hub", 443],
  ]),
  ["leader", "follower", 7440],
  ["follower", "leader", 7440],
  ["leader", "follower", 41_234], // collectives
  ["controller", "hub", 443],
  ["gateway", "redis", 6379],
  ...(["controller", "gateway"] as const).flatMap((from): Edge[] => [
    [from, "apiServer", 443],
    [from, "apiServer", 6443],
  ]),
  // Probes.
  ["node", "controller", 7443],
  ["node", "gateway", 8080],
  ["node", "nats", 8222],
];
const PORTS = [53, 443, 4222, 6379, 6443, 7440, 7441, 7442, 7443, 8080, 8081, 8222, 41_234];

describe.skipIf(why !== undefined)(
  `edges of an installation${why ? ` (skipped: ${why})` : ""}`,
  { timeout: BUILD_TIMEOUT_MS },
  () => {
    async function installed(values: Values = {}) {
      const objects = await render({ ...REDIS, workloadNamespaces: ["team-a"], ...values });
      const policies = new Policies(objects.filter(({ kind }) => kind === "NetworkPolicy"));
      const world = worldOf(objects);
      const of = ([from, to, port]: Edge): Connection => ({ from: world[from], to: world[to], port });
      return { policies, world, of };
    }
    const names = (edges: readonly Edge[]) => edges.map((edge) => edge.join(" ")).toSorted();

    test("the edges that exist are open", async () => {
      const { policies, of } = await installed();
      expect(policies.refused(OPEN.map(of))).toEqual([]);
    });

    test("everybody resolves names", async () => {
      const { policies, world } = await installed();
      const asks = ALL.flatMap((from) =>
        (["UDP", "TCP"] as const).map((protocol) => ({ from: world[from], to: world.dns, port: 53, protocol })),
      );
      expect(policies.refused(asks)).toEqual([]);
    });

    test("with the API server's address given, no other pair and port is open", async () => {
      const { policies, of } = await installed({ networkPolicy: { apiServer: { cidrs: ["10.0.0.1/32"] } } });
      const isGroup = (name: string) => name === "leader" || name === "follower";
      const open = new Set(names(OPEN));
      const others = [...ALL, "stranger", "apiServer", "hub"] as const;
      const strays = [...ALL, "stranger", "client"] as const;
      const pairs = strays.flatMap((from) => others.flatMap((to) => PORTS.map((port): Edge => [from, to, port])));
      const closed = pairs.filter(
        ([from, to, port]) =>
          from !== to &&
          [from, to].some((end) => ALL.some((name) => name === end)) &&
          !(isGroup(from) && isGroup(to)) && // any port
          !open.has(`${from} ${to} ${port}`),
      );
      expect(closed.length).toBeGreaterThan(700);
      expect(names(closed.filter((edge) => policies.judge(of(edge)).isAllowed))).toEqual([]);
    });

    test("named one by one: what must be refused", async () => {
      const { policies, of } = await installed();
      const closed: readonly Edge[] = [
        ["gateway", "nats", 4222],
        ["controller", "nats", 4222],
        ["client", "leader", 7440],
        ["stranger", "leader", 7440],
        ["stranger", "nats", 4222],
        ["stranger", "controller", 7441],
        ["stranger", "redis", 6379],
        ["leader", "apiServer", 443],
        ["leader", "apiServer", 6443],
        ["leader", "near", 7440],
        ["leader", "gateway", 8080],
        ["leader", "redis", 6379],
        ["nats", "hub", 443],
        ["prometheus", "controller", 7443],
        ["ours", "hub", 443],
        ["stranger", "ours", 80],
      ];
      expect(names(closed.filter((edge) => policies.judge(of(edge)).isAllowed))).toEqual([]);
    });

    test("values narrow and open: clients, monitoring, the API server's addresses, pulls", async () => {
      const { policies, of } = await installed({
        networkPolicy: {
          clients: [{ namespaceSelector: { matchLabels: { "kubernetes.io/metadata.name": "elsewhere" } } }],
          monitoring: [{ namespaceSelector: { matchLabels: NAMED } }],
          apiServer: { cidrs: ["10.0.0.1/32"] },
          pulls: { enabled: false },
        },
      });
      const open: readonly Edge[] = [
        ["stranger", "gateway", 8080],
        ["prometheus", "controller", 7443],
        ["prometheus", "gateway", 8080],
        ["controller", "apiServer", 443],
      ];
      expect(policies.refused(open.map(of))).toEqual([]);
      const closed: readonly Edge[] = [
        ["client", "gateway", 8080],
        ["prometheus", "gateway", 8081],
        ["prometheus", "nats", 8222],
        ["controller", "hub", 443],
        ["leader", "hub", 443],
      ];
      expect(names(closed.filter((edge) => policies.judge(of(edge)).isAllowed))).toEqual([]);
    });

    test("every pod of it is closed but for its rules; switched off, no policy is there", async () => {
      const { policies, world } = await installed();
      for (const name of [...ALL, "ours"] as const)
        for (const type of ["Ingress", "Egress"] as const)
          expect(policies.isIsolated(world[name], type), `${name} ${type}`).toBe(true);
      const off = await render({ networkPolicy: { enabled: false } });
      expect(off.some(({ kind }) => kind === "NetworkPolicy")).toBe(false);
    });

    test("a real nats-server with the rendered configuration takes a certificate and the password, and nothing less", async () => {
      const objects = await render();
      const { container } = deploymentOf(objects, "muster-nats");
      const { data } = z
        .looseObject({ data: z.record(z.string(), z.string()) })
        .parse(find(objects, "ConfigMap", "muster-nats"));
      const token = "9e3f00c4d2a1b7"; // begins as a number does
      await withNats({ config: data["nats.conf"] ?? "", args: container.args, token }, async ({ url, tls }) => {
        const user = { servers: url, user: "muster", pass: token, reconnect: false };
        const caFile = tls.ca;
        const own = { caFile, certFile: tls.cert, keyFile: tls.key };
        const connection = await connect({ ...user, tls: own });
        const heard = connection.subscribe("kv.v1.a", { max: 1 });
        connection.publish("kv.v1.a", "x");
        for await (const message of heard) expect(message.string()).toBe("x");
        await connection.close();
        await expect(tried({ ...user, tls: { caFile } })).rejects.toThrow(/certificate|closed|reset|SSL/i);
        await expect(tried({ ...user, pass: "other", tls: own })).rejects.toThrow(/authorization/i);
        await expect(tried({ servers: url, reconnect: false, tls: own })).rejects.toThrow(/authorization/i);
      });
    });
  },
);

async function tried(options: Parameters<typeof connect>[0]): Promise<void> {
  const connection: NatsConnection = await connect({ ...options, timeout: 5_000 });
  await connection.close();
}

type NatsWish = { config: string; args: readonly string[]; token: string };
type NatsSeen = { url: string; tls: { ca: string; cert: string; key: string } };

/** Runs it on loopback with a free port, and certificates of the tests in place of the mounted ones. */
async function withNats({ config, args, token }: NatsWish, use: (seen: NatsSeen) => Promise<void>): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "muster-nats-"));
  const file = findNatsServer();
  if (file === undefined) throw new Error("no nats-server on this machine: run `npm run setup`");
  const tls = { ca: join(TLS, "ca.pem"), cert: join(TLS, "client-a.pem"), key: join(TLS, "client-a.key") };
  const mounted = { "tls.crt": join(TLS, "server.pem"), "tls.key": join(TLS, "server.key"), "ca.crt": tls.ca };
  let text = config;
  for (const [name, path] of Object.entries(mounted)) text = text.replace(`/etc/muster-nats/${name}`, path);
  writeFileSync(join(folder, "nats.conf"), text.replace("http_port: 8222", "http_port: -1"));
  const paths: Record<string, string> = { "/etc/nats/nats.conf": join(folder, "nats.conf"), "0.0.0.0": "127.0.0.1" };
  const own = [...args.map((word) => paths[word] ?? word), "--port", "-1"];
  const server = spawn(file, own, { env: { MUSTER_NATS_TOKEN: token }, stdio: ["ignore", "ignore", "pipe"] });
  let said = "";
  server.stderr.on("data", (chunk: Buffer) => {
    said += chunk.toString();
  });
  const ended = new Promise((done) => server.on("close", done));
  try {
    const isUp = async () => {
      if (server.exitCode !== null) throw new Error(`nats-server has ended: ${said}`);
      return /Server is ready/.test(said);
    };
    await until(isUp, "nats-server is ready");
    const port = /Listening for client connections on 127\.0\.0\.1:(\d+)/.exec(said)?.[1];
    expect(said).toContain("TLS required for client connections");
    await use({ url: `tls://127.0.0.1:${port}`, tls });
  } finally {
    server.kill();
    await ended;
    rmSync(folder, { recursive: true, force: true });
  }
}

// Cluster addresses of Services, as kube-proxy gives them: listens on each one inside the namespace and joins a caller to one
// ready endpoint, in turn. A process of its own in the namespace; TCP only. The endpoint does not see the caller's address: who
// was joined to whom is said on standard output, `CALLER SERVICE:PORT ENDPOINT:PORT`.
//
//   V2  endpoints are looked up for each connection: a pod that has just become unready gets no new one.
//
//   node service-proxy.ts ACCESS        ACCESS: JSON file {url, ca, token} of the API server as seen in the namespace
import { readFileSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { z } from "zod";
import { RawApi, type Thing } from "../controlplane/raw-api.ts";
import { API_PORT } from "../controlplane/start.ts";
import { pause } from "./probe.ts";

const RETRY_MS = 300;
const SERVICE_LABEL = "kubernetes.io/service-name";
const Service = z.looseObject({
  spec: z.looseObject({
    clusterIP: z.string().default(""),
    ports: z
      .array(z.looseObject({ name: z.string().default(""), port: z.int(), protocol: z.string().default("TCP") }))
      .default([]),
  }),
});
const Slice = z.looseObject({
  ports: z.array(z.looseObject({ name: z.string().nullish(), port: z.int().nullish() })).nullish(),
  endpoints: z
    .array(
      z.looseObject({
        addresses: z.array(z.string()),
        conditions: z.looseObject({ ready: z.boolean().optional() }).default({}),
      }),
    )
    .nullish(),
});

type Target = { address: string; port: number };

/** Where a Service's port leads now. */
export function targetsOf(
  wanted: { namespace: string; service: string; port: string },
  slices: readonly Thing[],
): Target[] {
  // The API server keeps no endpoints for its own Service here: every pod shares its loopback.
  if (wanted.namespace === "default" && wanted.service === "kubernetes")
    return [{ address: "127.0.0.1", port: API_PORT }];
  return slices
    .filter(
      ({ metadata }) => metadata.namespace === wanted.namespace && metadata.labels[SERVICE_LABEL] === wanted.service,
    )
    .flatMap((slice) => {
      const { ports, endpoints } = Slice.parse(slice);
      const port = ports?.find(({ name }) => (name ?? "") === wanted.port)?.port;
      const ready = (endpoints ?? []).filter(({ conditions }) => conditions.ready !== false);
      return port ? ready.flatMap(({ addresses }) => addresses.map((address) => ({ address, port }))) : [];
    });
}

function serve(api: RawApi): void {
  const services = new Map<string, Thing>();
  const slices = new Map<string, Thing>();
  const servers = new Map<string, Server>();
  let turn = 0;

  const join = (caller: Socket, wanted: Parameters<typeof targetsOf>[0]) => {
    const targets = targetsOf(wanted, [...slices.values()]);
    const target = targets[turn++ % Math.max(1, targets.length)];
    caller.on("error", () => caller.destroy());
    if (!target) return void caller.resetAndDestroy(); // nobody is ready
    const { remoteAddress = "", localAddress = "", localPort = 0 } = caller;
    process.stdout.write(`${remoteAddress} ${localAddress}:${localPort} ${target.address}:${target.port}\n`);
    const far = connect({ host: target.address, port: target.port, allowHalfOpen: true, noDelay: true });
    far.on("error", () => caller.resetAndDestroy());
    far.on("close", () => caller.destroySoon());
    caller.on("close", () => far.destroySoon());
    caller.pipe(far);
    far.pipe(caller);
  };

  const sync = () => {
    const wanted = new Map<string, () => Server>();
    for (const thing of services.values()) {
      const { clusterIP, ports } = Service.parse(thing).spec;
      if (clusterIP === "" || clusterIP === "None") continue;
      const { namespace, name } = thing.metadata;
      for (const { name: port, port: number, protocol } of ports) {
        if (protocol !== "TCP") continue;
        wanted.set(`${namespace}/${name} ${clusterIP}:${number}`, () =>
          createServer({ allowHalfOpen: true, noDelay: true }, (caller) =>
            join(caller, { namespace, service: name, port }),
          ).listen(number, clusterIP),
        );
      }
    }
    for (const [key, server] of servers) {
      if (wanted.has(key)) continue;
      server.close();
      servers.delete(key);
    }
    for (const [key, open] of wanted) if (!servers.has(key)) servers.set(key, open());
  };

  void keep(api, "/api/v1/services", services, sync);
  void keep(api, "/apis/discovery.k8s.io/v1/endpointslices", slices, () => {});
}

/** Keeps `things` as the API server has them, for ever; while it is away they stay as they were. */
async function keep(api: RawApi, path: string, things: Map<string, Thing>, changed: () => void): Promise<void> {
  const never = new AbortController().signal;
  const hear = {
    whole: (all: Thing[]) => {
      things.clear();
      for (const thing of all) things.set(thing.metadata.uid, thing);
      changed();
    },
    changed: (type: string, thing: Thing) => {
      if (type === "DELETED") things.delete(thing.metadata.uid);
      else things.set(thing.metadata.uid, thing);
      changed();
    },
  };
  for (;;) {
    await api.follow(path, hear, never).catch(() => undefined);
    await pause(RETRY_MS, never);
  }
}

if (process.argv[1]?.endsWith("service-proxy.ts")) {
  const access = z.object({ url: z.string(), ca: z.string(), token: z.string() });
  serve(new RawApi(access.parse(JSON.parse(readFileSync(process.argv[2] ?? "", "utf8")))));
  process.stdin.resume();
  process.stdin.on("close", () => process.exit(0));
}

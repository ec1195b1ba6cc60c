// The broker's links: a real nats-server with the certificate that the controller would give it, and clients with and without.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { type ConnectionOptions, connect } from "@nats-io/transport-node";
import { expect, onTestFinished, test } from "vitest";
import { type Authority, bundleOf } from "../../controller/kube/trust/authority.ts";
import { NATS_USER } from "../../controller/kube/trust/secrets.ts";
import { MutualTrust } from "../../proto/trust.ts";
import { type Bus, natsBus } from "../../worker/spec/bus.ts";
import { NatsServer } from "../nats-server.ts";
import { until } from "../until.ts";
import { authorityNow, materialOf, workerOf } from "./mutual-bed.ts";

const TOKEN = "of-this-test-0123456789";
const CONNECT_MS_MAX = 5_000;
const broker = { role: "nats", namespace: "muster", name: "muster-nats", podUid: "service" } as const;
const leader = workerOf("nano-d-0", "w-1");

/** Starts it with a certificate of this authority, asking for one of it. */
async function startUnder(server: NatsServer, authority: Authority): Promise<void> {
  const { cert, key } = await materialOf(authority, broker);
  const path = (name: string, text: string): string => {
    writeFileSync(join(server.folder, name), text);
    return JSON.stringify(join(server.folder, name));
  };
  const tls = `cert_file: ${path("tls.crt", cert)}, key_file: ${path("tls.key", key)}, ca_file: ${path("ca.crt", bundleOf(authority))}`;
  const users = `users: [{ user: ${NATS_USER}, password: "${TOKEN}" }]`;
  path("nats.conf", `tls { ${tls}, verify: true }\naccounts { MUSTER { ${users} } }\n`);
  await server.start(["-c", join(server.folder, "nats.conf")]);
}

async function serverOf(authority: Authority): Promise<NatsServer> {
  const server = new NatsServer();
  onTestFinished(() => server.end());
  await startUnder(server, authority);
  return server;
}

const urlOf = ({ port }: NatsServer): string => `tls://localhost:${port}`;

function busOf(server: NatsServer, trust: MutualTrust): Bus {
  const bus = natsBus({ url: urlOf(server), user: NATS_USER, token: TOKEN, name: "test", tls: trust.nats() });
  onTestFinished(() => bus.close());
  return bus;
}

/** Publishes until one arrives. */
async function heard(from: Bus, to: Bus, what: string): Promise<void> {
  let count = 0;
  const end = to.subscribe(what, () => {
    count += 1;
  });
  await until(() => {
    from.publish(what, Uint8Array.of(1));
    return count > 0;
  }, `a message on ${what} arrives`);
  end();
}

/** "connected", or why not. */
async function attempt(options: ConnectionOptions): Promise<string> {
  try {
    const connection = await connect({ reconnect: false, timeout: CONNECT_MS_MAX, ...options });
    await connection.close();
    return "connected";
  } catch (error) {
    return `refused: ${error instanceof Error ? error.message : error}`;
  }
}

test("NATS takes the certificate with the password, and nobody who lacks one of the two", async () => {
  const authority = await authorityNow();
  const server = await serverOf(authority);
  const trust = new MutualTrust(await materialOf(authority, leader));
  const [from, to] = [busOf(server, trust), busOf(server, trust)];
  await heard(from, to, "a");
  const own = { servers: urlOf(server), user: NATS_USER, pass: TOKEN };
  expect(await attempt({ ...own, tls: trust.nats() })).toBe("connected");
  const ca = bundleOf(authority);
  const foreign = await materialOf(await authorityNow(), leader);
  const old = await materialOf(authority, leader, 25 * 3_600_000);
  const wrong: [string, ConnectionOptions][] = [
    ["no certificate", { ...own, tls: { ca } }],
    ["a foreign one", { ...own, tls: { ...foreign, ca } }],
    ["an expired one", { ...own, tls: { ...old, ca } }],
    ["in clear", { ...own, servers: urlOf(server).replace("tls:", "nats:"), tls: null }],
    ["no password", { servers: urlOf(server), tls: trust.nats() }],
    ["a wrong password", { ...own, pass: "guessed", tls: trust.nats() }],
    ["a server of an authority that is not ours", { ...own, tls: foreign }],
  ];
  for (const [what, options] of wrong) expect(await attempt(options), what).toContain("refused");
});

test("U3: a bus reconnects with the certificate that was renewed meanwhile", async () => {
  const [former, next] = [await authorityNow(), await authorityNow()];
  const server = await serverOf(former);
  const trust = new MutualTrust(await materialOf(former, leader));
  const [from, to] = [busOf(server, trust), busOf(server, trust)];
  await heard(from, to, "a");
  await server.kill();
  await until(() => !from.isConnected && !to.isConnected, "the loss is seen");
  trust.update(await materialOf(next, leader));
  await startUnder(server, next);
  await heard(from, to, "b");
});

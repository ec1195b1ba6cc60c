import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, onTestFinished, test } from "vitest";
import { Connections } from "../../../../controller/kube/api/connections.ts";
import { kubeconfigCredentials } from "../../../../controller/kube/api/credentials.ts";
import { configMaps } from "../../../../controller/kube/api/resources.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { realTime } from "../../../sim/virtual-time.ts";
import { clientOf, failureOf, serve } from "../beds.ts";

const TLS = join(import.meta.dirname, "tls");

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), "muster-kubeconfig-"));
  onTestFinished(() => rmSync(path, { recursive: true }));
  return path;
}

function kubeconfig(cluster: Record<string, unknown>, user: Record<string, unknown>): string {
  const path = join(folder(), "config");
  const config = {
    apiVersion: "v1",
    kind: "Config",
    "current-context": "here",
    clusters: [{ name: "c", cluster }],
    users: [{ name: "u", user }],
    contexts: [
      { name: "here", context: { cluster: "c", user: "u", namespace: "serving" } },
      { name: "there", context: { cluster: "c", user: "u" } },
    ],
  };
  writeFileSync(path, JSON.stringify(config));
  return path;
}

describe("credentials of a kubeconfig", () => {
  test("a token, a path before /api and the namespace are used as they stand", async () => {
    const server = await serve(new SimApiServer(realTime));
    const path = kubeconfig({ server: server.url }, { token: "t0ken" });
    const credentials = kubeconfigCredentials({ path });
    const api = clientOf(server.url, { connections: new Connections(credentials) });
    await api.list(configMaps, {}, AbortSignal.timeout(10_000));
    expect(server.requests[0]?.headers.authorization).toBe("Bearer t0ken");
    expect(await credentials.namespace()).toBe("serving");
    expect(await kubeconfigCredentials({ path, context: "there" }).namespace()).toBe("default");
    const prefixed = kubeconfigCredentials({ path: kubeconfig({ server: `${server.url}/k8s/c-1/` }, { token: "t" }) });
    const proxied = clientOf(server.url, { connections: new Connections(prefixed), limits: { tries: 1 } });
    await failureOf(proxied.list(configMaps, {}, AbortSignal.timeout(10_000)));
    expect(server.requests[1]?.url).toBe("/k8s/c-1/api/v1/configmaps");
  });

  test("client certificates and the CA come from files, and are read anew", async () => {
    const tls = (name: string) => join(TLS, name);
    const cluster = {
      server: "https://127.0.0.1:1",
      "certificate-authority": tls("ca.pem"),
      "tls-server-name": "localhost",
    };
    const where = folder();
    const path = kubeconfig(cluster, { "client-certificate": join(where, "cert"), "client-key": join(where, "key") });
    const credentials = kubeconfigCredentials({ path });
    writeFileSync(join(where, "cert"), "one");
    writeFileSync(join(where, "key"), "k");
    const first = await credentials.load();
    expect(first.tls).toMatchObject({ cert: Buffer.from("one"), key: Buffer.from("k"), servername: "localhost" });
    expect(first.tls.ca?.toString()).toContain("BEGIN CERTIFICATE");
    writeFileSync(join(where, "cert"), "two");
    expect((await credentials.load()).tls.cert).toEqual(Buffer.from("two"));
  });

  test("what is missing is said, with what there is", async () => {
    const path = kubeconfig({ server: "http://127.0.0.1:1" }, {});
    const error = await failureOf(kubeconfigCredentials({ path, context: "prod" }).load());
    expect(error.message).toContain('no context "prod"; it has here, there');
    expect((await failureOf(kubeconfigCredentials({ path: "/nowhere/config" }).load())).message).toContain(
      "/nowhere/config",
    );
    const proxied = kubeconfig({ server: "https://127.0.0.1:1", "proxy-url": "http://proxy" }, {});
    expect((await failureOf(kubeconfigCredentials({ path: proxied }).load())).message).toContain("proxy-url");
  });
});

// Pods as the process kubelet has them beyond their start: networks of their own and who talks to whom, users, files that follow
// their ConfigMaps, and a checkout that a pod's own /tmp does not hide.

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { parseSockets } from "./connections.ts";
import { sandboxScript } from "./sandbox.ts";

const why = whyNoControlPlane();
const POD_IP = { name: "POD_IP", valueFrom: { fieldRef: { fieldPath: "status.podIP" } } };
const ready = { httpGet: { path: "/health", port: 8080 }, periodSeconds: 1 };
const pod = (name: string, container: Record<string, unknown> = {}, spec: Record<string, unknown> = {}) => ({
  metadata: { name, labels: { app: name } },
  spec: {
    restartPolicy: "Never",
    containers: [{ name: "main", image: "answering:1", env: [POD_IP], readinessProbe: ready, ...container }],
    ...spec,
  },
});
const shell = (script: string) => ({ image: "sh", command: ["sh", "-c", script], readinessProbe: undefined });

test("lines of the kernel's tables: addresses, ports, who listens; IPv4 in IPv6 too", () => {
  const table = `  sl  local_address rem_address   st
   0: 0201F40A:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0201F40A:C000 0302F40A:1F90 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: 0201F40A:C001 0302F40A:1F90 02 00000000:00000000 00:00000000 00000000     0        0 1 1
   3: 0000000000000000FFFF00000201F40A:1F90 0000000000000000FFFF00000302F40A:C002 06 0:0 0:0 0 0 0 1 1
   4: 000080FE00000000FF020A0000000001:1F90 000080FE00000000FF020A0000000002:C002 01 0:0 0:0 0 0 0 1 1`;
  const here = { local: "10.244.1.2" };
  expect(parseSockets(table)).toEqual([
    { ...here, localPort: 8080, remote: "0.0.0.0", remotePort: 0, isListening: true },
    { ...here, localPort: 49_152, remote: "10.244.2.3", remotePort: 8080, isListening: false },
    { ...here, localPort: 8080, remote: "10.244.2.3", remotePort: 49_154, isListening: false },
  ]);
});

test.skipIf(why !== undefined)("a folder that a mount hides stays in view where it is to be kept", () => {
  const folder = mkdtempSync(join(tmpdir(), "muster-keep-"));
  const [kept, volume, view] = ["kept", "volume", "view"].map((name) => join(folder, name));
  for (const each of [kept, volume, view]) spawnSync("mkdir", [each ?? ""]);
  for (const each of ["hosts", "message"]) writeFileSync(join(folder, each), "");
  writeFileSync(join(kept ?? "", "file"), "seen");
  const script = (keep: string[]) =>
    sandboxScript({
      folder: view ?? "",
      hostname: "pod",
      hosts: join(folder, "hosts"),
      message: { source: join(folder, "message"), target: "/dev/termination-log" },
      mounts: [{ source: volume ?? "", target: tmpdir(), isReadOnly: false }],
      workingDir: "/",
      command: ["cat", join(kept ?? "", "file")],
      keep,
    });
  const said = (keep: string[]) =>
    spawnSync("unshare", ["--mount", "--uts", "sh", "-c", script(keep)], { encoding: "utf8" });
  expect(said([])).toMatchObject({ stdout: "", status: 1 });
  expect(said([kept ?? ""])).toMatchObject({ stdout: "seen", status: 0 });
  rmSync(folder, { recursive: true });
});

describe.skipIf(why !== undefined)(`pods with networks of their own${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    bed = await Bed.start({
      nodes: [
        { name: "one", gpus: 0 },
        { name: "two", gpus: 0 },
      ],
      entrypoints: { answering: [process.execPath, join(import.meta.dirname, "answering.ts")] },
      podNetworks: true,
    });
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  test("Y1: connections carry the caller's address, through a Service the caller's and the endpoint's", async () => {
    const front = { selector: { app: "server" }, ports: [{ port: 80, targetPort: 8080 }] };
    await bed.make("/api/v1/namespaces/default/services", { metadata: { name: "front" }, spec: front });
    for (const [name, nodeName] of [
      ["server", "one"],
      ["caller", "two"],
    ] as const)
      await bed.make(POD_PATH, pod(name, {}, { nodeName }));
    const server = await bed.ready("server");
    const caller = await bed.ready("caller");
    const direct = `http://${server.status.podIP}:8080/`;
    expect(JSON.parse(await bed.ask(caller, `/get?url=${encodeURIComponent(direct)}`)).hostname).toBe("server");
    const between = () =>
      bed
        .connections()
        .filter(({ from }) => from.pod?.name === "caller")
        .map(({ to, via }) => ({ pod: to.pod?.name, port: to.port, isService: via !== undefined }));
    expect(between()).toEqual([{ pod: "server", port: 8080, isService: false }]);
    const isServed = async () =>
      (await bed.ask(caller, "/get?url=http%3A%2F%2Ffront%2F")).includes('"hostname":"server"');
    await until(isServed, "the Service answers");
    await until(() => between().length === 2, "the proxy has said so");
    expect(between()[1]).toEqual({ pod: "server", port: 8080, isService: true });
    // Its own account, in its own network: the API server is a Service too.
    expect(await bed.ask(caller, "/whoami")).toContain("system:serviceaccount:default:default");
    const [first] = bed.connections().filter(({ from }) => from.pod?.name === "caller");
    expect(first?.from).toEqual({
      ip: caller.status.podIP,
      pod: { namespace: "default", name: "caller", labels: { app: "caller" } },
    });
    // C2, C4: what the server leaves in the tables is still what it was.
    await until(() => between().some(({ port }) => port === 6443), "the question to the API server is seen");
    const before = between();
    await bed.end("server");
    expect(between()).toEqual(before);
    expect(bed.connections().filter(({ from }) => from.pod?.name === "server")).toEqual([]);
    await bed.end("caller");
  });

  test("a pod's loopback is its own", async () => {
    const env = [{ name: "POD_IP", value: "127.0.0.1" }];
    for (const name of ["left", "right"])
      await bed.make(
        POD_PATH,
        pod(name, {
          env,
          readinessProbe: { exec: { command: ["sh", "-c", "ss -ltn | grep -q :8080"] }, periodSeconds: 1 },
        }),
      );
    for (const name of ["left", "right"]) await bed.ready(name); // both listen on the same address and port
    await bed.end("left", "right");
  });

  test("runAsUser and runAsGroup hold, and the container can write where it may", async () => {
    const script =
      "id -u >/scratch/id && id -g >>/scratch/id && cat /scratch/id >/dev/termination-log; touch /etc/x 2>/dev/null && exit 3; exit 0";
    const volumeMounts = [{ name: "scratch", mountPath: "/scratch" }];
    const spec = {
      volumes: [{ name: "scratch", emptyDir: {} }],
      securityContext: { runAsUser: 65_532, runAsGroup: 7 },
    };
    await bed.make(POD_PATH, pod("plain-user", { ...shell(script), volumeMounts }, spec));
    const ended = await bed.seen("plain-user", "succeeded", ({ status }) => status.phase === "Succeeded");
    expect(ended.status.containerStatuses[0]?.state.terminated?.message).toBe("65532\n7\n");
    await bed.end("plain-user");
  });

  test("mounted files follow their ConfigMap and Secret while the pod runs", async () => {
    const maps = "/api/v1/namespaces/default/configmaps";
    const secrets = "/api/v1/namespaces/default/secrets";
    await bed.make(maps, { metadata: { name: "words" }, data: { word: "old" } });
    await bed.make(secrets, { metadata: { name: "keys" }, stringData: { key: "old" } });
    const sources = [{ configMap: { name: "words" } }, { secret: { name: "keys" } }];
    const volumeMounts = [{ name: "both", mountPath: "/both", readOnly: true }];
    await bed.make(POD_PATH, pod("reads", { volumeMounts }, { volumes: [{ name: "both", projected: { sources } }] }));
    const reads = await bed.ready("reads");
    const file = async (name: string) => await bed.ask(reads, `/file?path=/both/${name}`);
    expect([await file("word"), await file("key")]).toEqual(["old", "old"]);
    const change = async (path: string, body: unknown) =>
      await bed.plane.api.ask({ method: "PATCH", path, patch: "strategic-merge-patch", body });
    await change(`${maps}/words`, { data: { word: "new" } });
    await change(`${secrets}/keys`, { stringData: { key: "new" } });
    await until(async () => (await file("word")) === "new" && (await file("key")) === "new", "both files are new");
    await bed.end("reads");
  });

  test("programs of the checkout and of the machine are in view: node, nats-server", async () => {
    const nats = join(import.meta.dirname, "../../../.tools/bin/nats-server");
    const script = `${process.execPath} --version >/dev/termination-log && ${nats} --version >>/dev/termination-log`;
    await bed.make(POD_PATH, pod("tools", shell(script)));
    const ended = await bed.seen("tools", "succeeded", ({ status }) => status.phase === "Succeeded");
    expect(ended.status.containerStatuses[0]?.state.terminated?.message).toMatch(/^v24\..*nats-server: v/s);
    await bed.end("tools");
  });
});

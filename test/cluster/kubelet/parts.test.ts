// The pure parts of the process kubelet, without a cluster: names, statuses, expansion, and the rules of the binary's cache.
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { afterEach, describe, expect, test, vi } from "vitest";
import { buildUnderLock, cachedPath, whyNoControlPlane } from "../controlplane/binary.ts";
import { Thing } from "../controlplane/raw-api.ts";
import { expand, fieldOf } from "./environment.ts";
import { hostsFile } from "./names.ts";
import { Pod, portOf, resourceOf } from "./pod.ts";
import { targetsOf } from "./service-proxy.ts";
import { type ContainerView, type PodView, podStatus } from "./status.ts";

const service = (namespace: string, name: string, clusterIP: string) =>
  Thing.parse({ metadata: { namespace, name }, spec: { clusterIP } });
const slice = (namespace: string, name: string, endpoints: object[], ports: object[] = []) =>
  Thing.parse({
    metadata: { namespace, name, labels: { "kubernetes.io/service-name": name } },
    endpoints,
    ports,
  });
const ENDPOINTS = [
  { addresses: ["10.244.1.2"], hostname: "w-0", conditions: { ready: true } },
  { addresses: ["10.244.1.3"], hostname: "w-1", conditions: { ready: false } },
];

describe("hosts files", () => {
  test("a headless Service names its ready endpoints and each by its hostname, bare only at home", () => {
    const services = [service("a", "w", "None")];
    const lines = (home: string) => hostsFile(home, services, [slice("a", "w", ENDPOINTS)]).split("\n");
    expect(lines("a")).toContain("10.244.1.2 w.a.svc.cluster.local w.a.svc w.a w");
    expect(lines("a")).toContain("10.244.1.2 w-0.w.a.svc.cluster.local w-0.w.a.svc w-0.w.a w-0.w");
    expect(lines("b")).toContain("10.244.1.2 w.a.svc.cluster.local w.a.svc w.a");
    expect(lines("a").join("\n")).not.toContain("10.244.1.3");
  });

  test("a Service with a cluster address is that address, whatever its endpoints are", () => {
    const text = hostsFile("a", [service("a", "front", "10.0.0.9")], [slice("a", "front", ENDPOINTS)]);
    expect(text).toBe("127.0.0.1 localhost\n10.0.0.9 front.a.svc.cluster.local front.a.svc front.a front\n");
  });
});

describe("the proxy of Services", () => {
  const ports = [
    { name: "http", port: 8080 },
    { name: "grpc", port: 9090 },
  ];
  const slices = [slice("a", "w", ENDPOINTS, ports), slice("b", "w", ENDPOINTS, ports)];

  test("V2: only ready endpoints of the Service's namespace are targets, at the port of that name", () => {
    const targets = targetsOf({ namespace: "a", service: "w", port: "grpc" }, slices);
    expect(targets).toEqual([{ address: "10.244.1.2", port: 9090 }]);
    expect(targetsOf({ namespace: "a", service: "w", port: "none" }, slices)).toEqual([]);
    expect(targetsOf({ namespace: "c", service: "w", port: "grpc" }, slices)).toEqual([]);
  });
});

const pod = Pod.parse({
  metadata: { name: "p", namespace: "n", uid: "u", labels: { a: "1" } },
  spec: {
    nodeName: "node",
    initContainers: [{ name: "i", resources: { limits: { "nvidia.com/gpu": 3 } } }],
    containers: [
      { name: "c", ports: [{ name: "http", containerPort: 80 }], resources: { limits: { "nvidia.com/gpu": "2" } } },
      { name: "d" },
    ],
  },
});

describe("statuses", () => {
  const container = (name: string, phase: ContainerView["phase"]): ContainerView => ({
    name,
    image: "",
    phase,
    restarts: 0,
    last: undefined,
  });
  const how = { signal: undefined, reason: "", message: "", startedAt: "", finishedAt: "" };
  const waiting = { kind: "waiting", reason: "r", message: "" } as const;
  const running = (ready: boolean) => ({ kind: "running", startedAt: "", isStarted: true, isReady: ready }) as const;
  const ended = (code: number) => ({ kind: "ended", how: { ...how, code } }) as const;
  const view = (phases: ContainerView["phase"][], isOver = false): PodView => ({
    pod,
    ip: "10.244.1.2",
    hostIp: "10.244.1.1",
    startTime: "0",
    now: "1",
    init: [],
    main: phases.map((phase, index) => container(`c${index}`, phase)),
    isOver,
  });
  const phase = (phases: ContainerView["phase"][], isOver = false) => podStatus(view(phases, isOver), []).phase;
  const readiness = (phases: ContainerView["phase"][]) =>
    podStatus(view(phases), []).conditions.find(({ type }) => type === "Ready")?.status;

  test("S1: a pod is ready when all of its containers are", () => {
    expect(readiness([running(true), running(true)])).toBe("True");
    expect(readiness([running(true), running(false)])).toBe("False");
    expect(readiness([running(true), ended(0)])).toBe("False");
  });

  test("S2: phases follow from containers; only a pod that is over is final", () => {
    expect(phase([waiting, waiting])).toBe("Pending");
    expect(phase([running(false), waiting])).toBe("Running");
    expect(phase([ended(0), ended(0)])).toBe("Running");
    expect(phase([ended(0), ended(0)], true)).toBe("Succeeded");
    expect(phase([ended(0), ended(1)], true)).toBe("Failed");
    expect(phase([ended(0), waiting], true)).toBe("Failed");
  });

  test("a condition keeps the time of its last change", () => {
    const first = podStatus(view([running(false)]), []).conditions;
    const later = podStatus({ ...view([running(true)]), now: "2" }, first).conditions;
    const at = (type: string) => later.find((condition) => condition.type === type)?.lastTransitionTime;
    expect(at("Initialized")).toBe("1");
    expect(at("Ready")).toBe("2");
  });
});

describe("a pod's spec", () => {
  test("devices of containers add up; init containers run one at a time", () => {
    expect(resourceOf(pod, "nvidia.com/gpu")).toBe(3);
  });

  test("a port goes by its number or its name", () => {
    const [container] = pod.spec.containers;
    if (!container) throw new Error("the pod has a container");
    expect([portOf(container, "http"), portOf(container, 81), portOf(container, "82")]).toEqual([80, 81, 82]);
  });

  test("$(NAME) is replaced, $$(NAME) is not, unknown names stay", () => {
    expect(expand("$(A)-$$(A)-$(B)-$", { A: "1" })).toBe("1-$(A)-$(B)-$");
  });

  test("fields of the downward API are found, unknown ones refused", () => {
    const place = { ip: "1.2.3.4", hostIp: "5.6.7.8", node: "node" };
    expect(fieldOf(pod, "metadata.labels['a']", place)).toBe("1");
    expect(fieldOf(pod, "status.podIP", place)).toBe("1.2.3.4");
    expect(() => fieldOf(pod, "spec.color", place)).toThrow("spec.color");
  });
});

describe("the control plane's binary", () => {
  afterEach(() => {
    vi.unstubAllEnvs();
  });

  test("MUSTER_SKIP_CONTROLPLANE=1 is a reason to skip", () => {
    vi.stubEnv("MUSTER_SKIP_CONTROLPLANE", "1");
    expect(whyNoControlPlane()).toBe("MUSTER_SKIP_CONTROLPLANE=1");
  });

  test.skipIf(process.getuid?.() !== 0)(
    "without Go and without a binary in the cache there is no control plane",
    () => {
      const folder = mkdtempSync(join(tmpdir(), "muster-path-"));
      for (const tool of ["unshare", "ip"]) {
        const file = (process.env.PATH ?? "")
          .split(delimiter)
          .map((part) => join(part, tool))
          .find((one) => existsSync(one));
        if (file) symlinkSync(file, join(folder, tool));
      }
      vi.stubEnv("MUSTER_SKIP_CONTROLPLANE", "");
      vi.stubEnv("XDG_CACHE_HOME", folder);
      vi.stubEnv("PATH", folder);
      expect(whyNoControlPlane()).toBe("no Go toolchain");
      mkdirSync(dirname(cachedPath()), { recursive: true });
      writeFileSync(cachedPath(), "");
      expect(whyNoControlPlane()).toBeUndefined();
      rmSync(folder, { recursive: true });
    },
  );

  test("B2: the lock of a builder that has died is taken over, and it is gone after a build that was given up", async () => {
    const cache = mkdtempSync(join(tmpdir(), "muster-cache-"));
    vi.stubEnv("XDG_CACHE_HOME", cache);
    vi.stubEnv("PATH", cache); // no `go` here: the build fails as soon as it is this process's turn
    const folder = dirname(cachedPath());
    expect(folder.startsWith(cache)).toBe(true);
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, "lock"), "999999999\n");
    const lines: string[] = [];
    const build = buildUnderLock((line) => lines.push(line), AbortSignal.timeout(10_000));
    await expect(build).rejects.toThrow(/go/);
    expect(lines).toHaveLength(1);
    expect(existsSync(join(folder, "lock"))).toBe(false);
    rmSync(cache, { recursive: true });
  });

  test("B2: a living builder is waited for, and its lock left alone", async () => {
    const cache = mkdtempSync(join(tmpdir(), "muster-cache-"));
    vi.stubEnv("XDG_CACHE_HOME", cache);
    const path = cachedPath();
    const lock = join(dirname(path), "lock");
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(lock, `${process.pid}\n`);
    const lines: string[] = [];
    const build = buildUnderLock((line) => lines.push(line), AbortSignal.timeout(10_000));
    writeFileSync(path, "built by the other");
    expect(await build).toBe(path);
    expect(lines).toEqual([]);
    expect(readFileSync(lock, "utf8")).toBe(`${process.pid}\n`);
    rmSync(cache, { recursive: true });
  });
});

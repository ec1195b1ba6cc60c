// The process kubelet on the real control plane: pods bound by the real scheduler run as real processes with what their specs
// name, report what is so, end as they are told; nodes die, are cut off and come back.
import { existsSync, mkdtempSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { isAlive, until } from "../until.ts";
import { whyNoControlPlane } from "./controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, isReady, POD_PATH, restarts } from "./kubelet/bed.ts";

const NODE_MS_MAX = 30_000; // the plane's grace for nodes is 8 s
const SET_MS_MAX = 60_000;
const why = whyNoControlPlane();

const POD_IP = { name: "POD_IP", valueFrom: { fieldRef: { fieldPath: "status.podIP" } } };
const pod = (name: string, container: Record<string, unknown>, spec: Record<string, unknown> = {}) => ({
  apiVersion: "v1",
  kind: "Pod",
  metadata: { name, labels: { app: name } },
  spec: {
    restartPolicy: "Never",
    containers: [{ name: "main", image: "answering:1", env: [POD_IP], ...container }],
    ...spec,
  },
});
const shell = (script: string) => ({ image: "sh", command: ["sh", "-c", script] });
const ready = { httpGet: { path: "/health", port: 8080 }, periodSeconds: 1 };
const gpus = (count: number) => ({ limits: { "nvidia.com/gpu": String(count) } });

describe.skipIf(why !== undefined)(why === undefined ? "process kubelet" : `process kubelet (skipped: ${why})`, () => {
  let bed: Bed;

  beforeAll(async () => {
    bed = await Bed.start({
      nodes: [
        { name: "gpu-a", gpus: 8 },
        { name: "gpu-b", gpus: 8 },
        { name: "plain", gpus: 0 },
      ],
      entrypoints: { answering: [process.execPath, join(import.meta.dirname, "kubelet/answering.ts")] },
      featureGates: { GenericWorkload: true },
    });
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  describe("a StatefulSet of two pods with eight GPUs each", () => {
    beforeAll(async () => {
      await bed.make("/api/v1/namespaces/default/configmaps", {
        metadata: { name: "words" },
        data: { greeting: "hello" },
      });
      await bed.make("/api/v1/namespaces/default/secrets", {
        metadata: { name: "keys" },
        stringData: { word: "sesame" },
      });
      const selector = { app: "web" };
      const service = { clusterIP: "None", selector, ports: [{ port: 8080 }] };
      await bed.make("/api/v1/namespaces/default/services", { metadata: { name: "web" }, spec: service });
      const front = { selector, ports: [{ port: 80, targetPort: "http" }] };
      await bed.make("/api/v1/namespaces/default/services", { metadata: { name: "front" }, spec: front });
      const { spec } = pod("web", {
        ports: [{ name: "http", containerPort: 8080 }],
        readinessProbe: { ...ready, httpGet: { path: "/health", port: "http" } },
        resources: gpus(8),
        args: ["--greeting", "$(GREETING)", "$$(GREETING)"],
        env: [
          POD_IP,
          { name: "NAME", valueFrom: { fieldRef: { fieldPath: "metadata.name" } } },
          { name: "GREETING", valueFrom: { configMapKeyRef: { name: "words", key: "greeting" } } },
          { name: "WORD", valueFrom: { secretKeyRef: { name: "keys", key: "word" } } },
        ],
        volumeMounts: [
          { name: "words", mountPath: "/etc/words" },
          { name: "scratch", mountPath: "/scratch" },
        ],
      });
      const template = {
        metadata: { labels: selector },
        spec: {
          ...spec,
          restartPolicy: "Always",
          volumes: [
            { name: "words", configMap: { name: "words" } },
            { name: "scratch", emptyDir: {} },
          ],
        },
      };
      const set = {
        serviceName: "web",
        replicas: 2,
        podManagementPolicy: "Parallel",
        selector: { matchLabels: selector },
        template,
      };
      await bed.make("/apis/apps/v1/namespaces/default/statefulsets", { metadata: { name: "web" }, spec: set });
      for (const name of ["web-0", "web-1"]) await bed.ready(name, 40_000);
    }, SET_MS_MAX);
    afterAll(async () => {
      await bed.remove("/apis/apps/v1/namespaces/default/statefulsets/web");
      for (const name of ["web-0", "web-1"]) await bed.gone(name);
    }, SET_MS_MAX);

    test("the scheduler binds one to each GPU node, and each runs as the process that the kubelet names", async () => {
      const pods = await Promise.all(["web-0", "web-1"].map((name) => bed.ready(name)));
      expect(pods.map(({ spec }) => spec.nodeName).sort()).toEqual(["gpu-a", "gpu-b"]);
      for (const [index, one] of pods.entries()) {
        const said = JSON.parse(await bed.ask(one, "/"));
        expect(said.pid).toBe(bed.pid(one));
        expect(isAlive(said.pid)).toBe(true);
        expect(said.hostname).toBe(`web-${index}`);
      }
    });

    test("its environment, arguments and files are those of its spec", async () => {
      const one = await bed.ready("web-1");
      const { env, args } = JSON.parse(await bed.ask(one, "/"));
      expect(env).toMatchObject({ NAME: "web-1", GREETING: "hello", WORD: "sesame", POD_IP: one.status.podIP });
      expect(env.NVIDIA_VISIBLE_DEVICES).toBe("0,1,2,3,4,5,6,7");
      expect(args).toEqual(["--greeting", "hello", "$(GREETING)"]);
      expect(await bed.ask(one, "/file?path=/etc/words/greeting")).toBe("hello");
    });

    test("a pod finds its peer by its headless name", async () => {
      const [first, second] = await Promise.all(["web-0", "web-1"].map((name) => bed.ready(name)));
      if (!first || !second) throw new Error("two pods were seen");
      for (const name of ["web-1.web", "web-1.web.default.svc.cluster.local"]) {
        // The slice may be a moment behind the pod's readiness.
        const peer = async () =>
          JSON.parse(await bed.ask(first, `/get?url=${encodeURIComponent(`http://${name}:8080/`)}`)).pid;
        await until(async () => (await peer().catch(() => 0)) === bed.pid(second), `${name} leads to web-1`);
      }
    });

    test("a Service's cluster address leads to each of its ready pods in turn", async () => {
      const one = await bed.ready("web-0");
      const met = new Set<string>();
      await until(async () => {
        const body = await bed.ask(one, `/get?url=${encodeURIComponent("http://front/")}`);
        if (body.startsWith("{")) met.add(JSON.parse(body).hostname); // else: refused, the proxy has not heard yet
        return met.size === 2;
      }, "both pods have answered for the Service");
    });

    test("its projected token is known to the API server as its own", async () => {
      const one = await bed.ready("web-0");
      const review = JSON.parse(await bed.ask(one, "/whoami"));
      expect(review.status.userInfo.username).toBe("system:serviceaccount:default:default");
      expect(review.status.userInfo.extra["authentication.kubernetes.io/pod-uid"]).toEqual([one.metadata.uid]);
    });

    test("U3: a third pod waits for the scheduler, and one that is forced onto a full node fails on arrival", async () => {
      await bed.make(POD_PATH, pod("third", { resources: gpus(1) }));
      const third = await bed.seen("third", "is unschedulable", ({ status }) =>
        status.conditions.some((c) => c.status === "False"),
      );
      expect(third.status.conditions[0]?.message).toContain("Insufficient nvidia.com/gpu");
      await bed.make(POD_PATH, pod("forced", { resources: gpus(1) }, { nodeName: "gpu-a" }));
      const forced = await bed.seen("forced", "failed", ({ status }) => status.phase === "Failed");
      expect(forced.status).toMatchObject({ reason: "UnexpectedAdmissionError" });
      await bed.end("third", "forced");
    });

    test("a failed readiness probe takes the pod out of its Service, and its process goes on", async () => {
      const one = await bed.ready("web-0");
      const pid = bed.pid(one);
      expect(await bed.ask(one, "/sicken")).toBe("sick");
      await bed.seen("web-0", "is not ready", (now) => !isReady(now));
      expect(bed.pid(one)).toBe(pid);
    });

    test("a container that ends is restarted, counted and ready again", async () => {
      const one = await bed.seen("web-0", "runs", ({ status }) => status.phase === "Running");
      const pid = bed.pid(one);
      await bed.ask(one, "/exit?code=3");
      const again = await bed.seen("web-0", "is ready again", (now) => isReady(now) && restarts(now) === 1);
      expect(again.metadata.uid).toBe(one.metadata.uid);
      expect(bed.pid(again)).not.toBe(pid);
    });

    test("an API server restart leaves the processes alone, and statuses are current after it", async () => {
      const one = await bed.ready("web-1");
      const pid = bed.pid(one);
      await bed.plane.killApiServer();
      expect(await bed.ask(one, "/sicken")).toBe("sick"); // a change that cannot be told while it happens
      await bed.plane.restartApiServer();
      await bed.seen("web-1", "is seen not ready", (now) => !isReady(now));
      expect(bed.pid(one)).toBe(pid);
      await until(
        async () => (await bed.isNodeReady("gpu-a")) && (await bed.isNodeReady("gpu-b")),
        "the nodes are ready",
        NODE_MS_MAX,
      );
    });
  });

  test("exit codes make Succeeded and Failed, with the termination message", async () => {
    await bed.make(POD_PATH, pod("good", shell("exit 0")));
    await bed.make(POD_PATH, pod("bad", shell("echo out of memory >/dev/termination-log; exit 7")));
    await bed.make(POD_PATH, pod("absent", { image: "none", command: ["/no/such/program"] }));
    await bed.seen("good", "succeeded", ({ status }) => status.phase === "Succeeded");
    const bad = await bed.seen("bad", "failed", ({ status }) => status.phase === "Failed");
    const terminated = { exitCode: 7, message: "out of memory\n" };
    expect(bad.status.containerStatuses[0]?.state.terminated).toMatchObject(terminated);
    const absent = await bed.seen("absent", "failed", ({ status }) => status.phase === "Failed");
    expect(absent.status.containerStatuses[0]?.state.terminated?.exitCode).toBe(127);
    await bed.end("good", "bad", "absent");
  });

  test("L1: init containers come first, and a missing ConfigMap is waited for and said", async () => {
    const spec = {
      initContainers: [
        {
          name: "first",
          ...shell("echo made by init >/shared/file"),
          volumeMounts: [{ name: "shared", mountPath: "/shared" }],
        },
      ],
      volumes: [
        { name: "shared", emptyDir: {} },
        { name: "late", configMap: { name: "late" } },
      ],
    };
    const volumeMounts = [
      { name: "shared", mountPath: "/shared", readOnly: true },
      { name: "late", mountPath: "/late" },
    ];
    await bed.make(POD_PATH, pod("waits", { volumeMounts, readinessProbe: ready }, spec));
    const waits = await bed.seen("waits", "says why it waits", ({ status }) =>
      Boolean(status.containerStatuses[0]?.state.waiting?.message?.includes("late")),
    );
    expect(waits.status.phase).toBe("Pending");
    await bed.make("/api/v1/namespaces/default/configmaps", { metadata: { name: "late" }, data: { key: "here" } });
    const runs = await bed.ready("waits");
    expect(await bed.ask(runs, "/file?path=/shared/file")).toBe("made by init\n");
    expect(await bed.ask(runs, "/file?path=/late/key")).toBe("here");
    await bed.end("waits");
  });

  test("X1: what a container writes outside its volumes stays in it", async () => {
    const mark = `/etc/muster-kubelet-${process.pid}`;
    await bed.make(POD_PATH, pod("writes", shell(`echo x >${mark} && cat ${mark} >/dev/termination-log`)));
    const writes = await bed.seen("writes", "succeeded", ({ status }) => status.phase === "Succeeded");
    expect(writes.status.containerStatuses[0]?.state.terminated?.message).toBe("x\n");
    expect(existsSync(mark)).toBe(false);
    await bed.end("writes");
  });

  test("exec, TCP and gRPC probes answer, and a gRPC service that is not serving keeps the pod unready", async () => {
    const env = [POD_IP, { name: "GRPC_PORT", value: "9090" }];
    const probes = {
      "by-exec": { exec: { command: ["sh", "-c", "test $(hostname) = by-exec"] } },
      "by-tcp": { tcpSocket: { port: 9090 } },
      "by-grpc": { grpc: { port: 9090 } },
      sick: { grpc: { port: 9090, service: "sick" } },
    };
    for (const [name, probe] of Object.entries(probes))
      await bed.make(
        POD_PATH,
        pod(name, {
          env,
          readinessProbe: { ...probe, periodSeconds: 1 },
          startupProbe: { ...ready, failureThreshold: 30 },
        }),
      );
    for (const name of ["by-exec", "by-tcp", "by-grpc"]) await bed.ready(name);
    expect(isReady(await bed.seen("sick", "runs", ({ status }) => status.phase === "Running"))).toBe(false);
    for (const name of Object.keys(probes)) await bed.remove(`${POD_PATH}/${name}?gracePeriodSeconds=0`);
    for (const name of Object.keys(probes)) await bed.gone(name);
  });

  test("a failed liveness probe restarts the container", async () => {
    const probes = {
      startupProbe: { ...ready, failureThreshold: 30 },
      livenessProbe: { ...ready, failureThreshold: 2 },
      readinessProbe: ready,
    };
    await bed.make(POD_PATH, pod("lives", probes, { restartPolicy: "Always" }));
    const lives = await bed.ready("lives");
    await bed.ask(lives, "/sicken");
    await bed.seen("lives", "is ready again", (now) => isReady(now) && restarts(now) === 1);
    await bed.end("lives");
  });

  test("L2, U2: deletion is preStop, SIGTERM and, after the grace, SIGKILL; the object goes when the process has", async () => {
    const env = [POD_IP, { name: "STUBBORN", value: "1" }];
    const lifecycle = {
      preStop: { exec: { command: ["sh", "-c", "echo preStop >/proc/1/fd/1 || true; echo ran >/out/hook"] } },
    };
    const volumeMounts = [{ name: "out", mountPath: "/out" }];
    const out = mkdtempSync(join(bed.plane.dir, "out-"));
    const spec = { terminationGracePeriodSeconds: 2, volumes: [{ name: "out", hostPath: { path: out } }] };
    await bed.make(POD_PATH, pod("stays", { env, lifecycle, volumeMounts, readinessProbe: ready }, spec));
    const stays = await bed.ready("stays");
    const pid = bed.pid(stays);
    const log = bed.kubelet(stays.spec.nodeName).logFile({ namespace: "default", name: "stays" }, "main") ?? "";
    const started = performance.now();
    await bed.remove(`${POD_PATH}/stays`);
    await until(() => readFileSync(log, "utf8").includes("SIGTERM"), "it was asked to end");
    expect(readFileSync(join(out, "hook"), "utf8")).toBe("ran\n");
    expect(isAlive(pid)).toBe(true);
    await bed.gone("stays");
    expect(isAlive(pid)).toBe(false);
    expect(performance.now() - started).toBeGreaterThan(1_500); // it was given its grace
  });

  test("of two gangs that want the same nodes one is bound whole, the other not at all until it can be", async () => {
    const group = (name: string) => ({
      apiVersion: "scheduling.k8s.io/v1beta1",
      kind: "PodGroup",
      metadata: { name },
      spec: { schedulingPolicy: { gang: { minCount: 2 } } },
    });
    const members = (name: string) => [`${name}-0`, `${name}-1`];
    const groups = "/apis/scheduling.k8s.io/v1beta1/namespaces/default/podgroups";
    const names = ["left", "right"];
    for (const name of names) await bed.make(groups, group(name));
    for (const index of [0, 1]) {
      for (const name of names) {
        const spec = { schedulingGroup: { podGroupName: name } };
        await bed.make(POD_PATH, pod(`${name}-${index}`, { resources: gpus(8), readinessProbe: ready }, spec));
      }
    }
    const bound = async (name: string) => {
      const pods = await Promise.all(members(name).map((member) => bed.find(member)));
      return pods.filter((one) => one?.spec.nodeName !== undefined).length;
    };
    let winner: string | undefined;
    const isDecided = async () => {
      for (const name of names) if ((await bound(name)) === 2) winner = name;
      return winner !== undefined;
    };
    await until(isDecided, "one gang is bound whole", NODE_MS_MAX);
    const loser = winner === "left" ? "right" : "left";
    const isRefused = async () =>
      JSON.stringify(await bed.plane.api.find(`${groups}/${loser}`)).includes("Unschedulable");
    await until(isRefused, "the other is said to be unschedulable", NODE_MS_MAX);
    expect(await bound(loser)).toBe(0);
    for (const member of members(winner ?? "")) await bed.ready(member);
    await bed.end(...members(winner ?? ""));
    for (const member of members(loser)) await bed.ready(member, NODE_MS_MAX);
    await bed.end(...members(loser));
  }, 90_000);

  const evictable = {
    nodeSelector: { "kubernetes.io/hostname": "plain" },
    tolerations: [
      { key: "node.kubernetes.io/unreachable", operator: "Exists", effect: "NoExecute", tolerationSeconds: 0 },
    ],
  };

  test("U1: a dead node turns NotReady with its processes gone; its evicted pod ends when it is heard again", async () => {
    const plain = bed.kubelet("plain");
    await bed.make(POD_PATH, pod("lost", { readinessProbe: ready }, evictable));
    const lost = await bed.ready("lost");
    const pid = bed.pid(lost);
    plain.die();
    await until(() => !isAlive(pid), "its process has ended");
    expect(isReady(await bed.seen("lost", "is still said to run", ({ status }) => status.phase === "Running"))).toBe(
      true,
    );
    await until(async () => !(await bed.isNodeReady("plain")), "the node is NotReady", NODE_MS_MAX);
    await bed.seen("lost", "is evicted", ({ metadata }) => metadata.deletionTimestamp !== undefined, NODE_MS_MAX);
    await plain.revive();
    await bed.gone("lost");
    await until(async () => await bed.isNodeReady("plain"), "the node is ready again", NODE_MS_MAX);
  }, 90_000);

  test("U1: a severed node's processes live on as zombies until it hears that their pod was deleted", async () => {
    const plain = bed.kubelet("plain");
    await bed.make(POD_PATH, pod("zombie", { readinessProbe: ready }, evictable));
    const zombie = await bed.ready("zombie");
    const pid = bed.pid(zombie);
    plain.sever();
    await until(async () => !(await bed.isNodeReady("plain")), "the node is NotReady", NODE_MS_MAX);
    await bed.seen("zombie", "is evicted", ({ metadata }) => metadata.deletionTimestamp !== undefined, NODE_MS_MAX);
    await bed.remove(`${POD_PATH}/zombie?gracePeriodSeconds=0`); // somebody forces it out of the API
    await bed.gone("zombie");
    expect(JSON.parse(await bed.ask(zombie, "/")).pid).toBe(pid); // it still answers
    await plain.revive();
    await until(() => !isAlive(pid), "the zombie has ended");
    await until(async () => await bed.isNodeReady("plain"), "the node is ready again", NODE_MS_MAX);
  }, 90_000);

  test("U4: a node that was silent too long is heard again, and its pods are ready again", async () => {
    const plain = bed.kubelet("plain");
    await bed.make(POD_PATH, pod("patient", { readinessProbe: ready }, { nodeSelector: evictable.nodeSelector }));
    const { status } = await bed.ready("patient");
    plain.sever();
    await bed.seen("patient", "is said not to be ready", (now) => !isReady(now), NODE_MS_MAX);
    await plain.revive();
    const again = await bed.ready("patient", NODE_MS_MAX);
    expect(restarts(again)).toBe(restarts({ ...again, status }));
    await bed.end("patient");
  }, 90_000);
});

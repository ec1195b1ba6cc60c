// A whole Kubernetes control plane for one test file: etcd, API server, controller manager and scheduler as processes of their
// own in a network namespace of their own, from one binary (binary.ts). Owns its processes and its folder.
//
//   P1  every process ends with the caller, however it ends (the guard's lifeline), and the folder with them.
//   P2  each part has its own identity (token and group) under RBAC; clients trust the API server's own certificate.
//   P3  seen from outside the address stays the same over a restart of the API server.
import { execFile } from "node:child_process";
import { generateKeyPairSync, randomBytes } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Guarded } from "../../../controller/local/guarded.ts";
import { until } from "../../until.ts";
import { controlPlaneBinary } from "./binary.ts";
import { NetworkSpace, SERVICE_NETWORK } from "./network-space.ts";
import { ApiRefusal, RawApi } from "./raw-api.ts";

// The namespace is empty, so its ports are free by construction.
const ETCD_PORT = 2379;
const ETCD_PEER_PORT = 2380;
export const API_PORT = 6443;

const READY_MS = 90_000; // 4 s on an idle machine; other tests run on the same cores
const STOP_GRACE_MS = 5_000;
const TOOL_TIMEOUT_MS = 120_000;
const TOOL_OUTPUT_BYTES_MAX = 32 * 1024 * 1024;

type Follower = "kube-controller-manager" | "kube-scheduler";
export type Part = "etcd" | "kube-apiserver" | Follower;
export type Output = { code: number; stdout: string; stderr: string };
export type Wanted = {
  /** An empty folder for everything that is written; removed at stop. */
  dir: string;
  featureGates?: Record<string, boolean>;
  /** How long a Node's lease may be silent before it is NotReady; default 8 s, so that tests of dead nodes are short. */
  nodeGraceSeconds?: number;
  /** Each pod has a network of its own, and its connections its address; default: all share the space's. */
  podNetworks?: boolean;
  /**
   * Which parts follow the API server; default: both. Without the controller manager nobody makes service accounts, takes the
   * taint off new nodes, evicts pods of silent ones or collects garbage.
   */
  followers?: readonly Follower[];
};

export class ControlPlane {
  /** Admin's kubeconfig for this machine, outside the namespace. Usable by other processes while this one lives. */
  readonly kubeconfig: string;
  readonly url: string;
  readonly ca: string;
  readonly token: string;
  readonly dir: string;
  readonly space: NetworkSpace;
  readonly processes: Guarded;
  readonly api: RawApi;
  readonly #binary: string;
  readonly #wanted: Wanted;
  #isStopped = false;

  private constructor(made: {
    wanted: Wanted;
    binary: string;
    space: NetworkSpace;
    processes: Guarded;
    port: number;
    ca: string;
    token: string;
  }) {
    this.#wanted = made.wanted;
    this.#binary = made.binary;
    this.dir = made.wanted.dir;
    this.space = made.space;
    this.processes = made.processes;
    this.url = `https://127.0.0.1:${made.port}`;
    this.ca = made.ca;
    this.token = made.token;
    this.kubeconfig = join(this.dir, "admin.kubeconfig");
    writeFileSync(this.kubeconfig, kubeconfig(this.url, this.dir, made.token), { mode: 0o600 });
    this.api = new RawApi({ url: this.url, ca: made.ca, token: made.token });
  }

  static async start(wanted: Wanted): Promise<ControlPlane> {
    const binary = await controlPlaneBinary();
    const { dir } = wanted;
    mkdirSync(join(dir, "logs"), { recursive: true });
    const processes = await Guarded.start(dir);
    processes.setMaxListeners(0); // one for each container that runs
    try {
      const space = await NetworkSpace.open(dir, processes, wanted.podNetworks);
      const tokens = writeIdentities(dir);
      const parts = { binary, space, processes, wanted };
      await startEtcd(parts);
      await startApiServer(parts);
      const { port } = await space.forward("127.0.0.1", API_PORT);
      const ca = readFileSync(caFile(dir), "utf8");
      const plane = new ControlPlane({ ...parts, port, ca, token: tokens.admin });
      startFollowers(parts, tokens);
      await plane.#settled();
      return plane;
    } catch (error) {
      await processes.close();
      throw error;
    }
  }

  async kubectl(args: readonly string[], input = ""): Promise<Output> {
    return await this.#tool("kubectl", ["--kubeconfig", this.kubeconfig, ...args], input);
  }

  async helm(args: readonly string[], input = ""): Promise<Output> {
    return await this.#tool("helm", ["--kubeconfig", this.kubeconfig, ...args], input);
  }

  /** Resolves when a kind can be listed: a new custom resource answers 404, then 429, before it is served. */
  async serves(path: string): Promise<void> {
    const isListed = async () =>
      await this.api.list(path).then(
        () => true,
        (error) => {
          if (error instanceof ApiRefusal) return false;
          throw error;
        },
      );
    await until(isListed, `${path} is served`);
  }

  /** The API server ends as by `kill -9`; everybody is without it until `restartApiServer`. */
  async killApiServer(): Promise<void> {
    this.processes.kill("kube-apiserver");
    await this.processes.ended("kube-apiserver", AbortSignal.timeout(STOP_GRACE_MS));
  }

  /** A new API server process on the same address and store; resolves when it is ready. */
  async restartApiServer(): Promise<void> {
    this.processes.stop("kube-apiserver", STOP_GRACE_MS);
    await this.processes.ended("kube-apiserver", AbortSignal.timeout(2 * STOP_GRACE_MS));
    await startApiServer(this.#parts());
  }

  /** Resident bytes of each part, from /proc. */
  memory(): Record<string, number> {
    const bytes: Record<string, number> = {};
    for (const [id, seen] of this.processes.children) {
      if (seen.state !== "running" || !/^(etcd|kube-)/.test(id)) continue;
      const status = readFileSync(`/proc/${seen.pid}/status`, "utf8");
      bytes[id] = Number(/VmRSS:\s+(\d+) kB/.exec(status)?.[1] ?? 0) * 1024;
    }
    return bytes;
  }

  /** Ends all processes and removes the folder. */
  async stop(): Promise<void> {
    if (this.#isStopped) return;
    this.#isStopped = true;
    await this.api.close();
    this.space.close();
    // Nothing of it is kept, so nothing need end in order: the API server alone takes seconds to.
    for (const part of PARTS) this.processes.kill(part);
    await this.processes.close();
  }

  #parts(): Parts {
    return { binary: this.#binary, space: this.space, processes: this.processes, wanted: this.#wanted };
  }

  /** Pods of a namespace are refused until its default service account exists. */
  async #settled(): Promise<void> {
    const { followers = FOLLOWERS } = this.#wanted;
    await until(
      async () => {
        const missing = (["etcd", "kube-apiserver", ...followers] as const).find(
          (part) => !this.processes.isRunning(part),
        );
        if (missing) throw new Error(lastWords(this.#parts(), missing));
        if (!followers.includes("kube-controller-manager")) return true;
        return (await this.api.find("/api/v1/namespaces/default/serviceaccounts/default")) !== undefined;
      },
      "the service account `default` exists",
      READY_MS,
    );
  }

  async #tool(tool: string, args: readonly string[], input: string): Promise<Output> {
    const home = join(this.dir, "home");
    const limits = { timeout: TOOL_TIMEOUT_MS, maxBuffer: TOOL_OUTPUT_BYTES_MAX };
    const env = { PATH: process.env.PATH ?? "", HOME: home, KUBECONFIG: this.kubeconfig };
    return await new Promise((done) => {
      const child = execFile(this.#binary, [tool, ...args], { ...limits, env }, (error, stdout, stderr) => {
        const code = error ? (typeof error.code === "number" ? error.code : -1) : 0;
        done({ code, stdout, stderr: stderr || (error?.message ?? "") });
      });
      child.stdin?.on("error", () => {}); // it did not want to read
      child.stdin?.end(input);
    });
  }
}

export async function startControlPlane(wanted: Wanted): Promise<ControlPlane> {
  return await ControlPlane.start(wanted);
}

const FOLLOWERS: readonly Follower[] = ["kube-controller-manager", "kube-scheduler"];
const PARTS: readonly Part[] = ["etcd", "kube-apiserver", ...FOLLOWERS];
type Parts = { binary: string; space: NetworkSpace; processes: Guarded; wanted: Wanted };
type Tokens = { admin: string; "kube-controller-manager": string; "kube-scheduler": string };

/** The API server's self-signed certificate: file of leaf and its issuer, so it is its own authority. */
const caFile = (dir: string) => join(dir, "certs", "apiserver.crt");

function writeIdentities(dir: string): Tokens {
  const { privateKey, publicKey } = generateKeyPairSync("rsa", {
    modulusLength: 2048,
    privateKeyEncoding: { type: "pkcs8", format: "pem" },
    publicKeyEncoding: { type: "spki", format: "pem" },
  });
  writeFileSync(join(dir, "sa.key"), privateKey, { mode: 0o600 });
  writeFileSync(join(dir, "sa.pub"), publicKey);
  const draw = () => randomBytes(24).toString("hex");
  const tokens = { admin: draw(), "kube-controller-manager": draw(), "kube-scheduler": draw() };
  const lines = [
    `${tokens.admin},admin,admin,"system:masters"`,
    ...(["kube-controller-manager", "kube-scheduler"] as const).map(
      (name) => `${tokens[name]},system:${name},${name},"system:authenticated"`,
    ),
  ];
  writeFileSync(join(dir, "tokens.csv"), `${lines.join("\n")}\n`, { mode: 0o600 });
  return tokens;
}

function kubeconfig(server: string, dir: string, token: string): string {
  const cluster = { server, "certificate-authority": caFile(dir) };
  return JSON.stringify({
    apiVersion: "v1",
    kind: "Config",
    clusters: [{ name: "test", cluster }],
    users: [{ name: "user", user: { token } }],
    contexts: [{ name: "test", context: { cluster: "test", user: "user" } }],
    "current-context": "test",
  });
}

function launch(parts: Parts, part: Part, args: readonly string[]): void {
  const inside = parts.space.inside(parts.binary, [part, ...args]);
  const log = join(parts.wanted.dir, "logs", `${part}.log`);
  parts.processes.spawn({ id: part, ...inside, env: { PATH: process.env.PATH ?? "" }, log, watchesStdin: false });
}

async function startEtcd(parts: Parts): Promise<void> {
  launch(parts, "etcd", [
    `--data-dir=${join(parts.wanted.dir, "etcd")}`,
    `--listen-client-url=http://127.0.0.1:${ETCD_PORT}`,
    `--listen-peer-url=http://127.0.0.1:${ETCD_PEER_PORT}`,
  ]);
  await answers(parts, "etcd", async () => {
    const answer = await parts.space.get(
      { address: "127.0.0.1", port: ETCD_PORT, path: "/health" },
      AbortSignal.timeout(2_000),
    );
    return answer.status === 200;
  });
}

async function startApiServer(parts: Parts): Promise<void> {
  const { dir, featureGates = {} } = parts.wanted;
  const gates = Object.entries(featureGates).map(([name, on]) => `${name}=${on}`);
  launch(parts, "kube-apiserver", [
    `--etcd-servers=http://127.0.0.1:${ETCD_PORT}`,
    "--bind-address=127.0.0.1",
    `--secure-port=${API_PORT}`,
    "--advertise-address=10.244.0.1", // a loopback address is refused; pods dial 127.0.0.1 in the same namespace
    "--endpoint-reconciler-type=none",
    `--cert-dir=${join(dir, "certs")}`,
    `--token-auth-file=${join(dir, "tokens.csv")}`,
    "--authorization-mode=RBAC",
    "--service-account-issuer=https://kubernetes.default.svc",
    `--service-account-key-file=${join(dir, "sa.pub")}`,
    `--service-account-signing-key-file=${join(dir, "sa.key")}`,
    `--service-cluster-ip-range=${SERVICE_NETWORK}`,
    "--profiling=false",
    ...(gates.length > 0 ? [`--feature-gates=${gates.join(",")}`] : []),
    ...(featureGates.GenericWorkload ? ["--runtime-config=scheduling.k8s.io/v1beta1=true"] : []),
  ]);
  const { port, close } = await parts.space.forward("127.0.0.1", API_PORT);
  try {
    await answers(parts, "kube-apiserver", async () => {
      // Anew each time: the file may have been read while it was being written.
      const probe = new RawApi({ url: `https://127.0.0.1:${port}`, ca: readFileSync(caFile(dir), "utf8"), token: "" });
      try {
        return (await probe.ask({ method: "GET", path: "/readyz" })) === "ok";
      } finally {
        await probe.close();
      }
    });
  } finally {
    await close();
  }
}

function startFollowers(parts: Parts, tokens: Tokens): void {
  const { dir, featureGates = {}, nodeGraceSeconds = 8, followers = FOLLOWERS } = parts.wanted;
  const gates = Object.entries(featureGates).map(([name, on]) => `${name}=${on}`);
  const common = [
    "--leader-elect=false",
    "--kube-api-qps=500", // the default of 20 makes the controllers' start three seconds longer
    "--kube-api-burst=1000",
    "--secure-port=0", // serves nothing: what it does is seen through the API server
    ...(gates.length > 0 ? [`--feature-gates=${gates.join(",")}`] : []),
  ];
  for (const part of followers) {
    const file = join(dir, `${part}.kubeconfig`);
    writeFileSync(file, kubeconfig(`https://127.0.0.1:${API_PORT}`, dir, tokens[part]), { mode: 0o600 });
    const own =
      part === "kube-scheduler"
        ? []
        : [
            `--service-account-private-key-file=${join(dir, "sa.key")}`,
            `--root-ca-file=${caFile(dir)}`,
            "--use-service-account-credentials",
            "--node-monitor-period=1s",
            `--node-monitor-grace-period=${nodeGraceSeconds}s`,
          ];
    launch(parts, part, [`--kubeconfig=${file}`, ...common, ...own]);
  }
}

/** Waits until a part says that it is ready; rejects with its last words where it ends first. */
async function answers(parts: Parts, part: Part, isReady: () => Promise<boolean>): Promise<void> {
  let last: unknown;
  const poll = async () => {
    if (!parts.processes.isRunning(part)) throw new Error(lastWords(parts, part));
    return await isReady().catch((error) => {
      last = error; // refused until it listens
      return false;
    });
  };
  await until(poll, `${part} is ready`, READY_MS).catch((error) => {
    throw new Error(`${error.message}; last answer: ${last}`);
  });
}

function lastWords(parts: Parts, part: Part): string {
  const log = readFileSync(join(parts.wanted.dir, "logs", `${part}.log`), "utf8");
  return `${part} ended:\n${log.slice(-3_000)}`;
}

// The life of one pod on a node: volumes, init containers, containers with restarts, probes, the end with its grace.
// Owns its processes (through the node's guard) and its folder; says what changed, posts nothing itself.
//
//   L1  a container's process is started once its volumes and environment are whole; what is missing is waited for and said.
//   L2  stop: preStop, then SIGTERM, then SIGKILL, together within the grace. After it nothing is started again.
//   L3  `done` resolves only when no process of the pod runs.
import { chmodSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import type { Guarded } from "../../../controller/local/guarded.ts";
import type { NetworkSpace } from "../controlplane/network-space.ts";
import { ApiRefusal, type RawApi } from "../controlplane/raw-api.ts";
import { environmentOf, expand, NotThere, type Place } from "./environment.ts";
import { API_ENVIRONMENT, type Names } from "./names.ts";
import { type Container, type Pod, userOf } from "./pod.ts";
import { PodNetwork } from "./pod-network.ts";
import { httpPasses, pause, runInside, watchProbe } from "./probe.ts";
import { type Mount, sandboxScript } from "./sandbox.ts";
import type { ContainerView, Ended, Phase, PodView } from "./status.ts";
import { isMadeFrom, type Updates } from "./updates.ts";
import { makeVolume } from "./volumes.ts";

const RETRY_MS = 500; // for a ConfigMap that is not there yet
const RESTART_MS = 1_000; // doubles with each restart; a kubelet starts at 10 s, tests are shorter
const RESTART_MS_MAX = 60_000;
const MESSAGE_BYTES_MAX = 4096;
/** Name of the process that holds a pod's network; no container can have it. */
export const NETWORK = "/network";
const COULD_NOT_START = 128; // exit code of kubelets where no process came to be

export type Site = {
  api: RawApi;
  space: NetworkSpace;
  processes: Guarded;
  names: Names;
  updates: Updates;
  /** Argument vectors that images stand for, by image without its tag; a pod's command goes before it. */
  entrypoints: Readonly<Record<string, readonly string[]>>;
  /** Else all pods share the space's network. */
  hasPodNetworks: boolean;
};
type Tracked = { container: Container; view: ContainerView; pid: number | undefined };
export type Lease = { place: Place; folder: string; devices: readonly number[] };

export class RunningPod {
  pod: Pod;
  readonly lease: Lease;
  readonly done: Promise<void>;
  readonly #site: Site;
  readonly #changed: () => void;
  readonly #startTime = new Date().toISOString();
  readonly #init: Tracked[];
  readonly #main: Tracked[];
  readonly #ending = new AbortController();
  readonly #over = new AbortController();
  #isOver = false;
  /** Where the pod has one of its own, from its start to its end. */
  network: PodNetwork | undefined;
  #stopping: Promise<void> | undefined;

  constructor(site: Site, pod: Pod, lease: Lease, changed: () => void) {
    this.#site = site;
    this.pod = pod;
    this.lease = lease;
    this.#changed = changed;
    const wait = pod.spec.initContainers.length > 0 ? "PodInitializing" : "ContainerCreating";
    const track = (container: Container): Tracked => ({
      container,
      pid: undefined,
      view: { name: container.name, image: container.image, phase: waiting(wait), restarts: 0, last: undefined },
    });
    this.#init = pod.spec.initContainers.map(track);
    this.#main = pod.spec.containers.map(track);
    this.done = this.#live().finally(() => {
      this.#isOver = true;
      this.#over.abort();
      this.network?.close();
      this.network = undefined;
      rmSync(join(this.lease.folder, "sandbox"), { recursive: true, force: true });
      this.#changed();
    });
  }

  view(): PodView {
    const { place } = this.lease;
    return {
      pod: this.pod,
      ip: place.ip,
      hostIp: place.hostIp,
      startTime: this.#startTime,
      now: new Date().toISOString(),
      init: this.#init.map(({ view }) => view),
      main: this.#main.map(({ view }) => view),
      isOver: this.#isOver,
    };
  }

  /** Process ids of the containers that run, by container name. */
  pids(): Map<string, number> {
    const all = [...this.#init, ...this.#main];
    return new Map(all.flatMap(({ container, pid }) => (pid === undefined ? [] : [[container.name, pid]])));
  }

  /** Ends the pod within the grace (L2); a later call may only shorten it. */
  async stop(graceSeconds: number): Promise<void> {
    this.#ending.abort();
    if (graceSeconds <= 0)
      for (const tracked of [...this.#init, ...this.#main]) this.#site.processes.kill(this.#id(tracked));
    this.#stopping ??= this.#stop(graceSeconds);
    await this.#stopping;
  }

  async #stop(graceSeconds: number): Promise<void> {
    const deadline = performance.now() + graceSeconds * 1000;
    const left = () => Math.max(0, Math.ceil(deadline - performance.now()));
    const stopOne = async (tracked: Tracked) => {
      await this.#preStop(tracked, left());
      this.#site.processes.stop(this.#id(tracked), left());
    };
    // By what was asked of the guard, not by what it said yet: a process that is just being made must end too.
    const running = [...this.#init, ...this.#main].filter((tracked) =>
      this.#site.processes.isRunning(this.#id(tracked)),
    );
    await Promise.all(running.map(stopOne));
    await this.done;
  }

  async #preStop({ container, pid }: Tracked, leftMs: number): Promise<void> {
    const hook = container.lifecycle?.preStop;
    if (!hook || pid === undefined || leftMs <= 0) return;
    const bound = AbortSignal.timeout(leftMs);
    if (hook.exec) await runInside(pid, hook.exec.command, leftMs);
    else if (hook.sleep) await pause(Math.min(leftMs, hook.sleep.seconds * 1000), bound);
    else if (hook.httpGet) {
      const target = { space: this.#site.space, ip: this.lease.place.ip, container };
      await httpPasses(target, hook.httpGet, bound).catch(() => false); // a failed hook does not keep a pod
    }
  }

  #id({ container }: Tracked): string {
    return `${this.pod.metadata.uid}/${container.name}`;
  }

  #set(tracked: Tracked, change: Partial<ContainerView>): void {
    tracked.view = { ...tracked.view, ...change };
    this.#changed();
  }

  async #live(): Promise<void> {
    mkdirSync(this.lease.folder, { recursive: true });
    const sidecar = this.#init.find(({ container }) => container.restartPolicy === "Always");
    if (sidecar) {
      this.#set(sidecar, { phase: waiting("Unsupported", "the process kubelet runs no restartable init containers") });
      return await new Promise((ended) => this.#ending.signal.addEventListener("abort", () => ended(), { once: true }));
    }
    if (this.#site.hasPodNetworks) await this.#openNetwork();
    await this.#volumes();
    for (const tracked of this.#init) {
      await this.#keep(tracked, this.pod.spec.restartPolicy === "Never" ? "Never" : "OnFailure");
      if (tracked.view.phase.kind !== "ended" || tracked.view.phase.how.code !== 0) return;
    }
    await Promise.all(this.#main.map((tracked) => this.#keep(tracked, this.pod.spec.restartPolicy)));
  }

  async #openNetwork(): Promise<void> {
    const { place, folder } = this.lease;
    const wanted = { id: `${this.pod.metadata.uid}/${NETWORK}`, address: place.ip, log: join(folder, "network.log") };
    this.network = await PodNetwork.open(this.#site, wanted);
  }

  /** Runs a container, again as its policy says, until it is over or the pod ends. */
  async #keep(tracked: Tracked, policy: "Always" | "OnFailure" | "Never"): Promise<void> {
    const { signal } = this.#ending;
    for (let restarts = 0; !signal.aborted; restarts++) {
      const how = await this.#runOnce(tracked);
      if (!how) return;
      this.#set(tracked, { phase: { kind: "ended", how } });
      const isAgain = policy === "Always" || (policy === "OnFailure" && how.code !== 0);
      if (!isAgain || signal.aborted) return;
      if (restarts > 0) {
        this.#set(tracked, { phase: waiting("CrashLoopBackOff", "back-off restarting failed container"), last: how });
        await pause(Math.min(RESTART_MS_MAX, RESTART_MS * 2 ** restarts), signal);
        if (signal.aborted) {
          this.#set(tracked, { phase: { kind: "ended", how } });
          return;
        }
      }
      this.#set(tracked, { restarts: restarts + 1, last: how });
    }
  }

  /** One process from start to end; undefined where the pod ended before there was one. */
  async #runOnce(tracked: Tracked): Promise<Ended | undefined> {
    const { processes } = this.#site;
    const { signal } = this.#ending;
    const startedAt = new Date().toISOString();
    const request = await this.#whenThere(tracked, () => this.#request(tracked));
    if (!request || signal.aborted) return undefined;
    const probing = new AbortController();
    const id = this.#id(tracked);
    processes.forget(id);
    processes.spawn(request);
    const started = () => {
      const seen = processes.children.get(id);
      if (seen?.state !== "running" || tracked.pid !== undefined) return;
      tracked.pid = seen.pid;
      const { startupProbe, readinessProbe } = tracked.container;
      const phase: Phase = {
        kind: "running",
        startedAt,
        isStarted: !startupProbe,
        isReady: !startupProbe && !readinessProbe,
      };
      this.#set(tracked, { phase });
      this.#probe(tracked, seen.pid, probing.signal);
    };
    const hear = (changed: string) => changed === id && started();
    processes.on("change", hear);
    try {
      while (processes.isRunning(id)) await new Promise((wake) => processes.once("change", wake));
    } finally {
      processes.off("change", hear);
      probing.abort();
    }
    const wasStarted = tracked.pid !== undefined;
    tracked.pid = undefined;
    return { ...this.#ended(tracked, wasStarted), startedAt, finishedAt: new Date().toISOString() };
  }

  #ended(tracked: Tracked, wasStarted: boolean): Omit<Ended, "startedAt" | "finishedAt"> {
    const seen = this.#site.processes.children.get(this.#id(tracked));
    if (seen?.state !== "exited") throw new Error(`${this.#id(tracked)} is ${seen?.state}, not ended`);
    if (!wasStarted) return { code: COULD_NOT_START, signal: undefined, reason: "StartError", message: seen.detail };
    const signal = seen.signal === undefined ? undefined : signalNumber(seen.signal);
    const code = seen.code ?? 128 + (signal ?? 0);
    const said = readFileSync(this.#messageFile(tracked), "utf8").slice(0, MESSAGE_BYTES_MAX);
    const useLog = said === "" && code !== 0 && tracked.container.terminationMessagePolicy === "FallbackToLogsOnError";
    return { code, signal, reason: code === 0 ? "Completed" : "Error", message: useLog ? seen.detail : said };
  }

  /** What to spawn: environment, view, command. Throws NotThere for what is missing. */
  async #request(tracked: Tracked) {
    const { container } = tracked;
    const { place, folder, devices } = this.lease;
    const own = await environmentOf(this.#site.api, this.pod, container, place);
    const hostname = this.pod.spec.hostname ?? this.pod.metadata.name;
    const path = process.env.PATH ?? "";
    const env = { PATH: path, HOME: "/root", HOSTNAME: hostname, ...API_ENVIRONMENT, ...visible(devices), ...own };
    const image = container.image.replace(/(:[^/:]*)?(@.*)?$/, "");
    const head = container.command.length > 0 ? container.command : (this.#site.entrypoints[image] ?? []);
    const command = [...head, ...container.args].map((word) => expand(word, own));
    if (head.length === 0)
      throw new NotThere(`no command, and image "${image}" is no entrypoint of the process kubelet`);
    const sandbox = join(folder, "sandbox", container.name);
    mkdirSync(sandbox, { recursive: true });
    writeFileSync(this.#messageFile(tracked), "");
    chmodSync(this.#messageFile(tracked), 0o666);
    const script = sandboxScript({
      folder: sandbox,
      hostname,
      hosts: this.#site.names.file(this.pod.metadata.namespace),
      message: { source: this.#messageFile(tracked), target: container.terminationMessagePath },
      mounts: container.volumeMounts.map((mount) => this.#mount(mount)),
      workingDir: container.workingDir,
      command,
      user: userOf(this.pod, container),
    });
    const inside = (this.network ?? this.#site.space).inside("unshare", ["--mount", "--uts", "sh", "-c", script]);
    return { id: this.#id(tracked), ...inside, env, log: this.logFile(container.name), watchesStdin: false };
  }

  logFile(container: string): string {
    return join(this.lease.folder, `${container}.log`);
  }

  #messageFile({ container }: Tracked): string {
    return join(this.lease.folder, `${container.name}.message`);
  }

  #mount(mount: Container["volumeMounts"][number]): Mount {
    const volume = this.pod.spec.volumes.find(({ name }) => name === mount.name);
    const base = volume?.hostPath?.path ?? join(this.lease.folder, "volumes", mount.name);
    const source = join(base, mount.subPath);
    if (volume?.emptyDir) {
      mkdirSync(source, { recursive: true });
      chmodSync(source, 0o777); // whoever the container runs as
    }
    return { source, target: mount.mountPath, isReadOnly: mount.readOnly };
  }

  async #volumes(): Promise<void> {
    const { api } = this.#site;
    const site = { api, pod: this.pod, place: this.lease.place };
    for (const volume of this.pod.spec.volumes) {
      const folder = join(this.lease.folder, "volumes", volume.name);
      const made = await this.#whenThere(this.#main[0], () => makeVolume(site, volume, folder));
      if (made?.refreshAtMs) void this.#refresh(made.refreshAtMs, () => makeVolume(site, volume, folder));
    }
    this.#followUpdates(site);
  }

  /** What is mounted follows its ConfigMaps and Secrets, until the pod is over. */
  #followUpdates(site: Parameters<typeof makeVolume>[0]): void {
    const { updates } = this.#site;
    const hear = (changed: string) => {
      for (const volume of this.pod.spec.volumes) {
        if (!isMadeFrom(this.pod, volume, changed)) continue;
        const folder = join(this.lease.folder, "volumes", volume.name);
        void makeVolume(site, volume, folder).catch(() => undefined); // gone again: the files stay, as with a kubelet
      }
    };
    updates.on("changed", hear);
    for (const { signal } of [this.#ending, this.#over])
      signal.addEventListener("abort", () => updates.off("changed", hear), { once: true });
  }

  async #refresh(atMs: number, again: () => Promise<{ refreshAtMs: number | undefined }>): Promise<void> {
    let due: number | undefined = atMs;
    while (due !== undefined && !this.#ending.signal.aborted) {
      await pause(due - Date.now(), this.#ending.signal);
      if (this.#ending.signal.aborted) return;
      due = await again().then(
        ({ refreshAtMs }) => refreshAtMs,
        () => Date.now() + RETRY_MS, // the API server is away: the old token lasts a while yet
      );
    }
  }

  /** Repeats `make` while something that it needs is not there (L1); undefined where the pod ended first. */
  async #whenThere<T>(tracked: Tracked | undefined, make: () => Promise<T>): Promise<T | undefined> {
    while (!this.#ending.signal.aborted) {
      try {
        return await make();
      } catch (error) {
        const isAway = error instanceof ApiRefusal || error instanceof TypeError || isTimeout(error);
        if (!(error instanceof NotThere) && !isAway) throw error;
        const message = error instanceof Error ? error.message : "";
        if (tracked) this.#set(tracked, { phase: waiting("CreateContainerConfigError", message) });
      }
      await pause(RETRY_MS, this.#ending.signal);
    }
    return undefined;
  }

  #probe(tracked: Tracked, pid: number, signal: AbortSignal): void {
    const { container } = tracked;
    const { startupProbe, readinessProbe, livenessProbe } = container;
    const target = { space: this.#site.space, ip: this.lease.place.ip, pid, container };
    const update = (change: { isStarted?: boolean; isReady?: boolean }) => {
      const { phase } = tracked.view;
      if (phase.kind === "running" && !signal.aborted) this.#set(tracked, { phase: { ...phase, ...change } });
    };
    const fail = () => this.#site.processes.stop(this.#id(tracked), this.pod.spec.terminationGracePeriodSeconds * 1000);
    const rest = () => {
      update({ isStarted: true, isReady: !readinessProbe });
      if (readinessProbe) void watchProbe(target, readinessProbe, (isReady) => update({ isReady }), signal);
      if (livenessProbe) void watchProbe(target, livenessProbe, (isAlive) => !isAlive && fail(), signal);
    };
    if (!startupProbe) {
      rest();
      return;
    }
    const starting = new AbortController();
    const judge = (isStarted: boolean) => {
      starting.abort();
      if (isStarted) rest();
      else fail();
    };
    void watchProbe(target, startupProbe, judge, AbortSignal.any([signal, starting.signal]));
  }
}

const waiting = (reason: string, message = ""): Phase => ({ kind: "waiting", reason, message });
const isTimeout = (error: unknown) => error instanceof DOMException && error.name === "TimeoutError";

function visible(devices: readonly number[]): Record<string, string> {
  return devices.length === 0 ? {} : { NVIDIA_VISIBLE_DEVICES: devices.join(",") };
}

function signalNumber(name: string): number {
  return Object.entries(constants.signals).find(([known]) => known === name)?.[1] ?? 0;
}

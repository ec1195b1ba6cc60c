// A whole Muster on one machine: guard, nats-server, reconciled worker groups, control service, gateway. Owns the order in
// which they start and stop; what they do is theirs.
//
//   R1  everything it starts is a child of the guard, so nothing outlives it, however it ends.
//   R2  a gateway that dies is started again on the same addresses; it finds its state by watching.
import { fileURLToPath } from "node:url";
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import type { DraftOptions, EngineOptions, ServeLimits, SpeculationOptions } from "../../proto/gen/muster/v1/worker.ts";
import type { Inventory } from "../plan/hardware.ts";
import type { WorkerName } from "../reconcile/cluster.ts";
import { defaultLimits } from "../reconcile/limits.ts";
import { type Clock, Reconciler } from "../reconcile/run.ts";
import { type GroupStatus, Phase, servedModel } from "../reconcile/status.ts";
import { ControlServer } from "./control-server.ts";
import { Guarded } from "./guarded.ts";
import { LocalCluster } from "./local-cluster.ts";
import { type Nats, startNats } from "./nats.ts";
import { createRunFolder, type RunFolder } from "./run-folder.ts";

const MAIN = fileURLToPath(new URL("../cli/main.ts", import.meta.url));
const DRAFT_GROUP = "draft";
const POOL = "local";
const GATEWAY = "gateway";
const GATEWAY_RESTARTS_MAX = 10;
const GATEWAY_RESTART_WAIT_MS = 300;
/** Longest time for running streams to end after Ctrl-C. */
const DRAIN_MS = 10_000;
const STOP_TIMEOUT_MS = DRAIN_MS + 10_000;

export type LocalWish = {
  name: string;
  aliases: readonly string[];
  plan: ShardPlan;
  inventory: Inventory;
  engine: EngineOptions;
  limits: ServeLimits;
  draft: { plan: ShardPlan; tokens: number; waitMs: number; engine: EngineOptions } | undefined;
  http: string;
  grpc: string;
  apiKey: string | undefined;
};

export type Addresses = { http: string; grpc: string };

export type LocalEvents = {
  onModel: (status: GroupStatus) => void;
  onDraft: (status: GroupStatus) => void;
  /** Somebody asked for the end through the control service, or a part cannot be kept alive. */
  onEnd: (why: string, isFailure: boolean) => void;
};

const clock: Clock = {
  nowMs: Date.now,
  sleep: (signal, untilMs) =>
    new Promise((done) => {
      const finish = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", finish);
        done();
      };
      const timer = setTimeout(finish, Math.max(0, untilMs - Date.now()));
      signal.addEventListener("abort", finish, { once: true });
      if (signal.aborted) finish();
    }),
};

export class LocalRun {
  readonly folder: RunFolder;
  readonly guarded: Guarded;
  readonly #wish: LocalWish;
  readonly #events: LocalEvents;
  readonly #abort = new AbortController();
  readonly #loops: Promise<void>[] = [];
  #reconcilers: Reconciler[] = [];
  #control: ControlServer | undefined;
  #cluster: LocalCluster | undefined;
  #nats: Nats | undefined;
  #isStopping = false;

  private constructor(wish: LocalWish, events: LocalEvents, folder: RunFolder, guarded: Guarded) {
    this.#wish = wish;
    this.#events = events;
    this.folder = folder;
    this.guarded = guarded;
  }

  /** Everything is started when it resolves; models report through `events`, the gateway through `gateway()`. */
  static async start(wish: LocalWish, events: LocalEvents): Promise<LocalRun> {
    const folder = createRunFolder(new Date());
    const guarded = await Guarded.start(folder.path);
    const run = new LocalRun(wish, events, folder, guarded);
    try {
      await run.#startParts();
    } catch (error) {
      await guarded.close();
      throw error;
    }
    return run;
  }

  async #startParts(): Promise<void> {
    const { draft, inventory } = this.#wish;
    this.guarded.on("lost", () => this.#events.onEnd("the guard process ended", true));
    this.#control = await ControlServer.start(this.folder.control, () => this.#events.onEnd("asked to stop", false));
    const { guarded, folder } = this;
    this.#cluster = new LocalCluster({
      guarded,
      folder: folder.path,
      logs: folder.logs,
      inventory,
      command: (name, listen) => this.#workerCommand(name, listen),
    });
    if (draft) this.#nats = await startNats(guarded, folder.path, folder.logs);
    this.#reconcileModel();
    if (draft) this.#reconcileDraft(draft);
  }

  /** Starts the gateway; resolves with the addresses it listens on. Throws with its own words where it ends at once. */
  async gateway(): Promise<Addresses> {
    const addresses = await new Promise<Addresses>((done, fail) => {
      const onLine = (id: string, line: string) => {
        const found = id === GATEWAY ? addressesOf(line) : undefined;
        if (found) finish(() => done(found));
      };
      const onChange = (id: string) => {
        const seen = this.guarded.children.get(GATEWAY);
        if (id === GATEWAY && seen?.state === "exited")
          finish(() => fail(new Error(seen.detail || "the gateway ended at once")));
      };
      const finish = (act: () => void) => {
        this.guarded.off("line", onLine);
        this.guarded.off("change", onChange);
        act();
      };
      this.guarded.on("line", onLine);
      this.guarded.on("change", onChange);
      this.#startGateway({ http: this.#wish.http, grpc: this.#wish.grpc });
    });
    this.#keepGateway(addresses);
    return addresses;
  }

  /** Gateway first, then the groups, then everything else; bounded. */
  async stop(): Promise<void> {
    if (this.#isStopping) return;
    this.#isStopping = true;
    const bound = AbortSignal.timeout(STOP_TIMEOUT_MS);
    this.guarded.stop(GATEWAY, DRAIN_MS);
    await this.guarded.ended(GATEWAY, bound).catch(() => {});
    for (const reconciler of this.#reconcilers) reconciler.setGoal({ kind: "stop", graceMs: DRAIN_MS });
    const workers = [...this.guarded.children.keys()].filter((id) => id !== GATEWAY && id !== "nats");
    await Promise.all(workers.map((id) => this.guarded.ended(id, bound).catch(() => {})));
    this.#abort.abort();
    await Promise.all(this.#loops);
    this.#nats?.stop();
    this.#cluster?.close();
    this.#control?.stop();
    await this.guarded.close();
  }

  #reconcileModel(): void {
    const { plan, engine, limits, draft, name, aliases } = this.#wish;
    const naming = { name, aliases, createdUnixS: BigInt(Math.floor(Date.now() / 1000)) };
    const speculation: SpeculationOptions | undefined =
      draft && this.#nats
        ? {
            enabled: true,
            natsUrl: this.#nats.url,
            natsToken: this.#nats.token,
            natsUser: "",
            pool: POOL,
            draftTokens: draft.tokens,
            draftWaitMs: draft.waitMs,
          }
        : undefined;
    this.#run(
      name,
      new Reconciler(
        { kind: "serve", plan, engine, speculation, limits, draft: undefined },
        this.#options(name, (status) => {
          this.#control?.setModel(servedModel(naming, plan, status));
          this.#events.onModel(status);
        }),
      ),
    );
  }

  #reconcileDraft(wish: NonNullable<LocalWish["draft"]>): void {
    const nats = this.#nats;
    if (!nats) return;
    const draft: DraftOptions = {
      natsUrl: nats.url,
      natsToken: nats.token,
      natsUser: "",
      pool: POOL,
      sessionsMax: this.#wish.limits.runningMax,
      draftTokensMax: wish.tokens,
    };
    const model = wish.plan.model?.name ?? "";
    this.#run(
      DRAFT_GROUP,
      new Reconciler(
        { kind: "serve", plan: wish.plan, engine: wish.engine, speculation: undefined, limits: undefined, draft },
        this.#options(DRAFT_GROUP, (status) => {
          const up = status.phase === Phase.SERVING;
          this.#control?.setDraft({ pool: POOL, model, up, detail: status.cause });
          this.#events.onDraft(status);
        }),
      ),
    );
  }

  #options(group: string, onStatus: (status: GroupStatus) => void) {
    if (!this.#cluster) throw new Error("the cluster is not there yet");
    return { group, cluster: this.#cluster, clock, limits: defaultLimits, onStatus };
  }

  #run(group: string, reconciler: Reconciler): void {
    this.#reconcilers.push(reconciler);
    const loop = reconciler.run(this.#abort.signal).catch((error: unknown) => {
      this.#events.onEnd(`the reconciler of ${group} failed: ${error instanceof Error ? error.message : error}`, true);
    });
    this.#loops.push(loop);
  }

  #workerCommand(name: WorkerName, listen: string) {
    const args = [
      "worker",
      "--listen",
      listen,
      "--incarnation",
      String(name.incarnation),
      "--worker",
      String(name.worker),
    ];
    return {
      command: process.execPath,
      args: [MAIN, ...args, "--comm-host", "127.0.0.1", "--lifeline"],
      env: childEnv(),
    };
  }

  #startGateway(addresses: Addresses): void {
    const args = [
      MAIN,
      "gateway",
      "--control",
      this.folder.control,
      "--http",
      addresses.http,
      "--grpc",
      addresses.grpc,
    ];
    const env = { ...childEnv(), ...(this.#wish.apiKey ? { MUSTER_API_KEY: this.#wish.apiKey } : {}) };
    const log = `${this.folder.logs}/gateway.log`;
    this.guarded.forget(GATEWAY);
    this.guarded.spawn({
      id: GATEWAY,
      command: process.execPath,
      args: [...args, "--lifeline"],
      env,
      log,
      watchesStdin: true,
    });
  }

  #keepGateway(addresses: Addresses): void {
    const again = { http: addresses.http.replace(/^https?:\/\//, ""), grpc: addresses.grpc };
    let restarts = 0;
    this.guarded.on("change", (id) => {
      const seen = this.guarded.children.get(GATEWAY);
      if (id !== GATEWAY || seen?.state !== "exited" || this.#isStopping) return;
      if (++restarts > GATEWAY_RESTARTS_MAX)
        return this.#events.onEnd(`the gateway ends again and again: ${seen.detail}`, true);
      setTimeout(() => {
        if (!this.#isStopping) this.#startGateway(again);
      }, GATEWAY_RESTART_WAIT_MS * restarts).unref();
    });
  }
}

/** What a child needs of our environment, and no secrets. */
function childEnv(): Record<string, string> {
  const env: Record<string, string> = {};
  for (const name of ["PATH", "HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME", "MUSTER_ADDON", "MUSTER_LOG", "NO_COLOR"]) {
    const value = process.env[name];
    if (value !== undefined) env[name] = value;
  }
  return env;
}

function addressesOf(line: string): Addresses | undefined {
  if (!line.startsWith("{")) return undefined;
  try {
    const { http, grpc } = JSON.parse(line);
    return typeof http === "string" && typeof grpc === "string" ? { http, grpc } : undefined;
  } catch {
    return undefined;
  }
}

// Cluster over local processes: the same reconciler as on Kubernetes, workers as supervised children of the guard, one unix
// socket each in the run folder. Owns processes, sockets and the groups' records; decides nothing.
import { existsSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type ClientReadableStream, credentials, Metadata } from "@grpc/grpc-js";
import {
  type LoadProgress,
  type LoadRequest,
  WorkerClient,
  type WorkerDescription,
} from "../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../proto/grpc.ts";
import type { Inventory } from "../plan/hardware.ts";
import {
  type Action,
  type Cluster,
  freshRecord,
  type GroupRecord,
  type GroupSeen,
  isSameWorker,
  type WorkerName,
  type WorkerSeen,
  type WorkerView,
} from "../reconcile/cluster.ts";
import type { Guarded, SpawnRequest } from "./guarded.ts";

const DESCRIBE_TIMEOUT_MS = 2_000;
const CONNECT_TIMEOUT_MS = 30_000;

type Running = {
  name: WorkerName;
  id: string;
  address: string;
  client: WorkerClient;
  load: ClientReadableStream<LoadProgress> | undefined;
  last: WorkerDescription | undefined;
  silentSinceMs: number;
};

export type LocalOptions = {
  guarded: Guarded;
  folder: string;
  logs: string;
  inventory: Inventory;
  /** How a worker is started; gets its name and the gRPC target it shall listen on. */
  command: (name: WorkerName, listen: string) => Pick<SpawnRequest, "command" | "args" | "env">;
  now?: () => number;
};

export class LocalCluster implements Cluster {
  readonly #options: LocalOptions;
  readonly #now: () => number;
  readonly #workers = new Map<string, Running>();
  readonly #wakes = new Set<() => void>();
  readonly #onChange = (id: string) => {
    if (this.#workers.has(id)) this.#changed();
  };

  constructor(options: LocalOptions) {
    this.#options = options;
    this.#now = options.now ?? Date.now;
    options.guarded.on("change", this.#onChange);
  }

  async inventory(): Promise<Inventory> {
    return this.#options.inventory;
  }

  async observe(group: string, signal: AbortSignal): Promise<GroupSeen> {
    const record = this.#readRecord(group);
    const mine = [...this.#workers.values()].filter((worker) => worker.name.group === group);
    for (const worker of mine) {
      const isOver = !this.#options.guarded.isRunning(worker.id) && worker.name.incarnation < record.incarnation;
      if (isOver) this.#forget(worker);
    }
    const known = mine.filter((worker) => this.#workers.has(worker.id));
    return { group, record, workers: await Promise.all(known.map((worker) => this.#see(worker, signal))) };
  }

  async apply(action: Action): Promise<void> {
    switch (action.kind) {
      case "record":
        return this.#writeRecord(action.group, action.replaces, action.record);
      case "start-worker":
        return this.#start(action.name);
      case "load-worker":
        return this.#load(action.name, action.request);
      case "stop-worker": {
        const worker = this.#find(action.name);
        if (worker) this.#options.guarded.stop(worker.id, action.graceMs);
        return;
      }
    }
  }

  async changed(signal: AbortSignal, untilMs: number): Promise<void> {
    await new Promise<void>((done) => {
      const finish = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", finish);
        this.#wakes.delete(finish);
        done();
      };
      const timer = setTimeout(finish, Math.max(0, untilMs - this.#now()));
      signal.addEventListener("abort", finish, { once: true });
      this.#wakes.add(finish);
      if (signal.aborted) finish();
    });
  }

  close(): void {
    this.#options.guarded.off("change", this.#onChange);
    for (const worker of [...this.#workers.values()]) this.#forget(worker);
  }

  #changed(): void {
    for (const wake of [...this.#wakes]) wake();
  }

  #find(name: WorkerName): Running | undefined {
    return [...this.#workers.values()].find((worker) => isSameWorker(worker.name, name));
  }

  #start(name: WorkerName): void {
    if (this.#find(name)) return;
    const id = `${fileName(name.group)}-${name.incarnation}-${name.worker}`;
    const socket = join(this.#options.folder, `${id}.sock`);
    rmSync(socket, { force: true });
    const address = `unix:${socket}`;
    const client = new WorkerClient(address, credentials.createInsecure(), channelOptions);
    const worker: Running = { name, id, address, client, load: undefined, last: undefined, silentSinceMs: this.#now() };
    this.#workers.set(id, worker);
    const command = this.#options.command(name, address);
    this.#options.guarded.spawn({ id, ...command, log: join(this.#options.logs, `${id}.log`), watchesStdin: true });
    client.waitForReady(Date.now() + CONNECT_TIMEOUT_MS, () => this.#changed());
  }

  async #load(name: WorkerName, request: LoadRequest): Promise<void> {
    const worker = this.#find(name);
    if (!worker || worker.load) return;
    const stream = worker.client.load(request);
    worker.load = stream;
    await new Promise<void>((taken, refused) => {
      const heard = () => {
        this.#changed();
        taken();
      };
      stream.on("data", heard);
      stream.on("end", heard);
      stream.on("error", (error) => {
        worker.load = undefined;
        this.#changed();
        refused(error); // after it was taken this is no news: observe shows what became of the worker
      });
    });
  }

  async #see(worker: Running, signal: AbortSignal): Promise<WorkerSeen> {
    const { name, address } = worker;
    const seen = this.#options.guarded.children.get(worker.id);
    if (seen?.state === "exited") {
      const { code, signal: by, detail } = seen;
      return { name, address, state: { kind: "exited", code: code ?? null, signal: by ?? null, detail } };
    }
    return { name, address, state: { kind: "running", view: await this.#describe(worker, signal) } };
  }

  #describe(worker: Running, signal: AbortSignal): Promise<WorkerView> {
    return new Promise((done) => {
      const deadline = Date.now() + DESCRIBE_TIMEOUT_MS;
      const call = worker.client.describe(
        { incarnation: worker.name.incarnation },
        new Metadata(),
        { deadline },
        (error, description) => {
          signal.removeEventListener("abort", cancel);
          if (!error) {
            worker.last = description;
            worker.silentSinceMs = this.#now();
            return done({ kind: "described", description });
          }
          done({ kind: "silent", sinceMs: worker.silentSinceMs, detail: error.details, last: worker.last });
        },
      );
      const cancel = () => call.cancel();
      signal.addEventListener("abort", cancel, { once: true });
    });
  }

  #forget(worker: Running): void {
    worker.load?.cancel();
    worker.client.close();
    this.#options.guarded.forget(worker.id);
    this.#workers.delete(worker.id);
    rmSync(worker.address.slice("unix:".length), { force: true });
  }

  #recordFile(group: string): string {
    return join(this.#options.folder, `${fileName(group)}.record`);
  }

  #readRecord(group: string): GroupRecord {
    const file = this.#recordFile(group);
    if (!existsSync(file)) return freshRecord();
    return JSON.parse(readFileSync(file, "utf8"), (key, value) => (key === "incarnation" ? BigInt(value) : value));
  }

  #writeRecord(group: string, replaces: bigint, record: GroupRecord): void {
    const text = JSON.stringify(record, (_key, value) => (typeof value === "bigint" ? value.toString() : value));
    const file = this.#recordFile(group);
    if (existsSync(file) && readFileSync(file, "utf8") === text) return;
    const stored = this.#readRecord(group).incarnation;
    if (stored !== replaces) throw new Error(`record of ${group}: incarnation is ${stored}, not ${replaces}`);
    writeFileSync(`${file}.new`, text, { mode: 0o600 });
    renameSync(`${file}.new`, file);
  }
}

/** A group's name as part of a file name; short, because socket paths are. */
const fileName = (group: string) => group.replaceAll(/[^\w.-]+/g, "_").slice(0, 24);

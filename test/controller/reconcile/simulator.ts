// A whole cluster in memory with virtual time: a real implementation of Cluster and Clock whose workers start, load,
// connect, serve, fall silent and die by a seeded schedule. Owns the truth; `violations` says where the reconciler broke it.
import { cpuInventory, type Inventory } from "../../../controller/plan/hardware.ts";
import {
  type Action,
  type Cluster,
  freshRecord,
  type GroupRecord,
  type GroupSeen,
  isSameWorker,
  type WorkerName,
  type WorkerSeen,
} from "../../../controller/reconcile/cluster.ts";
import type { Clock } from "../../../controller/reconcile/run.ts";
import { type WorkerDescription, WorkerPhase } from "../../../proto/gen/muster/v1/worker.ts";

/** mulberry32: small, seeded, good enough to choose faults. */
export function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** Chances of each fault while `untilMs` is not reached. */
export type Faults = {
  untilMs: number;
  crash: number;
  /** A crash comes at most this long after the start. */
  crashWithinMs: number;
  silence: number;
  applyFails: number;
  observeFails: number;
  controllerDies: number;
  startComesLate: number;
};

type SimWorker = {
  name: WorkerName;
  address: string;
  description: WorkerDescription;
  hasSpoken: boolean;
  silentSinceMs: number | undefined;
  exit: { code: number | null; signal: string | null } | undefined;
  isStopping: boolean;
};

/** Lets whoever waits for a change have its turn before time goes on. */
const turn = (): Promise<void> => new Promise((done) => setImmediate(done));

/** A quiet event changes nothing that could be observed. */
type Event = { atMs: number; order: number; run: () => void; isQuiet: boolean };

const BYTES = 1000n;

export class SimCluster implements Cluster, Clock {
  readonly violations: string[] = [];
  readonly trace: string[] = [];
  /** Whatever went wrong by the schedule; no failure may be counted without one. */
  injected = 0;
  /** Called where the controller dies. */
  onControllerDeath: () => void = () => {};
  /** Called at the end of time. */
  onEnd: () => void = () => {};
  record: GroupRecord = freshRecord();
  #now = 0;
  #order = 0;
  #events: Event[] = [];
  #workers: SimWorker[] = [];
  #visible: WorkerName[] = [];
  #listeners: (() => void)[] = [];
  readonly #workerCount: number;
  readonly #endMs: number;
  readonly #faults: Faults;
  readonly #random: () => number;

  constructor(seed: number, options: { workers: number; endMs: number; faults: Faults }) {
    this.#random = randomOf(seed);
    this.#workerCount = options.workers;
    this.#endMs = options.endMs;
    this.#faults = options.faults;
  }

  // ---- Clock ----

  nowMs(): number {
    return this.#now;
  }

  async sleep(signal: AbortSignal, untilMs: number): Promise<void> {
    while (!signal.aborted && this.#step(untilMs)) await turn();
  }

  // ---- Cluster ----

  async inventory(): Promise<Inventory> {
    return cpuInventory(this.#workerCount);
  }

  async observe(group: string): Promise<GroupSeen> {
    if (this.#happens(this.#faults.observeFails)) throw new Error("the list of workers did not answer");
    this.#visible = this.#workers.filter((worker) => worker.exit === undefined).map((worker) => worker.name);
    return { group, record: this.record, workers: this.#workers.map((worker) => this.#seen(worker)) };
  }

  async apply(action: Action): Promise<void> {
    const isCut = this.#happens(this.#faults.applyFails);
    // A call that fails may have had its effect: half of them have.
    if (isCut && this.#random() < 0.5) this.#throwCut();
    this.#tick(5);
    this.#do(action);
    if (this.#happens(this.#faults.controllerDies)) {
      this.injected += 1;
      this.#note("controller dies");
      this.onControllerDeath();
      throw new Error("controller died");
    }
    if (isCut) this.#throwCut();
  }

  async changed(signal: AbortSignal, untilMs: number): Promise<void> {
    await new Promise<void>((done) => {
      this.#listeners.push(done);
      this.#events.push({ atMs: untilMs, order: this.#order++, run: done, isQuiet: true });
      signal.addEventListener("abort", () => this.#forget(done), { once: true });
    });
  }

  /** Nobody waits for it any more. */
  #forget(done: () => void): void {
    this.#events = this.#events.filter((event) => event.run !== done);
    this.#listeners = this.#listeners.filter((listener) => listener !== done);
    done();
  }

  // ---- truth ----

  get serving(): boolean {
    const own = this.#workers.filter(
      (worker) => worker.exit === undefined && worker.name.incarnation === this.record.incarnation,
    );
    return own.length === this.#workerCount && own.every((worker) => worker.description.phase === WorkerPhase.SERVING);
  }

  get runningCount(): number {
    return this.#workers.filter((worker) => worker.exit === undefined).length;
  }

  /** A leader address that was just told must stand for a whole incarnation, as last seen. */
  checkLeader(address: string, incarnation: bigint): void {
    const leader = this.#workers.find((worker) => worker.address === address);
    if (leader === undefined || leader.name.incarnation !== incarnation || leader.name.worker !== 0) {
      this.violations.push(`leader ${address} is not worker 0 of incarnation ${incarnation}`);
    }
    const own = this.#workers.filter((worker) => worker.name.incarnation === incarnation);
    if (own.length !== this.#workerCount || own.some((worker) => worker.description.phase < WorkerPhase.SERVING)) {
      this.violations.push(`leader told while incarnation ${incarnation} is not whole`);
    }
  }

  // ---- inside ----

  #happens(chance: number): boolean {
    return this.#now < this.#faults.untilMs && this.#random() < chance;
  }

  #throwCut(): never {
    this.injected += 1;
    throw new Error("connection reset");
  }

  #note(text: string): void {
    this.trace.push(`${this.#now.toFixed(0)} ${text}`);
  }

  #after(delayMs: number, run: () => void): void {
    this.#events.push({ atMs: this.#now + delayMs, order: this.#order++, run, isQuiet: false });
  }

  /** Runs the next event up to `untilMs`; false where there was none and time has come to `untilMs`. */
  #step(untilMs: number): boolean {
    this.#events.sort((one, other) => one.atMs - other.atMs || one.order - other.order);
    const next = this.#events[0];
    if (next !== undefined && next.atMs <= untilMs) {
      this.#events.shift();
      this.#now = Math.max(this.#now, next.atMs);
      next.run();
      if (!next.isQuiet) for (const done of this.#listeners.splice(0)) done();
    } else this.#now = Math.max(this.#now, untilMs);
    if (this.#now >= this.#endMs) this.onEnd();
    return next !== undefined && next.atMs <= untilMs && this.#now < this.#endMs;
  }

  #tick(delayMs: number): void {
    const untilMs = this.#now + delayMs;
    while (this.#step(untilMs));
  }

  #find(name: WorkerName): SimWorker | undefined {
    return this.#workers.find((worker) => isSameWorker(worker.name, name));
  }

  #seen(worker: SimWorker): WorkerSeen {
    const { name, address, exit, description, hasSpoken, silentSinceMs } = worker;
    if (exit !== undefined) return { name, address, state: { kind: "exited", ...exit, detail: "" } };
    if (silentSinceMs === undefined) {
      return {
        name,
        address,
        state: { kind: "running", view: { kind: "described", description: { ...description } } },
      };
    }
    const last = hasSpoken ? { ...description } : undefined;
    return {
      name,
      address,
      state: { kind: "running", view: { kind: "silent", sinceMs: silentSinceMs, detail: "refused", last } },
    };
  }

  #do(action: Action): void {
    switch (action.kind) {
      case "record":
        if (this.record.incarnation !== action.replaces) {
          if (this.record.incarnation === action.record.incarnation) return;
          throw new Error("another controller has decided");
        }
        if (action.record.incarnation < this.record.incarnation) this.violations.push("incarnation went back");
        if (action.record.incarnation !== this.record.incarnation)
          this.#note(`incarnation ${action.record.incarnation}`);
        this.record = action.record;
        return;
      case "start-worker":
        this.#start(action.name);
        return;
      case "load-worker":
        this.#load(action.name, action.request.incarnation);
        return;
      case "stop-worker":
        this.#stop(action.name, action.graceMs);
        return;
      default:
        throw new Error(`unreachable ${JSON.stringify(action satisfies never)}`);
    }
  }

  #start(name: WorkerName): void {
    if (this.#find(name) !== undefined) return;
    const { incarnation, begun, notBeforeMs } = this.record;
    if (!begun || incarnation !== name.incarnation)
      this.violations.push(`I1: start of #${name.incarnation} is not recorded`);
    if (this.#now < notBeforeMs) this.violations.push(`I4: start of #${name.incarnation} before its back-off is over`);
    const other = this.#visible.find(
      (seen) => seen.incarnation !== name.incarnation && this.#find(seen)?.exit === undefined,
    );
    if (other !== undefined) this.violations.push(`I2: #${name.incarnation} starts beside #${other.incarnation}`);
    if (this.#happens(this.#faults.startComesLate)) {
      this.injected += 1;
      this.#after(this.#random() * 20_000, () => this.#appear(name));
      throw new Error("deadline exceeded");
    }
    this.#appear(name);
  }

  #appear(name: WorkerName): void {
    if (this.#find(name) !== undefined) return;
    const worker: SimWorker = {
      name,
      address: `sim:${name.incarnation}.${name.worker}`,
      description: {
        incarnation: name.incarnation,
        worker: name.worker,
        phase: WorkerPhase.IDLE,
        commAddress: "",
        bytesLoaded: 0n,
        bytesTotal: BYTES,
        numericsId: "",
        fault: undefined,
        cpu: "sim",
      },
      hasSpoken: false,
      silentSinceMs: this.#now,
      exit: undefined,
      isStopping: false,
    };
    this.#workers.push(worker);
    this.#note(`start ${name.incarnation}.${name.worker}`);
    this.#later(worker, 50 + this.#random() * 900, () => {
      worker.hasSpoken = true;
      worker.silentSinceMs = undefined;
      worker.description.commAddress = `${worker.address}/comm`;
    });
    if (this.#happens(this.#faults.crash)) {
      this.#later(worker, this.#random() * this.#faults.crashWithinMs, () => this.#crash(worker));
    }
    if (this.#happens(this.#faults.silence))
      this.#later(worker, this.#random() * 30_000, () => this.#fallSilent(worker));
  }

  /** As `#after`, but not where the worker is dead by then. */
  #later(worker: SimWorker, delayMs: number, run: () => void): void {
    this.#after(delayMs, () => {
      if (worker.exit === undefined) run();
    });
  }

  #crash(worker: SimWorker): void {
    this.injected += 1;
    this.#exit(worker, null, "SIGKILL");
  }

  #exit(worker: SimWorker, code: number | null, signal: string | null): void {
    worker.exit = { code, signal };
    this.#note(`exit ${worker.name.incarnation}.${worker.name.worker} ${code ?? signal}`);
    for (const peer of this.#peers(worker)) {
      if (peer.description.phase < WorkerPhase.CONNECTING || peer.isStopping) continue;
      this.#later(peer, this.#random() * 500, () => {
        peer.description.phase = WorkerPhase.FAILED;
      });
    }
  }

  #fallSilent(worker: SimWorker): void {
    if (worker.silentSinceMs !== undefined) return;
    this.injected += 1;
    worker.silentSinceMs = this.#now;
    this.#later(worker, this.#random() * 30_000, () => {
      worker.silentSinceMs = undefined;
    });
  }

  #peers(worker: SimWorker): SimWorker[] {
    return this.#workers.filter(
      (peer) => peer !== worker && peer.exit === undefined && peer.name.incarnation === worker.name.incarnation,
    );
  }

  #load(name: WorkerName, incarnation: bigint): void {
    const worker = this.#find(name);
    if (worker === undefined || worker.exit !== undefined) throw new Error("connection refused");
    if (incarnation !== name.incarnation) this.violations.push("a worker was asked to load for another incarnation");
    if (worker.silentSinceMs !== undefined) throw new Error("deadline exceeded");
    if (worker.description.phase !== WorkerPhase.IDLE) return;
    worker.description.phase = WorkerPhase.LOADING;
    const partMs = (this.#random() < 0.2 ? 20_000 : 400) * this.#random();
    for (let part = 1; part <= 4; part++) {
      this.#later(worker, part * partMs, () => {
        worker.description.bytesLoaded = (BYTES * BigInt(part)) / 4n;
        if (part === 4) this.#connect(worker);
      });
    }
  }

  #connect(worker: SimWorker): void {
    worker.description.phase = WorkerPhase.CONNECTING;
    const all = [worker, ...this.#peers(worker)];
    if (all.length < this.#workerCount || all.some((peer) => peer.description.phase !== WorkerPhase.CONNECTING)) return;
    for (const peer of all) {
      this.#later(peer, this.#random() * 200, () => {
        if (peer.description.phase === WorkerPhase.CONNECTING) peer.description.phase = WorkerPhase.WARMING;
      });
      this.#later(peer, 300 + this.#random() * 500, () => {
        if (peer.description.phase === WorkerPhase.WARMING) this.#serve(peer);
      });
    }
  }

  #serve(worker: SimWorker): void {
    worker.description.phase = WorkerPhase.SERVING;
    worker.description.numericsId = "sim";
    this.#note(`serve ${worker.name.incarnation}.${worker.name.worker}`);
    const other = this.#workers.find(
      (seen) =>
        seen.exit === undefined &&
        seen.description.phase === WorkerPhase.SERVING &&
        seen.name.incarnation !== worker.name.incarnation,
    );
    if (other !== undefined)
      this.violations.push(`#${worker.name.incarnation} serves beside #${other.name.incarnation}`);
  }

  #stop(name: WorkerName, graceMs: number): void {
    const worker = this.#find(name);
    if (worker === undefined || worker.exit !== undefined || worker.isStopping) return;
    worker.isStopping = true;
    this.#later(worker, graceMs * this.#random(), () => this.#exit(worker, 0, null));
  }
}

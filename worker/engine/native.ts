// The only file that loads the addon. Owns the way between promises and the addon's events; decides nothing.
//
//   T1  results and faults come in launch order: the addon answers in ticket order.
//   T2  after `closed` every launch that is still waiting is rejected.
import { createRequire } from "node:module";
import { resolve } from "node:path";
import type { ExpertMap } from "../../proto/gen/muster/v1/plan.ts";
import type { StepPlan, TensorSlice } from "../../proto/gen/muster/v1/worker.ts";
import { describe, describeStage } from "./describe.ts";
import { ABI, decodeResult, encodeStep } from "./encode.ts";
import {
  type CommListener,
  type Engine,
  EngineError,
  type EngineFault,
  type EngineRequest,
  type RankMemory,
  type StepResult,
} from "./engine.ts";
import { numericsWith } from "./expert-map.ts";

export type Devices = { isas: string[]; cpu: string; cpus: number; memoryBytes: number };

type Handle = { readonly engineHandle: unique symbol };
type ListenerHandle = { readonly listenerHandle: unique symbol };
type Events = (kind: number, ...rest: unknown[]) => void;

type Addon = {
  abi: number;
  open(request: object, listener: ListenerHandle | null, events: Events): { fault: EngineFault | null; engine: Handle };
  launch(engine: Handle, words: Uint32Array): EngineFault | null;
  stage(engine: Handle, request: object): EngineFault | null;
  cancel(engine: Handle): void;
  close(engine: Handle): void;
  memory(engine: Handle): RankMemory[];
  expertTokens(engine: Handle): number[][];
  listen(address: string): { fault: EngineFault | null; address: string; handle: ListenerHandle };
  devices(): Devices;
  noise(seedLow: bigint, seedHigh: bigint, index: number, domain: number, id: number): bigint;
  gumbel(bits: bigint): number;
};

// Kinds of events: native/addon/session.h.
const PROGRESS = 0;
const OPENED = 1;
const STEP = 2;
const CLOSED = 3;
const STAGED = 4;
const PHASES = ["loading", "connecting", "warming"] as const;

let loaded: Addon | undefined;

function addon(): Addon {
  if (loaded !== undefined) return loaded;
  const path = resolve(process.env.MUSTER_ADDON || resolve(import.meta.dirname, "../../native/build/muster.node"));
  let found: unknown;
  try {
    found = createRequire(import.meta.url)(path);
  } catch (cause) {
    throw new Error(`the native engine ${path} cannot be loaded: run "npm run setup", which builds it`, { cause });
  }
  loaded = parseAddon(found, path);
  return loaded;
}

function parseAddon(value: unknown, path: string): Addon {
  if (typeof value !== "object" || value === null || !("abi" in value) || value.abi !== ABI)
    throw new Error(`the native engine ${path} is of another version: run "npm run setup", which builds it anew`);
  return value as Addon;
}

/** What this machine offers: instruction sets best first, and the CPUs that the cgroup quota allows. */
export const devices = (): Devices => addon().devices();

/** The noise of one id as 64 bits, and what bits give as Gumbel noise: the same as every engine's. */
export const noiseBits = (seed: { low: bigint; high: bigint }, index: number, domain: number, id: number): bigint =>
  addon().noise(seed.low, seed.high, index, domain, id);
export const gumbel = (bits: bigint): number => addon().gumbel(bits);

const handles = new WeakMap<CommListener, ListenerHandle>();

/** Opens the socket of the collectives at HOST or HOST:PORT; no port, or port 0, picks a free one. Throws EngineError. */
export function listenComm(address: string): CommListener {
  const opened = addon().listen(address.includes(":") ? address : `${address}:0`);
  if (opened.fault !== null) throw new EngineError(opened.fault);
  const listener = { address: opened.address };
  handles.set(listener, opened.handle);
  return listener;
}

/** Reads the worker's bytes, connects the ranks and agrees with them. Rejects with EngineError; nothing stays open then. */
export async function openEngine(request: EngineRequest): Promise<Engine> {
  const described = describe(request);
  request.signal?.throwIfAborted();
  const engine = new NativeEngine(request, described);
  await engine.opened;
  return engine;
}

// A listener serves one engine.
function takeListener(comm: EngineRequest["comm"]): ListenerHandle | null {
  if (comm === undefined) return null;
  const handle = handles.get(comm.listener);
  if (handle === undefined)
    throw new EngineError({
      code: "invalid",
      field: "comm.listener",
      detail: "is not of listenComm, or was used",
      rank: -1,
    });
  handles.delete(comm.listener);
  return handle;
}

type Waiting = { resolve(result: StepResult): void; reject(error: Error): void };

class NativeEngine implements Engine {
  numericsId = "";
  experts: ExpertMap | undefined;
  /** With the plan's own map of experts. */
  #baseId = "";
  #staged: ExpertMap | undefined;
  #staging: PromiseWithResolvers<void> | undefined;
  readonly opened: Promise<void>;
  readonly #request: EngineRequest;
  readonly #handle: Handle;
  readonly #waiting: Waiting[] = [];
  readonly #open = Promise.withResolvers<void>();
  readonly #closed = Promise.withResolvers<void>();
  #isClosing = false;
  readonly #abort: () => void;

  constructor(request: EngineRequest, described: object) {
    this.#request = request;
    this.opened = this.#open.promise;
    const made = addon().open(described, takeListener(request.comm), (kind, ...rest) => this.#event(kind, rest));
    if (made.fault !== null) throw new EngineError(made.fault);
    this.#handle = made.engine;
    this.#abort = () => addon().cancel(this.#handle);
    request.signal?.addEventListener("abort", this.#abort, { once: true });
  }

  async launch(plan: Parameters<Engine["launch"]>[0]): Promise<StepResult> {
    const fault = addon().launch(this.#handle, encodeStep(plan));
    if (fault !== null) throw new EngineError(fault);
    const switched = isSwitching(plan) ? this.#staged : undefined;
    const result = await new Promise<StepResult>((resolve, reject) => this.#waiting.push({ resolve, reject }));
    if (switched !== undefined) {
      this.numericsId = numericsWith(this.#baseId, switched);
      this.experts = switched;
    }
    return result;
  }

  async stage(map: ExpertMap, slices: readonly TensorSlice[]): Promise<void> {
    if (this.#staging !== undefined) throw busy();
    this.#staged = undefined;
    const request = describeStage(this.#request, map, slices);
    const staging = Promise.withResolvers<void>();
    const fault = addon().stage(this.#handle, request);
    if (fault !== null) throw new EngineError(fault);
    this.#staging = staging;
    await staging.promise;
    this.#staged = map;
  }

  memory(): RankMemory[] {
    return addon().memory(this.#handle);
  }

  expertTokens(): number[][] {
    return addon().expertTokens(this.#handle);
  }

  close(): Promise<void> {
    if (!this.#isClosing) addon().close(this.#handle);
    this.#isClosing = true;
    return this.#closed.promise;
  }

  #event(kind: number, rest: unknown[]): void {
    if (kind === PROGRESS) this.#request.onProgress?.(...parseProgress(rest));
    else if (kind === OPENED) this.#onOpened(parseOpened(rest));
    else if (kind === STEP) this.#onStep(rest);
    else if (kind === STAGED) this.#onStaged(parseFault(rest));
    else if (kind === CLOSED) this.#onClosed();
    else throw new Error(`the engine sent an event of unknown kind ${kind}`);
  }

  #onOpened({ fault, numericsId }: { fault: EngineFault | null; numericsId: string }): void {
    const { signal } = this.#request;
    signal?.removeEventListener("abort", this.#abort);
    this.numericsId = numericsId;
    this.#baseId = numericsId;
    const error = signal?.aborted ? signal.reason : fault && new EngineError(fault);
    if (error) this.close().then(() => this.#open.reject(error));
    else this.#open.resolve();
  }

  #onStep(rest: unknown[]): void {
    const waiting = this.#waiting.shift();
    if (waiting === undefined) throw new Error("the engine answered a step that was not launched");
    const { fault, encoded, stepMs, waitMs } = parseStep(rest);
    if (fault === null) waiting.resolve({ ...decodeResult(encoded), stepMs, waitMs });
    else waiting.reject(new EngineError(fault));
  }

  #onStaged(fault: EngineFault | null): void {
    const staging = this.#staging;
    this.#staging = undefined;
    if (fault === null) staging?.resolve();
    else staging?.reject(new EngineError(fault));
  }

  #onClosed(): void {
    this.#closed.resolve();
    const detail = "was closed before the step was done";
    for (const { reject } of this.#waiting.splice(0))
      reject(new EngineError({ code: "internal", field: "engine", detail, rank: -1 }));
  }
}

const isSwitching = ({ updates }: StepPlan): boolean => updates.some(({ kind }) => kind?.$case === "experts");
const busy = (): EngineError =>
  new EngineError({ code: "invalid", field: "stage", detail: "another map is being staged", rank: -1 });

// What an event carries; the addon is trusted to keep to session.h.
function parseProgress(rest: unknown[]) {
  const [phase, done, total] = rest as [number, number, number];
  return [PHASES[phase] ?? "loading", done, total] as const;
}
const parseFault = ([fault]: unknown[]) => fault as EngineFault | null;
function parseOpened(rest: unknown[]) {
  const [fault, numericsId] = rest as [EngineFault | null, string];
  return { fault, numericsId };
}
function parseStep(rest: unknown[]) {
  const [fault, words, details, logits, stepMs, waitMs] = rest as [
    EngineFault | null,
    Uint32Array,
    Float32Array,
    Float32Array,
    number,
    number,
  ];
  return { fault, encoded: { words, details, logits }, stepMs, waitMs };
}

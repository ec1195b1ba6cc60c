// The gRPC service of a worker. Owns fencing (requests of another incarnation do nothing), the life of streams and their
// back-pressure; what a request means is decided by the role (role.ts) that a Load gave this worker.
import type { ServerDuplexStream, ServerUnaryCall, ServerWritableStream, sendUnaryData } from "@grpc/grpc-js";
import { Metadata, status } from "@grpc/grpc-js";
import { FaultError, lost } from "../../proto/fault.ts";
import {
  type DescribeRequest,
  type DrainRequest,
  type DrainResponse,
  type LoadProgress,
  type LoadRequest,
  type ScoreChunk,
  type ScoreRequest,
  type StatsRequest,
  type StepDigest,
  type StepPlan,
  type SubmitRequest,
  type SubmitResponse,
  type TokenIds,
  type TokenizeIdsRequest,
  type WorkerDescription,
  WorkerPhase,
  type WorkerServer,
  type WorkerStats,
} from "../../proto/gen/muster/v1/worker.ts";
import { POD_UID_HEADER } from "../../proto/grpc.ts";
import { noTrust, type Trust } from "../../proto/trust.ts";
import type { CommListener, Engine } from "../engine/engine.ts";
import { expertCalls, tellNumerics } from "./experts.ts";
import { faultError, otherIncarnation, type RpcError, rpcError } from "./grpc-error.ts";
import { Life } from "./life.ts";
import { Outlet } from "./outlet.ts";
import { type Backend, isRemote, type Localise, openRole, type Role } from "./role.ts";

/** Messages a gateway may leave unread before its stream is ended: a step is at most one message, so this is seconds. */
const UNREAD_MESSAGES_MAX = 4_096;
/** Messages of a gateway's stream are about so far apart where steps are shorter: 500 a second are read by nobody. */
const PACE_MS = 2;
/** Progress is written at most so often, phases at once. */
const PROGRESS_MS = 100;
const STATS_MS = 1_000;
const STATS_CHANGE_MS = 100;
const DRAIN_MS = 30_000;
const DRAIN_MS_MAX = 600_000;

export type WorkerIdentity = {
  readonly incarnation: bigint;
  readonly worker: number;
  readonly cpu: string;
  /** Of the pod this worker is in; undefined where it is in none: then it is known by its address alone. */
  readonly podUid: string | undefined;
};

type Leading = Extract<Role, { kind: "leader" }>;

export class WorkerHost {
  readonly #me: WorkerIdentity;
  readonly #backend: Backend;
  readonly #listener: CommListener;
  readonly #trust: Trust;
  readonly #localise: Localise | undefined;
  readonly #abort = new AbortController();
  readonly life = new Life(WorkerPhase.IDLE);
  #loading: Promise<void> | undefined;
  #role: Role | undefined;
  #hasLeader = false;
  /** Of a follower that drains: its leader has gone. */
  readonly #left = Promise.withResolvers<void>();
  readonly #onLost: (error: FaultError) => void;

  constructor(options: {
    me: WorkerIdentity;
    backend: Backend;
    listener: CommListener;
    trust?: Trust | undefined;
    localise?: Localise | undefined;
    /** State is gone; the process should end. Called once. */
    onLost: (error: FaultError) => void;
  }) {
    this.#me = options.me;
    this.#backend = options.backend;
    this.#listener = options.listener;
    this.#onLost = options.onLost;
    this.#trust = options.trust ?? noTrust;
    this.#localise = options.localise;
  }

  get service(): WorkerServer {
    return {
      describe: (call, callback) => this.#describe(call, callback),
      load: (call) => this.#load(call),
      submit: (call) => this.#submit(call),
      steps: (call) => void this.#steps(call),
      score: (call) => void this.#score(call),
      tokenize: (call, callback) => void this.#tokenize(call, callback),
      drain: (call, callback) => void this.#drainCall(call, callback),
      stats: (call) => this.#stats(call),
      ...expertCalls({ roleOf: () => this.#role, fence: (asked) => this.#fence(asked), life: this.life }),
    };
  }

  /** Admits nothing new, waits for what runs at most so long, cuts the rest. */
  async drain(timeoutMs: number): Promise<DrainResponse> {
    if (this.life.now.phase === WorkerPhase.SERVING) this.life.change({ phase: WorkerPhase.DRAINING });
    if (this.#role?.kind === "leader") return this.#role.leader.drain(timeoutMs);
    // All workers of a group are asked to end at once, and the leader's sequences need this one's ranks: it goes last.
    if (this.#hasLeader) await settled(this.#left.promise, timeoutMs);
    return { ended: 0, cut: 0 };
  }

  /** Ends the role, or the load that would make one. */
  async close(): Promise<void> {
    this.#abort.abort();
    await this.#loading;
    await this.#role?.close();
    this.#role = undefined;
  }

  // --- load ---

  #describe(
    call: ServerUnaryCall<DescribeRequest, WorkerDescription>,
    callback: sendUnaryData<WorkerDescription>,
  ): void {
    const refused = this.#identify(call) ?? this.#fence(call.request.incarnation);
    const { incarnation, worker, cpu } = this.#me;
    if (refused !== undefined) callback(refused);
    else callback(null, { incarnation, worker, cpu, commAddress: this.#listener.address, ...this.life.now });
  }

  #load(call: ServerWritableStream<LoadRequest, LoadProgress>): void {
    const { request } = call;
    const refused = this.#identify(call) ?? this.#fence(request.incarnation) ?? this.#wrongWorker(request.worker);
    if (refused !== undefined) return void call.emit("error", refused);
    this.#loading ??= this.#become(request);
    let writtenMs = 0;
    let phase: WorkerPhase | undefined;
    let end = () => {};
    end = this.life.watch((now) => {
      const nowMs = performance.now();
      if (now.phase === phase && nowMs - writtenMs < PROGRESS_MS && now.fault === undefined) return;
      writtenMs = nowMs;
      phase = now.phase;
      call.write(now);
      if (now.fault === undefined && phase !== WorkerPhase.SERVING && phase !== WorkerPhase.DRAINING) return;
      queueMicrotask(() => end()); // watch() calls before it has returned `end`
      call.end();
    });
    call.on("cancelled", () => end());
  }

  async #become(request: LoadRequest): Promise<void> {
    const isPulled = this.#localise !== undefined && isRemote(request.plan);
    this.life.change({ phase: isPulled ? WorkerPhase.PULLING : WorkerPhase.LOADING });
    try {
      this.#role = await openRole({
        request,
        backend: this.#backend,
        listener: this.#listener,
        life: this.life,
        signal: this.#abort.signal,
        trust: this.#trust,
        localise: this.#localise,
        podUid: this.#me.podUid,
        onLost: (error) => this.#lose(error),
      });
    } catch (error) {
      if (!(error instanceof FaultError)) throw error;
      return this.life.change({ phase: WorkerPhase.FAILED, fault: error.fault });
    }
    if (this.life.now.phase !== WorkerPhase.FAILED)
      this.life.change({ phase: WorkerPhase.SERVING, numericsId: numericsIdOf(this.#role) });
  }

  #lose(error: FaultError): void {
    if (this.life.now.phase === WorkerPhase.FAILED) return;
    this.life.change({ phase: WorkerPhase.FAILED, fault: error.fault });
    this.#onLost(error);
  }

  /** Says which pod this is; a caller that means another one has an address that was another's. */
  #identify(call: Pick<ServerUnaryCall<unknown, unknown>, "metadata" | "sendMetadata">): RpcError | undefined {
    const { podUid } = this.#me;
    if (podUid === undefined) return undefined;
    const said = new Metadata();
    said.set(POD_UID_HEADER, podUid);
    call.sendMetadata(said);
    const [asked] = call.metadata.get(POD_UID_HEADER);
    if (asked === undefined || asked.toString() === podUid) return undefined;
    return rpcError(status.FAILED_PRECONDITION, `this is pod ${podUid}, not ${asked.toString()}`);
  }

  #fence(asked: bigint): RpcError | undefined {
    return asked === this.#me.incarnation ? undefined : otherIncarnation(this.#me.incarnation, asked);
  }

  #wrongWorker(asked: number): RpcError | undefined {
    if (asked === this.#me.worker) return undefined;
    return rpcError(status.FAILED_PRECONDITION, `this is worker ${this.#me.worker}, not ${asked}`);
  }

  #leading(): Leading | RpcError {
    if (this.#role?.kind === "leader") return this.#role;
    return rpcError(status.UNAVAILABLE, "this worker is not a serving leader");
  }

  // --- leader ---

  #submit(call: ServerDuplexStream<SubmitRequest, SubmitResponse>): void {
    const role = this.#leading();
    if ("code" in role) return void call.emit("error", role);
    const { leader } = role;
    let isAccepted = false;
    let hasEnded = false;
    const outlet = new Outlet((response) => {
      call.write(response);
      if (call.writableLength > UNREAD_MESSAGES_MAX)
        refuse(rpcError(status.RESOURCE_EXHAUSTED, `${UNREAD_MESSAGES_MAX} messages were left unread`));
      else endIfDone();
    }, PACE_MS);
    const endIfDone = () => {
      if (!hasEnded || !outlet.isQuiet) return;
      leader.close(outlet);
      call.end();
    };
    const refuse = (error: RpcError) => {
      leader.close(outlet);
      call.emit("error", error);
    };
    call.on("data", ({ incarnation, kind }: SubmitRequest) => {
      const refused = isAccepted && incarnation === 0n ? undefined : this.#fence(incarnation);
      if (refused !== undefined) return refuse(refused);
      isAccepted = true;
      if (kind?.$case === "open") void leader.open(outlet, kind.value);
      else if (kind?.$case === "cancel") leader.cancel(outlet, kind.value.id);
    });
    // A gateway that has said all goes on reading until its last sequence ends.
    call.on("end", () => {
      hasEnded = true;
      endIfDone();
    });
    call.on("cancelled", () => leader.close(outlet));
    call.on("error", () => leader.close(outlet));
  }

  async #score(call: ServerWritableStream<ScoreRequest, ScoreChunk>): Promise<void> {
    const { incarnation, tokens, logits } = call.request;
    const role = this.#leading();
    const refused = this.#fence(incarnation) ?? ("code" in role ? role : undefined);
    if (refused !== undefined || "code" in role) return void call.emit("error", refused);
    const abort = new AbortController();
    call.on("cancelled", () => abort.abort());
    const emit = (chunk: ScoreChunk): Promise<void> =>
      call.write(chunk) ? Promise.resolve() : roomOf(call, abort.signal);
    try {
      await role.leader.score({ tokens, logits, emit, signal: abort.signal });
      call.end();
    } catch (error) {
      call.emit("error", faultError(error));
    }
  }

  async #tokenize(
    call: ServerUnaryCall<TokenizeIdsRequest, TokenIds>,
    callback: sendUnaryData<TokenIds>,
  ): Promise<void> {
    const { incarnation, input } = call.request;
    const role = this.#leading();
    const refused = this.#fence(incarnation) ?? ("code" in role ? role : undefined);
    if (refused !== undefined || "code" in role) return callback(refused ?? null);
    if (input === undefined) return callback(rpcError(status.INVALID_ARGUMENT, "input: one of text or chat is needed"));
    const { tokenizer } = role;
    try {
      const ids = await (input.$case === "text"
        ? tokenizer.encode(input.value)
        : tokenizer.encodeChat(input.value.messages));
      callback(null, { ids });
    } catch (error) {
      callback(faultError(error));
    }
  }

  async #drainCall(
    call: ServerUnaryCall<DrainRequest, DrainResponse>,
    callback: sendUnaryData<DrainResponse>,
  ): Promise<void> {
    const { incarnation, timeoutMs } = call.request;
    const refused = this.#fence(incarnation);
    if (refused !== undefined) return callback(refused);
    callback(null, await this.drain(Math.min(timeoutMs || DRAIN_MS, DRAIN_MS_MAX)));
  }

  #stats(call: ServerWritableStream<StatsRequest, WorkerStats>): void {
    const role = this.#leading();
    const refused = this.#fence(call.request.incarnation) ?? ("code" in role ? role : undefined);
    if (refused !== undefined || "code" in role) return void call.emit("error", refused);
    let last: WorkerStats | undefined;
    let writtenMs = 0;
    const look = () => {
      const stats = role.leader.stats();
      const nowMs = performance.now();
      const isChanged = last?.steps !== stats.steps || last.waiting !== stats.waiting || last.running !== stats.running;
      // A reader that is behind gets the newest later instead of all of them.
      if ((!isChanged && nowMs - writtenMs < STATS_MS) || call.writableLength > 0) return;
      writtenMs = nowMs;
      last = stats;
      call.write(stats);
    };
    look();
    const timer = setInterval(look, STATS_CHANGE_MS);
    const unwatch = this.life.watch(({ phase }) => {
      if (phase === WorkerPhase.FAILED) call.end();
    });
    const end = () => {
      clearInterval(timer);
      unwatch();
    };
    call.on("cancelled", end);
    call.on("close", end);
  }

  // --- follower ---

  // The leader opens this as soon as its own engine is there, which can be before ours is: plans wait in the stream.
  async #steps(call: ServerDuplexStream<StepPlan, StepDigest>): Promise<void> {
    await this.#loading;
    const role = this.#role;
    if (role?.kind !== "follower")
      return void call.emit("error", rpcError(status.UNAVAILABLE, "this worker is not a follower"));
    if (this.#hasLeader)
      return void call.emit("error", rpcError(status.FAILED_PRECONDITION, "a leader has been here already"));
    let isMine = false;
    call.on("data", (plan: StepPlan) => {
      const refused = this.#fence(plan.incarnation);
      if (refused !== undefined) return void call.emit("error", refused);
      // Only a plan of our incarnation makes its sender our leader: a stranger must neither lead nor, by leaving, end us.
      this.#hasLeader = true;
      isMine = true;
      this.#follow(role.engine, plan, call);
    });
    call.on("end", () => {
      if (isMine) this.#left.resolve();
      call.end();
    });
    const gone = () => {
      if (isMine && this.life.now.phase === WorkerPhase.DRAINING) this.#left.resolve();
      else if (isMine) this.#lose(new FaultError(lost("leader_lost", "the leader's stream broke off")));
    };
    call.on("cancelled", gone);
    call.on("error", gone);
  }

  #follow(engine: Engine, plan: StepPlan, call: ServerDuplexStream<StepPlan, StepDigest>): void {
    const { step } = plan;
    engine.launch(plan).then(
      ({ digest }) => {
        tellNumerics(engine, this.life);
        call.write({ step, digest, fault: undefined });
      },
      (error: unknown) => {
        const detail = error instanceof Error ? error.message : String(error);
        const failure = new FaultError(lost("step_failed", `step ${step}: ${detail}`), { cause: error });
        call.write({ step, digest: 0n, fault: failure.fault });
        this.#lose(failure);
      },
    );
  }
}

function numericsIdOf(role: Role): string {
  switch (role.kind) {
    case "leader":
      return role.leader.numericsId;
    case "follower":
      return role.engine.numericsId;
    case "draft":
      return role.engine.numericsId;
  }
}

/** Resolves when the work has, or at the limit. */
export function settled(work: Promise<void>, limitMs: number): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, limitMs);
    work.finally(() => {
      clearTimeout(timer);
      resolve();
    });
  });
}

function roomOf(call: ServerWritableStream<ScoreRequest, ScoreChunk>, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    call.once("drain", resolve);
    signal.addEventListener("abort", () => resolve(), { once: true });
  });
}

// What a worker becomes by a Load: the leader of a group, one of its followers, or a draft. Opens the engine and everything that
// lives as long as it, and closes them in reverse order in one place.
import { FaultError, invalid, lost } from "../../proto/fault.ts";
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import {
  type DraftOptions,
  Fault_Kind,
  type LoadRequest,
  type SpeculationOptions,
  WorkerPhase,
} from "../../proto/gen/muster/v1/worker.ts";
import type { Trust } from "../../proto/trust.ts";
import { type CommListener, type Engine, EngineError, type EngineRequest } from "../engine/engine.ts";
import { natsBus } from "../spec/bus.ts";
import { startDraft } from "../spec/draft.ts";
import { noSpeculator, type Speculator } from "../spec/speculator.ts";
import { createSpeculator } from "../spec/target.ts";
import { Tokenizer } from "../token/tokenizer.ts";
import { connectFollowers } from "./followers.ts";
import { Leader } from "./leader.ts";
import type { Life } from "./life.ts";
import { budgetOf, engineOptionsOf, limitsOf, type ResolvedEngineOptions, serveLimitsOf } from "./options.ts";
import { startReporter } from "./report.ts";

/** Where engines come from: worker/engine/native.ts, or an engine of a test. */
export type Backend = {
  /** Opens the socket of the collectives, before the group is known. */
  listen(host: string): CommListener;
  /** Rejects with EngineError. */
  openEngine(request: EngineRequest): Promise<Engine>;
};

/** Brings a plan's files to where this process reads them, and answers the plan with their paths. Rejects with FaultError. */
export type Localise = (
  plan: ShardPlan,
  options: { signal: AbortSignal; onProgress: (bytes: number, total: number) => void },
) => Promise<ShardPlan>;

export type Role =
  | {
      readonly kind: "leader";
      readonly engine: Engine;
      readonly leader: Leader;
      readonly tokenizer: Tokenizer;
      close(): Promise<void>;
    }
  | { readonly kind: "follower"; readonly engine: Engine; close(): Promise<void> }
  | { readonly kind: "draft"; readonly engine: Engine; close(): Promise<void> };

export type RoleOptions = {
  readonly request: LoadRequest;
  readonly backend: Backend;
  readonly listener: CommListener;
  readonly life: Life;
  readonly signal: AbortSignal;
  readonly trust: Trust;
  /** Of the pod this worker is in. */
  readonly podUid?: string | undefined;
  /** Default: the plan's paths are this machine's. */
  readonly localise?: Localise | undefined;
  /** The role has lost its state; called at most once, after its streams have been told. */
  readonly onLost: (error: FaultError) => void;
};

type Opened = RoleOptions & {
  readonly plan: ShardPlan;
  readonly model: NonNullable<ShardPlan["model"]>;
  readonly engineOptions: ResolvedEngineOptions;
};

/** Reports progress through `life`. Rejects with FaultError; nothing stays open then. */
export async function openRole(options: RoleOptions): Promise<Role> {
  const { plan } = options.request;
  const model = plan?.model;
  if (plan === undefined || model === undefined)
    throw new FaultError(invalid("plan", "a Load needs a plan with its model"));
  if (model.planOnly !== "") throw new FaultError(invalid("plan.model", model.planOnly, "unsupported"));
  let leader: Leader | undefined;
  reportOn(options, plan, () => leader);
  const local = await localised(options, plan);
  const opened: Opened = { ...options, ...local, engineOptions: engineOptionsOf(options.request.engine) };
  const engine = await openEngine(opened);
  try {
    if (options.request.draft !== undefined) return openDraft(opened, engine);
    if (options.request.worker !== 0) return { kind: "follower", engine, close: () => engine.close() };
    const role = await openLeader(opened, engine);
    if (role.kind === "leader") leader = role.leader;
    return role;
  } catch (error) {
    await engine.close();
    throw error;
  }
}

/** To the controller, from the first byte on and until the worker ends: also why there is no leader. */
function reportOn(options: RoleOptions, plan: ShardPlan, leaderOf: () => Leader | undefined): void {
  const { request, life, signal, trust, podUid = "" } = options;
  const { namespace, group, incarnation, reportsAddress: address } = request;
  if (request.worker !== 0 || address === "") return;
  const workers = plan.ranks.map(({ worker }) => worker);
  const progress = () => {
    const leader = leaderOf();
    if (leader === undefined) return undefined;
    const { epochs, isPending } = leader.progress();
    return { stats: leader.stats(), rankEpochs: workers.map((worker) => epochs[worker] ?? 0n), isPending };
  };
  startReporter({ address, who: { namespace, group, incarnation, podUid }, life, progress, trust, signal });
}

/** Whether files have to come before they can be read: whoever planned has seen their headers alone. */
export const isRemote = (plan: ShardPlan | undefined): boolean =>
  plan?.model?.files.some(({ path }) => path === "") ?? false;

async function localised(
  { localise, life, signal }: RoleOptions,
  plan: ShardPlan,
): Promise<Pick<Opened, "plan" | "model">> {
  const bring = async () => {
    if (localise === undefined) return plan;
    if (isRemote(plan)) life.change({ phase: WorkerPhase.PULLING });
    const onProgress = (bytes: number, total: number) =>
      life.change({ phase: WorkerPhase.PULLING, bytesLoaded: BigInt(bytes), bytesTotal: BigInt(total) });
    const found = await localise(plan, { signal, onProgress });
    life.change({ phase: WorkerPhase.LOADING, bytesLoaded: 0n, bytesTotal: 0n });
    return found;
  };
  const local = await bring();
  if (signal.aborted) throw new FaultError(lost("cancelled", "the load was cancelled: the worker is ending"));
  if (local.model === undefined) throw new FaultError(invalid("plan", "a Load needs a plan with its model"));
  return { plan: local, model: local.model };
}

async function openEngine({ request, plan, engineOptions, backend, listener, life, signal }: Opened): Promise<Engine> {
  const comm = { listener, addresses: request.commAddresses, incarnation: request.incarnation };
  const phases = { loading: WorkerPhase.LOADING, connecting: WorkerPhase.CONNECTING, warming: WorkerPhase.WARMING };
  try {
    return await backend.openEngine({
      plan,
      worker: request.worker,
      slices: request.slices,
      options: engineOptions,
      ...(plan.workers > 1 ? { comm } : {}),
      onProgress: (phase, done, total) =>
        life.change({ phase: phases[phase], bytesLoaded: BigInt(done), bytesTotal: BigInt(total) }),
      signal,
    });
  } catch (error) {
    if (signal.aborted)
      throw new FaultError(lost("cancelled", "the load was cancelled: the worker is ending"), { cause: error });
    throw faultOf(error);
  }
}

// What a person can change stays; everything else may be gone with the next incarnation.
function faultOf(error: unknown): unknown {
  if (!(error instanceof EngineError)) return error;
  const { code, field, detail } = error.fault;
  const isInvalid = code === "invalid" || code === "unsupported" || code === "out_of_memory";
  const fault = isInvalid ? invalid(field, detail, `engine_${code}`) : { ...lost(`engine_${code}`, detail), field };
  return new FaultError(fault, { cause: error });
}

async function openLeader(opened: Opened, engine: Engine): Promise<Role> {
  const { request, plan, model, engineOptions } = opened;
  if (model.tokenizer === undefined)
    throw new FaultError(invalid("plan.model.tokenizer", "the model has no tokenizer"));
  const tokenizer = await Tokenizer.load(model.tokenizer);
  const { speculator, stopSpeculator } = openSpeculator(opened, model.tokenizer.vocabHash);
  const others = request.workerAddresses.slice(1, plan.workers);
  const followers = connectFollowers(others, (error) => leader.fail(error), opened.trust);
  const { queueMax, runningMax } = serveLimitsOf(request.limits);
  const leader = new Leader({
    engine,
    tokenizer,
    speculator,
    followers,
    incarnation: request.incarnation,
    revision: plan.revision,
    budget: budgetOf(engineOptions, { blockTokens: plan.kvBlockTokens, runningMax }),
    limits: limitsOf(plan, model, engineOptions),
    kvBlocks: plan.kvBlocks,
    slotsMax: engineOptions.slotsMax,
    queueMax,
  });
  const ended = leader.run().catch((error: unknown) => {
    if (!(error instanceof FaultError)) throw error;
    opened.onLost(error);
  });
  const close = async () => {
    leader.stop();
    await ended;
    followers.close();
    await stopSpeculator();
    await engine.close();
  };
  return { kind: "leader", engine, leader, tokenizer, close };
}

function openSpeculator({ request, engineOptions, trust }: Opened, vocabHash: bigint) {
  const wish = request.speculation;
  if (wish === undefined || !wish.enabled || wish.natsUrl === "")
    return { speculator: noSpeculator, stopSpeculator: async () => {} };
  const bus = natsBus({ ...brokerOf(wish, trust), name: `leader-${request.incarnation}` });
  const draftTokens = Math.min(wish.draftTokens, engineOptions.verifyMax);
  const speculator: Speculator = createSpeculator({
    bus,
    pool: wish.pool,
    vocabHash,
    draftTokens,
    waitMs: wish.draftWaitMs,
  });
  const stopSpeculator = async () => {
    await speculator.stop();
    await bus.close();
  };
  return { speculator, stopSpeculator };
}

function openDraft({ request, plan, model, engineOptions, trust, onLost }: Opened, engine: Engine): Role {
  const wish = request.draft;
  if (wish === undefined || model.tokenizer === undefined)
    throw new FaultError(invalid("plan.model.tokenizer", "a draft needs the vocabulary's hash"));
  const bus = natsBus({ ...brokerOf(wish, trust), name: `draft-${request.incarnation}` });
  const draft = startDraft({
    bus,
    engine,
    pool: wish.pool,
    model: model.name,
    vocabHash: model.tokenizer.vocabHash,
    vocabSize: model.vocabSize,
    contextTokens: plan.contextTokens,
    kvBlocks: plan.kvBlocks,
    kvBlockTokens: plan.kvBlockTokens,
    tokensMax: engineOptions.tokensMax,
    rowsMax: engineOptions.rowsMax,
    sessionsMax: Math.min(wish.sessionsMax || engineOptions.slotsMax, engineOptions.slotsMax - 1), // slot 0 is padding
  });
  draft.finished.catch((error: unknown) => {
    const fault = faultOf(error);
    onLost(fault instanceof FaultError && fault.fault.kind === Fault_Kind.LOST ? fault : lostDraft(error));
  });
  const close = async () => {
    await draft.stop();
    await bus.close();
    await engine.close();
  };
  return { kind: "draft", engine, close };
}

const brokerOf = (wish: SpeculationOptions | DraftOptions, trust: Trust) => ({
  url: wish.natsUrl,
  user: wish.natsUser,
  token: wish.natsToken,
  // The installation's own broker knows us by a user; another's authority is not ours, and it knows a token alone.
  tls: wish.natsUser === "" ? undefined : trust.nats(),
});

const lostDraft = (cause: unknown): FaultError =>
  new FaultError(lost("draft_failed", cause instanceof Error ? cause.message : String(cause)), { cause });

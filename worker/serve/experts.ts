// Moving experts between the ranks of a group while it serves: the calls by which the controller has maps staged on every
// worker and then switched to by the leader. Owns nothing that lasts: the engine holds the maps, the leader writes the switch.
import type { ServerUnaryCall, sendUnaryData } from "@grpc/grpc-js";
import { status } from "@grpc/grpc-js";
import type {
  ExpertLoadRequest,
  ExpertLoadResponse,
  StageExpertsResponse,
  SwitchExpertsRequest,
  SwitchExpertsResponse,
} from "../../proto/gen/muster/v1/experts.ts";
import type { StageExpertsRequest, WorkerServer } from "../../proto/gen/muster/v1/worker.ts";
import { type Engine, EngineError } from "../engine/engine.ts";
import { faultError, type RpcError, rpcError } from "./grpc-error.ts";
import type { Life } from "./life.ts";
import type { Role } from "./role.ts";

export type ExpertCallsOptions = {
  /** Undefined before it serves. */
  roleOf: () => Role | undefined;
  fence: (incarnation: bigint) => RpcError | undefined;
  life: Life;
};

type Calls = Pick<WorkerServer, "stageExperts" | "switchExperts" | "expertLoad">;

export function expertCalls({ roleOf, fence, life }: ExpertCallsOptions): Calls {
  /** By this worker; 0: none. A step that asks for another would end the incarnation. */
  let staged = 0;
  const leading = (incarnation: bigint): Extract<Role, { kind: "leader" }> | RpcError => {
    const refused = fence(incarnation);
    if (refused !== undefined) return refused;
    const role = roleOf();
    return role?.kind === "leader" ? role : rpcError(status.FAILED_PRECONDITION, "this worker does not lead");
  };

  const stageExperts = async (
    { request }: ServerUnaryCall<StageExpertsRequest, StageExpertsResponse>,
    answer: sendUnaryData<StageExpertsResponse>,
  ): Promise<void> => {
    const { incarnation, map, slices } = request;
    const refused = fence(incarnation);
    if (refused !== undefined) return answer(refused);
    const engine = roleOf()?.engine;
    if (engine === undefined) return answer(rpcError(status.FAILED_PRECONDITION, "this worker does not serve yet"));
    if (map === undefined) return answer(rpcError(status.INVALID_ARGUMENT, "map: is not set"));
    staged = 0;
    try {
      await engine.stage(map, slices);
      staged = map.version;
      answer(null, {});
    } catch (error) {
      answer(stageError(error));
    }
  };

  const switchExperts = async (
    { request }: ServerUnaryCall<SwitchExpertsRequest, SwitchExpertsResponse>,
    answer: sendUnaryData<SwitchExpertsResponse>,
  ): Promise<void> => {
    const role = leading(request.incarnation);
    if ("code" in role) return answer(role);
    if (request.version === 0 || request.version !== staged)
      return answer(rpcError(status.FAILED_PRECONDITION, `map ${request.version} is not staged`));
    staged = 0;
    try {
      await role.leader.switchExperts(request.version);
      tellNumerics(role.engine, life);
      answer(null, { numericsId: role.engine.numericsId });
    } catch (error) {
      answer(faultError(error));
    }
  };

  const expertLoad = (
    { request }: ServerUnaryCall<ExpertLoadRequest, ExpertLoadResponse>,
    answer: sendUnaryData<ExpertLoadResponse>,
  ): void => {
    const role = leading(request.incarnation);
    if ("code" in role) answer(role);
    else answer(null, loadOf(role.engine));
  };

  return {
    stageExperts: (call, answer) => void stageExperts(call, answer),
    switchExperts: (call, answer) => void switchExperts(call, answer),
    expertLoad,
  };
}

function loadOf(engine: Engine): ExpertLoadResponse {
  const layers = engine
    .expertTokens()
    .flatMap((tokens, block) => (tokens.length === 0 ? [] : [{ block, tokens: tokens.map(BigInt) }]));
  return { layers, map: engine.experts };
}

/** After a step that may have switched: everybody who watches learns the new id. */
export function tellNumerics({ numericsId }: Engine, life: Life): void {
  if (life.now.numericsId !== "" && life.now.numericsId !== numericsId) life.change({ numericsId });
}

function stageError(error: unknown): RpcError {
  if (!(error instanceof EngineError)) return faultError(error);
  const { code, field, detail } = error.fault;
  if (code === "invalid" || code === "unsupported") return rpcError(status.INVALID_ARGUMENT, `${field}: ${detail}`);
  return rpcError(status.INTERNAL, `${field}: ${detail}`);
}

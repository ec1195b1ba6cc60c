// Faults as gRPC statuses: what each kind means is decided in proto/fault.ts, this only puts it into words.
import { Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { consequence, FaultError } from "../../proto/fault.ts";

export type RpcError = Pick<ServiceError, "code" | "details" | "metadata" | "name" | "message">;

export function rpcError(code: status, details: string): RpcError {
  return { name: "RpcError", message: details, code, details, metadata: new Metadata() };
}

/** An error that is no fault is a broken invariant: it is thrown on. */
export function faultError(error: unknown): RpcError {
  if (!(error instanceof FaultError)) throw error;
  const metadata = new Metadata();
  metadata.set("muster-code", error.fault.code);
  return { ...rpcError(consequence(error.fault).grpc, error.message), metadata };
}

/** What a worker answers that was not meant. */
export const otherIncarnation = (own: bigint, asked: bigint): RpcError =>
  rpcError(status.FAILED_PRECONDITION, `this worker is of incarnation ${own}, not ${asked}`);

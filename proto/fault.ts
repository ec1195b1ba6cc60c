// Faults as values, and the one place that decides what each means outside (STYLE R15).
import { status } from "@grpc/grpc-js";
import { type Fault, Fault_Kind } from "./gen/muster/v1/worker.ts";

/** What a fault causes: gRPC status, HTTP status, OpenAI error type, whether trying again can help. */
export type Consequence = { grpc: status; http: number; openaiType: string; retry: boolean; metric: string };

/** A fault on its way through code that can only throw; converted back at the edge it leaves by. */
export class FaultError extends Error {
  readonly fault: Fault;
  constructor(fault: Fault, options?: ErrorOptions) {
    super(fault.field ? `${fault.field}: ${fault.detail}` : fault.detail, options);
    this.name = "FaultError";
    this.fault = fault;
  }
}

const make =
  (kind: Fault_Kind) =>
  (code: string, detail: string, field = ""): Fault => ({ kind, field, detail, code });

/** A person must change something; no retry. */
export const invalid = (field: string, detail: string, code = "invalid_value"): Fault =>
  make(Fault_Kind.INVALID)(code, detail, field);
/** Normal: look again later. */
export const waiting = make(Fault_Kind.WAITING);
/** Back off with jitter, then try again. */
export const transient = make(Fault_Kind.TRANSIENT);
/** State is gone; rebuild from source. */
export const lost = make(Fault_Kind.LOST);

export function consequence(fault: Fault): Consequence {
  switch (fault.kind) {
    case Fault_Kind.INVALID:
      return {
        grpc: fault.code === "model_not_found" ? status.NOT_FOUND : status.INVALID_ARGUMENT,
        http: fault.code === "model_not_found" ? 404 : 400,
        openaiType: "invalid_request_error",
        retry: false,
        metric: "invalid",
      };
    case Fault_Kind.WAITING:
      return {
        grpc: status.RESOURCE_EXHAUSTED,
        http: fault.code === "queue_full" ? 429 : 503,
        openaiType: fault.code === "queue_full" ? "rate_limit_error" : "server_error",
        retry: true,
        metric: "waiting",
      };
    case Fault_Kind.TRANSIENT:
      return { grpc: status.UNAVAILABLE, http: 503, openaiType: "server_error", retry: true, metric: "transient" };
    default:
      return { grpc: status.INTERNAL, http: 500, openaiType: "server_error", retry: false, metric: "lost" };
  }
}

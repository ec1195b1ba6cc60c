// What the failure of a request is called. The transport says it by codes, at times two causes deep; callers see KubeErrors.
import { KubeError } from "./client.ts";
import { isRecord } from "./wire.ts";

const CERTIFICATE = /CERT|SELF_SIGNED|UNABLE_TO_(VERIFY|GET_ISSUER)|ALTNAME|SSL|TLS/;

/** Aborts keep the reason of their signal: whoever aborted knows why. */
export function asKubeError(error: unknown, title: string, signal: AbortSignal): KubeError {
  const reason: unknown = signal.aborted ? signal.reason : undefined;
  if (reason instanceof KubeError) return reason;
  if (signal.aborted) throw reason;
  if (error instanceof KubeError) return error;
  const code = codeOf(error);
  const isExpected =
    (code !== "" && code !== "UND_ERR_INVALID_ARG") || error instanceof RangeError || error instanceof SyntaxError;
  // A mistake of our own, not of the network.
  if (!isExpected) throw error;
  const detail = code === "" ? messageOf(error) : `${messageOf(error)} (${code})`;
  return new KubeError(0, reasonOf(error, code), `${title}: ${detail}`, { cause: error });
}

function reasonOf(error: unknown, code: string): string {
  if (code === "UND_ERR_HEADERS_TIMEOUT" || code === "UND_ERR_CONNECT_TIMEOUT" || code === "ETIMEDOUT")
    return "Timeout";
  if (code === "UND_ERR_BODY_TIMEOUT") return "Idle";
  if (CERTIFICATE.test(code)) return "Untrusted";
  if (error instanceof RangeError) return "TooLarge";
  if (error instanceof SyntaxError) return "BadReply";
  return "Unreachable";
}

/** The first code on the way down the causes. */
function codeOf(error: unknown): string {
  for (let at = error, depth = 0; isRecord(at) && depth < 5; at = at.cause, depth += 1) {
    if (typeof at.code === "string") return at.code;
  }
  return "";
}

function messageOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.message || (error instanceof AggregateError ? error.errors.map(messageOf).join(", ") : error.name);
}

// How a source, header or configuration is refused: always INVALID, always naming file and key, with the byte offset where
// there is one, so that a person can look at exactly what was wrong.
import { FaultError, invalid } from "../../proto/fault.ts";

export const at = (detail: string, offset: number | undefined): string =>
  offset === undefined ? detail : `${detail} (at byte ${offset})`;

/** Throws FaultError INVALID. `field` is "file/key". */
export function reject(field: string, detail: string, offset?: number): never {
  throw new FaultError(invalid(field, at(detail, offset), "invalid_model"));
}

/** Throws FaultError INVALID for something that is well-formed but not built. */
export function unsupported(field: string, detail: string, offset?: number): never {
  throw new FaultError(invalid(field, at(detail, offset), "unsupported"));
}

/** A name from a file as it may stand in a message: quoted, control characters escaped, bounded. */
export function shown(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}...` : text);
}

// --identity and --enrol of a program in a pod: from its token to its certificate, or to none.
import { FaultError, invalid } from "../../proto/fault.ts";
import { noTrust, type Trust } from "../../proto/trust.ts";

export type IdentityFlags = { identity?: string; enrol?: string };

/** Resolves with the certificate: before it has one a pod is nobody. Throws INVALID where only one of the two is given. */
export async function trustOf(
  { identity, enrol: address }: IdentityFlags,
  { signal, onTrouble }: { signal: AbortSignal; onTrouble: (detail: string) => void },
): Promise<Trust> {
  if (identity === undefined && address === undefined) return noTrust;
  if (identity === undefined) throw new FaultError(invalid("--identity", "--enrol needs it: token and ca.crt"));
  if (address === undefined) throw new FaultError(invalid("--enrol", "--identity needs it: the certificate's source"));
  const { enrol } = await import("../../proto/enrol.ts");
  return await enrol({ folder: identity, address, onTrouble }, signal);
}

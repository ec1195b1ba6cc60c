// Who may ask: one API key, compared in constant time. Owns the rule that beyond loopback a key is needed.
import { createHash, timingSafeEqual } from "node:crypto";
import { isIP } from "node:net";

const digest = (text: string): Buffer => createHash("sha256").update(text).digest();

/** A check of an `authorization` header: true for everybody where there is no key. */
export function keyCheck(apiKey: string | undefined): (authorization: string | undefined) => boolean {
  if (apiKey === undefined) return () => true;
  const expected = digest(apiKey);
  return (authorization) => {
    const [, given] = /^bearer +(\S+) *$/i.exec(authorization ?? "") ?? [];
    // Digests have one length whatever was given, so the comparison tells nothing of the key.
    return timingSafeEqual(digest(given ?? ""), expected) && given !== undefined;
  };
}

export function isLoopback(host: string): boolean {
  if (host === "localhost" || host === "::1") return true;
  return isIP(host) === 4 && host.startsWith("127.");
}

// What a service account token says, and whether it is to be believed: checked here against the cluster's own keys. Owns the
// copy of those keys. Whose pod it is and what it may be is claimant.ts.
//
//   K1  a token costs no call: keys are read once, again when they are old, and when one signs that is not known yet, at a
//       bounded rate; while the server is away the keys there are go on.
//   K2  only what names this cluster as issuer, "muster" as audience, an end, and a pod with its UID is believed.
import { createLocalJWKSet, errors, type JSONWebKeySet, type JWTPayload, jwtVerify } from "jose";
import { z } from "zod";
import type { Clock } from "../api/clock.ts";
import { TokenBucket } from "../api/rate-limit.ts";
import { TOKEN_AUDIENCE } from "../groups/pods.ts";

export const ISSUER_PATH = "/.well-known/openid-configuration";
export const KEYS_PATH = "/openid/v1/jwks";
/** A key that the cluster has withdrawn is believed for at most this long. */
const KEYS_OLD_MS = 600_000;
const READ_RATE = { perSecond: 1 / 10, burst: 3 };
const READ_MS_MAX = 10_000;
const CLOCK_SECONDS = 10;
const KEYS_MAX = 64;
const ALGORITHMS = ["RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512", "EdDSA"];

const Issuer = z.looseObject({ issuer: z.string().min(1) });
const Keys = z.looseObject({ keys: z.array(z.looseObject({ kty: z.string() })).max(KEYS_MAX) });
const named = z.looseObject({ name: z.string().min(1), uid: z.string().min(1) });
const Bound = z.looseObject({
  "kubernetes.io": z.looseObject({ namespace: z.string().min(1), pod: named, serviceaccount: named }),
});

export type Claims = { namespace: string; pod: { name: string; uid: string }; account: string };
/** "early": what is needed to tell could not be read yet. */
export type Verdict =
  | { kind: "believed"; claims: Claims }
  | { kind: "refused"; detail: string }
  | { kind: "early"; detail: string };

/** A document of the API server, parsed from JSON. */
export type ReadDocument = (path: string, signal: AbortSignal) => Promise<unknown>;

type Known = { issuer: string; keys: ReturnType<typeof createLocalJWKSet>; readMs: number };

export class Tokens {
  readonly #read: ReadDocument;
  readonly #clock: Clock;
  readonly #rate: TokenBucket;
  #known: Known | undefined;
  #reading: Promise<void> | undefined;
  #trouble = "the keys of the cluster have not been read yet";

  constructor(read: ReadDocument, clock: Clock) {
    this.#read = read;
    this.#clock = clock;
    this.#rate = new TokenBucket(READ_RATE, clock.nowMs());
  }

  /** Never rejects. */
  async check(token: string): Promise<Verdict> {
    const isOld = this.#known === undefined || this.#clock.nowMs() - this.#known.readMs > KEYS_OLD_MS;
    if (isOld) await this.#refresh();
    const first = await this.#verify(token);
    if (first !== "unknown key") return first;
    await this.#refresh();
    const second = await this.#verify(token);
    return second === "unknown key"
      ? { kind: "refused", detail: "no key of this cluster has signed the token" }
      : second;
  }

  async #verify(token: string): Promise<Verdict | "unknown key"> {
    if (this.#known === undefined) return { kind: "early", detail: this.#trouble };
    const { issuer, keys } = this.#known;
    try {
      const { payload } = await jwtVerify(token, keys, {
        issuer,
        audience: TOKEN_AUDIENCE,
        algorithms: ALGORITHMS,
        clockTolerance: CLOCK_SECONDS,
        currentDate: new Date(this.#clock.nowMs()),
        requiredClaims: ["exp", "iat"],
      });
      return claimsOf(payload);
    } catch (error) {
      if (error instanceof errors.JWKSNoMatchingKey) return "unknown key";
      return { kind: "refused", detail: `the token is not valid: ${error instanceof Error ? error.message : error}` };
    }
  }

  /** Reads the keys, if that is not too often; one read at a time. */
  async #refresh(): Promise<void> {
    if (this.#reading === undefined) {
      if (!this.#rate.take(this.#clock.nowMs())) return;
      this.#reading = this.#readKeys().finally(() => {
        this.#reading = undefined;
      });
    }
    await this.#reading;
  }

  async #readKeys(): Promise<void> {
    const bound = AbortSignal.timeout(READ_MS_MAX);
    try {
      const [said, held] = await Promise.all([this.#read(ISSUER_PATH, bound), this.#read(KEYS_PATH, bound)]);
      const { issuer } = Issuer.parse(said);
      this.#known = { issuer, keys: createLocalJWKSet(keySetOf(held)), readMs: this.#clock.nowMs() };
    } catch (error) {
      const detail = error instanceof Error ? error.message : String(error);
      this.#trouble = `the keys of the cluster cannot be read: ${detail.slice(0, 500)}`;
    }
  }
}

function keySetOf(held: unknown): JSONWebKeySet {
  return { keys: Keys.parse(held).keys.map((key) => ({ ...key })) };
}

function claimsOf(payload: JWTPayload): Verdict {
  const read = Bound.safeParse(payload);
  if (!read.success) {
    const path = read.error.issues[0]?.path.join(".") ?? "";
    return { kind: "refused", detail: `the token is bound to no pod: claim ${path} is missing` };
  }
  const { namespace, pod, serviceaccount } = read.data["kubernetes.io"];
  return {
    kind: "believed",
    claims: { namespace, pod: { name: pod.name, uid: pod.uid }, account: serviceaccount.name },
  };
}

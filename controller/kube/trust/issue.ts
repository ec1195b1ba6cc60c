// Certificates for pods that prove themselves by their token: the service `Certificates` of one term. Owns the checks of a
// request and its bounds; what a token proves is tokens.ts, who a pod is claimant.ts, what is signed authority.ts.
//
//   I1  a certificate says who the pod is by our own stores; of the request only its key is taken, and the proof that it is held.
//   I2  no issue costs a call to the API server.
//   I3  requests at a time, their size, certificates a second and for each pod are bounded: one pod cannot keep out the others.
import "reflect-metadata";
import { type ServerUnaryCall, type sendUnaryData, status } from "@grpc/grpc-js";
import * as x509 from "@peculiar/x509";
import type { CertificatesServer, IssueRequest, IssueResponse } from "../../../proto/gen/muster/v1/trust.ts";
import type { Clock } from "../api/clock.ts";
import { type Rate, TokenBucket } from "../api/rate-limit.ts";
import { type Authority, bundleOf, LEAF_MS, sign } from "./authority.ts";
import type { Claimant } from "./claimant.ts";
import type { Claims, Tokens } from "./tokens.ts";

/** Of one message: a token is about 1.5 KiB, a request under 1 KiB. */
export const REQUEST_BYTES_MAX = 64 * 1024;
const TOKEN_BYTES_MAX = 32 * 1024;
const KEY_REQUEST_BYTES_MAX = 4 * 1024;
const OPEN_MAX = 64;
/** Signing costs about a millisecond; 10,000 pods that start at once are served within minutes. */
const RATE: Rate = { perSecond: 100, burst: 400 };
/** A pod needs one a day, and a few when it starts or the bundle changes. */
const POD_RATE: Rate = { perSecond: 1 / 30, burst: 5 };
const PODS_REMEMBERED_MAX = 20_000;

export type IssuingOptions = {
  tokens: Pick<Tokens, "check">;
  /** May throw where an object cannot be read. */
  claimantOf: (claims: Claims) => Claimant;
  authority: () => Authority;
  clock: Clock;
  leafMs?: number;
  /** Each certificate, and each request that got none. */
  onAnswer?: (answer: { who: string; detail: string }) => void;
};

type Refusal = { code: status; details: string };

export class Issuing {
  readonly #options: IssuingOptions;
  readonly #rate: TokenBucket;
  readonly #pods = new Map<string, TokenBucket>();
  #open = 0;

  constructor(options: IssuingOptions) {
    this.#options = options;
    this.#rate = new TokenBucket(RATE, options.clock.nowMs());
  }

  get service(): CertificatesServer {
    return {
      issue: (call: ServerUnaryCall<IssueRequest, IssueResponse>, answer: sendUnaryData<IssueResponse>) => {
        void this.#answer(call.request).then((result) => {
          if ("code" in result) answer(result);
          else answer(null, result);
        });
      },
    };
  }

  async #answer(request: IssueRequest): Promise<IssueResponse | Refusal> {
    if (this.#open >= OPEN_MAX)
      return { code: status.RESOURCE_EXHAUSTED, details: `more than ${OPEN_MAX} requests at a time` };
    this.#open += 1;
    try {
      return await this.#issue(request);
    } catch (error) {
      // An object that cannot be read: somebody mends it, or it is replaced.
      return { code: status.UNAVAILABLE, details: error instanceof Error ? error.message : String(error) };
    } finally {
      this.#open -= 1;
    }
  }

  async #issue({ token, requestDer }: IssueRequest): Promise<IssueResponse | Refusal> {
    const { tokens, claimantOf, authority, clock, leafMs = LEAF_MS } = this.#options;
    if (token === "" || token.length > TOKEN_BYTES_MAX)
      return invalid(`token: 1 to ${TOKEN_BYTES_MAX} characters are needed`);
    const key = await keyOfRequest(requestDer);
    if (typeof key === "string") return invalid(`request_der: ${key}`);
    const verdict = await tokens.check(token);
    if (verdict.kind !== "believed") return this.#refuse("somebody", verdict);
    const { namespace, pod } = verdict.claims;
    const who = `${namespace}/${pod.name}`;
    const claimant = claimantOf(verdict.claims);
    if (claimant.kind !== "known") return this.#refuse(who, claimant);
    if (!this.#mayHave(pod.uid)) return { code: status.RESOURCE_EXHAUSTED, details: `${who}: too many certificates` };
    const now = authority();
    const nowMs = clock.nowMs();
    const wanted = { identity: claimant.identity, dns: claimant.dns, ips: [], notAfterMs: nowMs + leafMs };
    const { der, notAfterMs } = await sign(now, key, wanted, nowMs);
    this.#options.onAnswer?.({ who, detail: `has a certificate as ${claimant.identity.role}` });
    return { chainDer: [der], bundlePem: Buffer.from(bundleOf(now)), notAfterUnixMs: BigInt(Math.floor(notAfterMs)) };
  }

  #refuse(who: string, { kind, detail }: { kind: "refused" | "early"; detail: string }): Refusal {
    this.#options.onAnswer?.({ who, detail });
    return { code: kind === "early" ? status.UNAVAILABLE : status.UNAUTHENTICATED, details: detail };
  }

  #mayHave(podUid: string): boolean {
    const nowMs = this.#options.clock.nowMs();
    const own = this.#pods.get(podUid) ?? new TokenBucket(POD_RATE, nowMs);
    this.#pods.delete(podUid); // to the end: the one that asked longest ago is forgotten first
    this.#pods.set(podUid, own);
    const [oldest] = this.#pods.keys();
    if (this.#pods.size > PODS_REMEMBERED_MAX && oldest !== undefined) this.#pods.delete(oldest);
    return own.take(nowMs) && this.#rate.take(nowMs);
  }
}

const invalid = (details: string): Refusal => ({ code: status.INVALID_ARGUMENT, details });

/** The key of a PKCS#10 request; text: why there is none to be had. */
export async function keyOfRequest(der: Buffer): Promise<x509.PublicKey | string> {
  if (der.length === 0 || der.length > KEY_REQUEST_BYTES_MAX) return `1 to ${KEY_REQUEST_BYTES_MAX} bytes are needed`;
  try {
    const request = new x509.Pkcs10CertificateRequest(new Uint8Array(der));
    const { algorithm } = request.publicKey;
    const isP256 = algorithm.name === "ECDSA" && "namedCurve" in algorithm && algorithm.namedCurve === "P-256";
    if (!isP256) return "an ECDSA key on P-256 is needed";
    return (await request.verify()) ? request.publicKey : "its signature is not of its key";
  } catch (error) {
    return `it is no PKCS#10 request: ${error instanceof Error ? error.message : error}`;
  }
}

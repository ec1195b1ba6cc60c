// The token side of a cluster for tests: its issuer, its keys, and service account tokens signed by them.
import { exportJWK, generateKeyPair, type JWK, SignJWT } from "jose";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { ISSUER_PATH, KEYS_PATH } from "../../../../controller/kube/trust/tokens.ts";

export const ISSUER = "https://kubernetes.default.svc";

export type TokenWish = {
  audience?: string;
  issuer?: string;
  namespace?: string;
  pod?: { name: string; uid: string } | undefined;
  account?: string;
  /** From now. */
  seconds?: number;
  nowMs?: number;
};

export class ClusterKeys {
  #pair: Awaited<ReturnType<typeof generateKeyPair>>;
  #kid = "";
  readonly #public: JWK[] = [];
  /** Paths that were read. */
  readonly reads: string[] = [];
  isAway = false;

  private constructor(pair: Awaited<ReturnType<typeof generateKeyPair>>) {
    this.#pair = pair;
  }

  static async make(): Promise<ClusterKeys> {
    const keys = new ClusterKeys(await generateKeyPair("RS256"));
    await keys.#publish();
    return keys;
  }

  /** Signs with another key from now on; the former is still there. */
  async rotate(): Promise<void> {
    this.#pair = await generateKeyPair("RS256");
    await this.#publish();
  }

  async #publish(): Promise<void> {
    this.#kid = `key-${this.#public.length}`;
    this.#public.push({ ...(await exportJWK(this.#pair.publicKey)), kid: this.#kid, alg: "RS256", use: "sig" });
  }

  readonly read = async (path: string): Promise<unknown> => {
    this.reads.push(path);
    if (this.isAway) throw new Error("the server is away");
    if (path === ISSUER_PATH) return { issuer: ISSUER, jwks_uri: `${ISSUER}${KEYS_PATH}` };
    if (path === KEYS_PATH) return { keys: this.#public };
    throw new Error(`nothing at ${path}`);
  };

  token(wish: TokenWish = {}): Promise<string> {
    const {
      audience = "muster",
      issuer = ISSUER,
      namespace = "models",
      account = "muster-worker",
      seconds = 3_600,
    } = wish;
    const pod = "pod" in wish ? wish.pod : { name: "nano-d-0-1-0", uid: "uid-w" };
    const now = Math.floor((wish.nowMs ?? Date.now()) / 1000);
    const bound = {
      namespace,
      serviceaccount: { name: account, uid: "uid-sa" },
      ...(pod === undefined ? {} : { pod }),
    };
    return new SignJWT({ "kubernetes.io": bound })
      .setProtectedHeader({ alg: "RS256", kid: this.#kid })
      .setIssuer(issuer)
      .setAudience(audience)
      .setSubject(`system:serviceaccount:${namespace}:${account}`)
      .setIssuedAt(now)
      .setExpirationTime(now + seconds)
      .sign(this.#pair.privateKey);
  }

  /** Of the pod as it is stored. */
  tokenOf({ metadata, spec }: KubeObject & { spec: { serviceAccountName: string } }): Promise<string> {
    const pod = { name: metadata.name, uid: metadata.uid ?? "" };
    return this.token({ namespace: metadata.namespace ?? "", account: spec.serviceAccountName, pod });
  }
}

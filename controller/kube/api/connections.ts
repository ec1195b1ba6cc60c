// The sockets to the API server: one pool for everything. Owns how many there are and when a pool gives way to another.
//
//   P1  at most `socketsMax` sockets at a time to one server, however many calls and watches there are; what finds none waits.
//   P2  the pool is kept as long as address and TLS material are the same; a token that changes changes no connection.
//   P3  when TLS material has changed, new requests go over a new pool; the old one ends with its last request.
//   P4  credentials are read again at most every RELOAD_MS, and at once after a 401.
//
// HTTP/1.1 on purpose: one watch for each socket. With HTTP/2 one dead connection silences every watch and call at once.
import { createHash } from "node:crypto";
import { Agent } from "undici";
import type { Access, Credentials } from "./credentials.ts";

/** All watches and calls that http-api.ts lets be at a time, and room for one client more beside it (the leader election's). */
export const SOCKETS_MAX = 128;

const RELOAD_MS = 10_000;
const CONNECT_MS = 10_000;
/** Idle sockets: longer than between two reconciles, shorter than load balancers of clouds keep theirs. */
const IDLE_SOCKET_MS = 50_000;

export class Connections {
  readonly #credentials: Credentials;
  readonly #socketsMax: number;
  #access: { access: Access; readMs: number } | undefined;
  #loading: Promise<Access> | undefined;
  #pool: { key: string; agent: Agent } | undefined;
  #isClosed = false;

  constructor(credentials: Credentials, options: { socketsMax?: number } = {}) {
    this.#credentials = credentials;
    this.#socketsMax = options.socketsMax ?? SOCKETS_MAX;
  }

  /** What to send a request with. Throws a KubeError where the credentials cannot be read. */
  async open(): Promise<{ agent: Agent; access: Access }> {
    const known = this.#access;
    if (known !== undefined && performance.now() - known.readMs < RELOAD_MS) {
      return { agent: this.#agentFor(known.access), access: known.access };
    }
    this.#loading ??= this.#credentials.load().finally(() => {
      this.#loading = undefined;
    });
    const access = await this.#loading;
    this.#access = { access, readMs: performance.now() };
    return { agent: this.#agentFor(access), access };
  }

  /** The server does not believe us any more. */
  distrust(): void {
    this.#access = undefined;
  }

  /** Requests under way are broken off. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await this.#pool?.agent.destroy();
  }

  #agentFor(access: Access): Agent {
    if (this.#isClosed) throw new Error("the connections to the API server have been closed");
    const key = keyOf(access);
    if (this.#pool?.key === key) return this.#pool.agent;
    void this.#pool?.agent.close();
    const agent = new Agent({
      allowH2: false,
      connections: this.#socketsMax,
      pipelining: 1,
      keepAliveTimeout: IDLE_SOCKET_MS,
      connect: { ...access.tls, timeout: CONNECT_MS, keepAlive: true, keepAliveInitialDelay: 30_000 },
    });
    this.#pool = { key, agent };
    return agent;
  }
}

/** P2: everything that a connection is made with, and nothing else. */
function keyOf({ server, tls }: Access): string {
  const hash = createHash("sha256").update(server.origin);
  for (const part of [tls.ca, tls.cert, tls.key, tls.servername, String(tls.rejectUnauthorized)]) {
    hash.update("\0").update(part ?? "");
  }
  return hash.digest("hex");
}

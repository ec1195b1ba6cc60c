// An HTTP proxy between a bed's clients and its API server: the place at which a controller dies and the API misbehaves. Clients
// are told apart by the first part of the path, which their kubeconfigs have and the server never sees. Owns what goes wrong.
//
//   X1  writes are POST, PUT, PATCH and DELETE, without dry runs, leases and events: what a step of a reconciler is.
//   X2  whoever dies "before" a write has not done it; "after" it, it is done and its answer is never sent.
//   X3  what the moods do to a request is drawn from a seed, in the order in which requests come.
//   X4  lines of a watch keep their order and none is left out while it lives: a break is the connection's end.
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { join } from "node:path";
import { Agent, type Dispatcher } from "undici";
import { fieldsOf, textOf } from "../../../controller/kube/api/fields.ts";
import { randomOf } from "../../sim/random.ts";
import { heard } from "../controlplane/network-space.ts";
import type { Bed } from "./bed.ts";
import { calm, type Mood, type Moods } from "./moods.ts";
import { pause } from "./probe.ts";

const PORT = 7001;
const BODY_BYTES_MAX = 4 << 20;
/** Never passed on: they are of one connection. */
const OWN_HEADERS = new Set(["host", "connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"]);
const PATH = /\/namespaces\/[^/]+\/([a-z]+)(?:\/([^/]+)(?:\/([a-z]+))?)?$/;
const WRITE_VERBS = new Set(["POST", "PUT", "PATCH", "DELETE"]);

/** One write of a client: "PUT replicagroups/status", the object's name (of POST: that in the body), and what is sent. */
export type Step = { what: string; name: string; body: unknown };
export type Fate = {
  /** Whether the client dies at this write of its; asked once for each. */
  diesAt: (step: Step) => "before" | "after" | undefined;
  /** Ends the client's process; nothing that it does after this call reaches the server. */
  die: () => void;
};
type Client = { fate: Fate | undefined; isDead: boolean };

export class ApiProxy {
  readonly #bed: Bed;
  readonly #agent: Agent;
  readonly #server = createServer((question, answer) => void this.#take(question, answer));
  readonly #clients = new Map<string, Client>();
  readonly #closing = new AbortController();
  #moods: Moods = calm;
  #random = randomOf(0);
  /** How many of each have happened: a test of faults without faults proves nothing. */
  readonly happened = new Map<Mood, number>();

  private constructor(bed: Bed) {
    this.#bed = bed;
    this.#agent = new Agent({ connect: { ca: bed.plane.ca }, bodyTimeout: 0, headersTimeout: 60_000 });
  }

  /** Reached from inside the space; ends with the bed or `close`. */
  static async open(bed: Bed): Promise<ApiProxy> {
    const proxy = new ApiProxy(bed);
    const { processes, space, dir } = bed.plane;
    const socket = join(dir, "api-proxy.sock");
    proxy.#server.listen(socket);
    await once(proxy.#server, "listening");
    const said = heard(processes, "relay", "open");
    processes.spawn({
      id: "relay",
      ...space.inside(process.execPath, [join(import.meta.dirname, "relay.ts"), String(PORT), socket]),
      env: { PATH: process.env.PATH ?? "" },
      log: join(dir, "relay.log"),
      watchesStdin: true,
    });
    await said;
    return proxy;
  }

  /** Path of a kubeconfig for one client, right inside the space; `fate`: where that client dies. */
  kubeconfig(client: string, fate?: Fate): string {
    this.#clients.set(client, { fate, isDead: false });
    const path = join(this.#bed.plane.dir, `${client}.kubeconfig`);
    const config = {
      apiVersion: "v1",
      kind: "Config",
      clusters: [{ name: "test", cluster: { server: `http://127.0.0.1:${PORT}/${client}` } }],
      users: [{ name: "user", user: { token: this.#bed.plane.token } }],
      contexts: [{ name: "test", context: { cluster: "test", user: "user" } }],
      "current-context": "test",
    };
    writeFileSync(path, JSON.stringify(config), { mode: 0o600 });
    return path;
  }

  /** Moods of the API from now on, for everybody behind the proxy. */
  turn(moods: Moods, seed = 0): void {
    this.#moods = moods;
    this.#random = randomOf(seed);
  }

  async close(): Promise<void> {
    this.#closing.abort();
    this.#server.close();
    this.#server.closeAllConnections();
    await this.#agent.destroy();
  }

  async #take(question: IncomingMessage, answer: ServerResponse): Promise<void> {
    const gone = new AbortController();
    answer.on("close", () => gone.abort());
    try {
      await this.#pass(question, answer, AbortSignal.any([gone.signal, this.#closing.signal]));
    } catch {
      question.socket.destroy(); // what a server that cannot be reached does
    }
  }

  async #pass(question: IncomingMessage, answer: ServerResponse, signal: AbortSignal): Promise<void> {
    const [, name = "", path = "/"] = /^\/([^/]+)(\/.*)$/.exec(question.url ?? "") ?? [];
    const client = this.#clients.get(name);
    if (client === undefined || client.isDead) throw new Error(`no client ${name}`);
    const body = await bodyOf(question);
    const ask: Ask = { method: question.method ?? "GET", path, headers: headersOf(question), body };
    await this.#delay(signal);
    if (this.#refuse(ask, answer)) return;
    const step = stepOf(ask);
    const when = step && client.fate?.diesAt(step);
    if (when === "before") return this.#die(client);
    // A write that is on its way is done whether its writer lives or not.
    const response = await this.#send(ask, step === undefined ? signal : this.#closing.signal);
    if (when === "after") {
      await response.body.dump();
      return this.#die(client);
    }
    if (client.isDead) throw new Error(`${name} is dead`);
    if (step !== undefined && this.#strikes("loseReply")) {
      await response.body.dump();
      throw new Error("the reply is lost");
    }
    await this.#answer(ask, response, answer);
  }

  /** The process first: its sockets end after it. Rejects, so that nothing is answered. */
  #die(client: Client): never {
    client.isDead = true;
    client.fate?.die();
    throw new Error("it has died");
  }

  async #send(ask: Ask, signal: AbortSignal): Promise<Dispatcher.ResponseData> {
    return await this.#agent.request({
      origin: this.#bed.plane.url,
      path: ask.path,
      method: ask.method,
      headers: ask.headers,
      body: ask.body.length > 0 ? ask.body : null,
      signal,
    });
  }

  async #answer(ask: Ask, response: Dispatcher.ResponseData, answer: ServerResponse): Promise<void> {
    const headers = Object.entries(response.headers).filter(([key]) => !OWN_HEADERS.has(key));
    answer.writeHead(response.statusCode, Object.fromEntries(headers));
    answer.flushHeaders();
    const isWatch = /[?&]watch=(1|true)/.test(ask.path);
    let isAtLine = true;
    for await (const chunk of response.body) {
      if (isWatch && this.#strikes("watchBreak")) throw new Error("the watch is dropped");
      if (isWatch && isAtLine && this.#strikes("watchGone")) {
        answer.end(
          `${JSON.stringify({ type: "ERROR", object: statusOf(410, "Expired", "too old resource version") })}\n`,
        );
        response.body.on("error", () => {}).destroy();
        return;
      }
      isAtLine = chunk.at(-1) === NEWLINE;
      if (!answer.write(chunk)) await once(answer, "drain", { signal: this.#closing.signal });
    }
    answer.end();
  }

  async #delay(signal: AbortSignal): Promise<void> {
    const { slowMs, latencyMs } = this.#moods;
    const [least, most] = this.#strikes("slow") ? slowMs : latencyMs;
    if (most > 0) await pause(least + this.#random() * (most - least), signal);
    signal.throwIfAborted();
  }

  /** Whether it has been answered, without the server having seen it. */
  #refuse(ask: Ask, answer: ServerResponse): boolean {
    if (this.#strikes("unreachable")) throw new Error("unreachable");
    const refuse = (code: number, reason: string, retryAfter?: string): true => {
      const headers = { "content-type": "application/json", ...(retryAfter ? { "retry-after": retryAfter } : {}) };
      answer.writeHead(code, headers).end(JSON.stringify(statusOf(code, reason, "by the mood of the proxy")));
      return true;
    };
    if (this.#strikes("tooMany")) return refuse(429, "TooManyRequests", "1");
    if (this.#strikes("unavailable")) return refuse(503, "ServiceUnavailable", "1");
    if (this.#strikes("internal")) return refuse(500, "InternalError");
    // Of what names a version somebody else may have been faster.
    if (ask.method === "PUT" && this.#strikes("conflict")) return refuse(409, "Conflict");
    return false;
  }

  #strikes(mood: Mood): boolean {
    if (this.#moods[mood] === 0 || this.#random() >= this.#moods[mood]) return false;
    this.happened.set(mood, (this.happened.get(mood) ?? 0) + 1);
    return true;
  }
}

type Ask = { method: string; path: string; headers: Record<string, string>; body: Buffer };

const NEWLINE = 10;

const statusOf = (code: number, reason: string, message: string) => ({
  kind: "Status",
  apiVersion: "v1",
  status: "Failure",
  code,
  reason,
  message,
});

/** X1; undefined for what is no step. */
function stepOf({ method, path, body: bytes }: Ask): Step | undefined {
  const url = new URL(path, "http://api");
  if (!WRITE_VERBS.has(method) || url.searchParams.has("dryRun")) return undefined;
  const [, kind = "", named, sub] = PATH.exec(url.pathname) ?? [];
  if (kind === "leases" || kind === "events") return undefined;
  const body: unknown = bytes.length > 0 ? JSON.parse(bytes.toString()) : undefined;
  const name = named ?? textOf(fieldsOf(fieldsOf(body).metadata).name) ?? "";
  return { what: `${method} ${kind || url.pathname}${sub ? `/${sub}` : ""}`, name, body };
}

function headersOf(question: IncomingMessage): Record<string, string> {
  return Object.fromEntries(
    Object.entries(question.headers).flatMap(([key, value]) =>
      typeof value === "string" && !OWN_HEADERS.has(key) ? [[key, value]] : [],
    ),
  );
}

async function bodyOf(question: IncomingMessage): Promise<Buffer> {
  const parts: Buffer[] = [];
  let held = 0;
  for await (const part of question) {
    parts.push(part);
    held += part.length;
    if (held > BODY_BYTES_MAX) throw new Error("a body is too long");
  }
  return Buffer.concat(parts);
}

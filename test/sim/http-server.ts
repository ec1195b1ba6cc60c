// The simulated API server behind real sockets: the Kubernetes URL scheme over HTTP/1.1 on loopback, for tests of the HTTP
// client. Owns URLs, status bodies and sockets; what happens to objects is the KubeApi's behind it.
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo, Socket } from "node:net";
import { buffer } from "node:stream/consumers";
import type { SecureContextOptions } from "node:tls";
import {
  type KubeApi,
  KubeError,
  type PatchOptions,
  type Resource,
  type WatchLine,
} from "../../controller/kube/api/client.ts";
import { isRecord, objectOf } from "../../controller/kube/api/wire.ts";

export type HttpServerOptions = {
  /** Kinds that have a URL. */
  resources: readonly Resource[];
  /** A fixed port, to come back at the same address; else any free one. */
  port?: number;
  tls?: SecureContextOptions & { requestCert?: boolean };
  /** Sees each request first; answers true where it has answered it itself. */
  intercept?: (request: IncomingMessage, response: ServerResponse) => boolean;
};

const PATCH_TYPES: Readonly<Record<string, PatchOptions["type"]>> = {
  "application/json-patch+json": "json",
  "application/merge-patch+json": "merge",
  "application/apply-patch+yaml": "apply",
};

type Route = { resource: Resource; namespace: string | undefined; name: string | undefined; subresource: string };

export class SimHttpServer {
  /** Sockets ever accepted. */
  socketsAccepted = 0;
  requests: { method: string; url: string; headers: IncomingMessage["headers"] }[] = [];
  readonly #api: KubeApi;
  readonly #options: HttpServerOptions;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  #port = 0;

  constructor(api: KubeApi, options: HttpServerOptions) {
    this.#api = api;
    this.#options = options;
    const onRequest = (request: IncomingMessage, response: ServerResponse) => void this.#answer(request, response);
    this.#server = options.tls === undefined ? createServer(onRequest) : createTlsServer(options.tls, onRequest);
    this.#server.on("connection", (socket) => {
      this.socketsAccepted += 1;
      this.#sockets.add(socket);
      socket.on("close", () => this.#sockets.delete(socket));
    });
  }

  static async listen(api: KubeApi, options: HttpServerOptions): Promise<SimHttpServer> {
    const server = new SimHttpServer(api, options);
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    server.#server.once("error", reject);
    server.#server.listen(options.port ?? 0, "127.0.0.1", resolve);
    await promise;
    server.#port = addressOf(server.#server).port;
    return server;
  }

  /** Also after the end, to come back at the same place. */
  get port(): number {
    return this.#port;
  }

  get url(): string {
    return `${this.#options.tls === undefined ? "http" : "https"}://127.0.0.1:${this.port}`;
  }

  get socketsOpen(): number {
    return this.#sockets.size;
  }

  /** As a process that is killed: every socket is reset. */
  async close(): Promise<void> {
    const closed = new Promise<void>((done) => this.#server.close(() => done()));
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = request.url ?? "/";
    this.requests.push({ method: request.method ?? "", url, headers: request.headers });
    if (this.#options.intercept?.(request, response)) return;
    const gone = new AbortController();
    response.on("close", () => gone.abort());
    try {
      const { pathname, searchParams } = new URL(url, "http://sim");
      const body = await bodyOf(request);
      if (request.method === "GET" && searchParams.get("watch") === "true") {
        await this.#stream(this.#route(pathname), searchParams, { response, signal: gone.signal });
      } else {
        send(response, await this.#call(request, { pathname, query: searchParams, body, signal: gone.signal }));
      }
    } catch (error) {
      if (!gone.signal.aborted) fail(response, error);
    }
  }

  async #call(
    request: IncomingMessage,
    call: { pathname: string; query: URLSearchParams; body: unknown; signal: AbortSignal },
  ): Promise<unknown> {
    const { pathname, query, body, signal } = call;
    const group = /^\/(?:api\/([^/]+)|apis\/([^/]+)\/([^/]+))$/.exec(pathname);
    if (group && request.method === "GET") return this.#discover(group[2] ?? "", group[3] ?? group[1] ?? "", signal);
    const { resource, namespace, name, subresource } = this.#route(pathname);
    const fieldManager = query.get("fieldManager");
    const write = { dryRun: query.get("dryRun") === "All", ...(fieldManager === null ? {} : { fieldManager }) };
    const method = `${request.method}${name === undefined ? "" : " one"}${subresource ? " part" : ""}`;
    switch (method) {
      case "GET":
        return this.#list(resource, namespace, query, signal);
      case "POST":
        return this.#api.create(resource, objectOf(body, resource), signal, write);
      case "GET one": {
        const object = await this.#api.get(resource, name ?? "", namespace, signal);
        if (object === undefined) throw new KubeError(404, "NotFound", `${resource.plural} "${name}" not found`);
        return object;
      }
      case "PUT one":
        return this.#api.replace(resource, objectOf(body, resource), signal, write);
      case "PUT one part":
        return this.#api.replaceStatus(resource, objectOf(body, resource), signal, write);
      case "PATCH one":
      case "PATCH one part": {
        const type = PATCH_TYPES[request.headers["content-type"] ?? ""];
        if (type === undefined)
          throw new KubeError(415, "UnsupportedMediaType", "the body of the request was in an unknown format");
        const force = query.get("force") === "true";
        const options = { ...write, type, force, ...(subresource ? { subresource } : {}) };
        return this.#api.patch(resource, name ?? "", namespace, body, options, signal);
      }
      case "DELETE one": {
        const options = isRecord(body) ? { ...body } : {};
        const isThere = await this.#api.delete(resource, name ?? "", namespace, options, signal);
        if (!isThere) throw new KubeError(404, "NotFound", `${resource.plural} "${name}" not found`);
        return { kind: "Status", apiVersion: "v1", status: "Success" };
      }
      default:
        throw new KubeError(405, "MethodNotAllowed", `the server does not allow ${method} on the requested resource`);
    }
  }

  async #discover(group: string, version: string, signal: AbortSignal): Promise<unknown> {
    const known = this.#options.resources.filter((one) => one.group === group && one.version === version);
    const served = await Promise.all(known.map((one) => this.#api.serves(one, signal)));
    const resources = known.filter((_, at) => served[at]).map(({ plural, kind }) => ({ name: plural, kind }));
    if (resources.length === 0)
      throw new KubeError(404, "NotFound", "the server could not find the requested resource");
    return { kind: "APIResourceList", groupVersion: group ? `${group}/${version}` : version, resources };
  }

  /** Items of a typed list carry no kind, as with the real one. */
  async #list(resource: Resource, namespace: string | undefined, query: URLSearchParams, signal: AbortSignal) {
    const page = await this.#api.list(resource, { ...selectionOf(query, namespace), ...pagingOf(query) }, signal);
    const items = page.items.map(({ apiVersion: _, kind: __, ...rest }) => rest);
    const metadata = { resourceVersion: page.resourceVersion, ...(page.continue ? { continue: page.continue } : {}) };
    return { kind: `${resource.kind}List`, apiVersion: "v1", metadata, items: items.length > 0 ? items : null };
  }

  async #stream(
    route: Route,
    query: URLSearchParams,
    to: { response: ServerResponse; signal: AbortSignal },
  ): Promise<void> {
    const { resource, namespace } = route;
    const options = {
      ...selectionOf(query, namespace),
      resourceVersion: query.get("resourceVersion") ?? "",
      timeoutSeconds: Number(query.get("timeoutSeconds") ?? "1800"),
    };
    const lines = this.#api.watch(resource, options, to.signal)[Symbol.asyncIterator]();
    // The first look is before the headers, so that a refused watch is an HTTP error; headers do not wait for a line.
    const first = lines.next();
    const early = await Promise.race([first, new Promise<undefined>((later) => setImmediate(() => later(undefined)))]);
    to.response.writeHead(200, { "content-type": "application/json" });
    to.response.flushHeaders();
    try {
      for (let next = early ?? (await first); !next.done; next = await lines.next()) {
        to.response.write(`${JSON.stringify(eventOf(next.value, resource))}\n`);
      }
      to.response.end();
    } catch {
      to.response.destroy();
    }
  }

  #route(pathname: string): Route {
    const match =
      /^\/(?:api\/(?<core>[^/]+)|apis\/(?<group>[^/]+)\/(?<version>[^/]+))(?:\/namespaces\/(?<namespace>[^/]+))?\/(?<plural>[^/]+)(?:\/(?<name>[^/]+))?(?:\/(?<part>[^/]+))?$/.exec(
        pathname,
      )?.groups;
    const version = match?.core ?? match?.version;
    const resource = this.#options.resources.find(
      (one) => one.plural === match?.plural && one.group === (match?.group ?? "") && one.version === version,
    );
    if (match === undefined || resource === undefined) {
      throw new KubeError(404, "NotFound", "the server could not find the requested resource");
    }
    const { namespace, name, part } = match;
    return { resource, namespace, name, subresource: part ?? "" };
  }
}

function addressOf(server: Server): AddressInfo {
  const address = server.address();
  if (address === null || typeof address === "string") throw new Error("the server does not listen on a port");
  return address;
}

async function bodyOf(request: IncomingMessage): Promise<unknown> {
  const bytes = await buffer(request);
  if (bytes.length === 0) return undefined;
  try {
    return JSON.parse(bytes.toString("utf8"));
  } catch {
    throw new KubeError(400, "BadRequest", "the body is no JSON");
  }
}

function selectionOf(query: URLSearchParams, namespace: string | undefined) {
  const labelSelector = query.get("labelSelector");
  const fieldSelector = query.get("fieldSelector");
  return {
    ...(namespace === undefined ? {} : { namespace }),
    ...(labelSelector === null ? {} : { labelSelector }),
    ...(fieldSelector === null ? {} : { fieldSelector }),
  };
}

function pagingOf(query: URLSearchParams) {
  const token = query.get("continue");
  const limit = query.get("limit");
  return { ...(token === null ? {} : { continue: token }), ...(limit === null ? {} : { limit: Number(limit) }) };
}

function eventOf(line: WatchLine, resource: Resource) {
  switch (line.type) {
    case "BOOKMARK":
      return { type: line.type, object: { kind: resource.kind, metadata: { resourceVersion: line.resourceVersion } } };
    case "ERROR":
      return { type: line.type, object: statusOf(line.error) };
    default:
      return { type: line.type, object: line.object };
  }
}

function statusOf(error: KubeError): Record<string, unknown> {
  const { code, reason, message, retryAfterMs } = error;
  const details = retryAfterMs === undefined ? {} : { details: { retryAfterSeconds: Math.ceil(retryAfterMs / 1000) } };
  return { kind: "Status", apiVersion: "v1", status: "Failure", code, reason, message, ...details };
}

function send(response: ServerResponse, value: unknown): void {
  response.writeHead(200, { "content-type": "application/json" }).end(JSON.stringify(value));
}

/** Without an answer (code 0) the socket breaks, as it would. */
function fail(response: ServerResponse, error: unknown): void {
  if (!(error instanceof KubeError) || error.code === 0 || response.headersSent) {
    response.destroy();
    return;
  }
  const wait = error.retryAfterMs === undefined ? {} : { "retry-after": String(Math.ceil(error.retryAfterMs / 1000)) };
  response.writeHead(error.code, { "content-type": "application/json", ...wait }).end(JSON.stringify(statusOf(error)));
}

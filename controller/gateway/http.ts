// The HTTP front door: the OpenAI routes, health, metrics. Owns sockets and status codes; what a body may hold is
// openai-request.ts, how an answer looks is openai-answer.ts, who runs is streams.ts.
import { randomBytes } from "node:crypto";
import type { AddressInfo } from "node:net";
import type { FastifyError, FastifyInstance, FastifyReply, FastifyRequest } from "fastify";
import { fastify } from "fastify";
import { consequence, invalid, transient } from "../../proto/fault.ts";
import type { Fault } from "../../proto/gen/muster/v1/worker.ts";
import { keyCheck } from "./key.ts";
import {
  BODY_BYTES_MAX,
  CONNECTIONS_MAX,
  REQUEST_RECEIVE_MS,
  RETRY_AFTER_DOWN_S,
  RETRY_AFTER_QUEUE_S,
} from "./limits.ts";
import type { GatewayMetrics } from "./metrics.ts";
import { type Answer, errorBody, wholeBody } from "./openai-answer.ts";
import { type Parsed, parseChat, parseCompletion } from "./openai-request.ts";
import { SseSink } from "./sse.ts";
import type { Streams } from "./streams.ts";
import type { ModelView } from "./watch.ts";
import { WholeSink } from "./whole.ts";

/** How often stalled clients are looked for. */
const STALL_SWEEP_MS = 1_000;
const CLIENT_GONE = "client_gone";
const UNAUTHORIZED = "missing or wrong API key: send the header 'Authorization: Bearer KEY'";

export type HttpOptions = {
  streams: Streams;
  metrics: GatewayMetrics;
  apiKey: string | undefined;
  /** Why no request can be taken now; undefined where one can. */
  notReady: () => string | undefined;
};

export class HttpFront {
  readonly app: FastifyInstance;
  readonly #options: HttpOptions;
  readonly #sinks = new Map<SseSink, () => void>();
  readonly #sweep: NodeJS.Timeout;

  constructor(options: HttpOptions) {
    this.#options = options;
    this.app = fastify({
      bodyLimit: BODY_BYTES_MAX,
      requestTimeout: REQUEST_RECEIVE_MS,
      return503OnClosing: false,
      genReqId: (request) => requestId(request.headers["x-request-id"]),
      logger: false,
    });
    this.app.server.maxConnections = CONNECTIONS_MAX;
    this.#hooks();
    this.#routes();
    const { stallMs } = options.streams.limits;
    this.#sweep = setInterval(() => this.#dropStalled(), Math.min(STALL_SWEEP_MS, stallMs / 4));
    this.#sweep.unref();
  }

  /** Binds and returns the address. */
  async listen(host: string, port: number): Promise<AddressInfo> {
    await this.app.listen({ host, port });
    const address = this.app.server.address();
    if (address === null || typeof address === "string") throw new Error("the HTTP server has no address");
    return address;
  }

  /** Takes no new connection; resolves when the last answer is written. */
  async close(): Promise<void> {
    clearInterval(this.#sweep);
    await this.app.close();
  }

  #hooks(): void {
    const { apiKey, metrics, streams } = this.#options;
    const allowed = keyCheck(apiKey);
    this.app.addHook("onRequest", async (request, reply) => {
      reply.header("x-request-id", request.id);
      if (streams.isDraining) reply.header("connection", "close");
      if (!request.url.startsWith("/v1/") || allowed(request.headers.authorization)) return;
      reply.header("www-authenticate", "Bearer");
      return reply.code(401).send(refusalBody("invalid_api_key", UNAUTHORIZED));
    });
    this.app.addHook("onResponse", async (request, reply) => {
      metrics.request(request.routeOptions.url ?? "unknown", reply.statusCode, reply.elapsedTime);
    });
    // Only JSON, and read here: the message then says where it broke off.
    this.app.removeAllContentTypeParsers();
    this.app.addContentTypeParser("application/json", { parseAs: "string" }, (_request, body, done) => {
      try {
        done(null, JSON.parse(body.toString()));
      } catch (cause) {
        done(
          Object.assign(new Error(`malformed JSON: ${cause instanceof Error ? cause.message : ""}`), {
            statusCode: 400,
          }),
        );
      }
    });
    this.app.setErrorHandler((error: FastifyError, _request, reply) => sendError(error, reply));
    this.app.setNotFoundHandler((request, reply) => this.#notFound(request, reply));
  }

  #routes(): void {
    const { app } = this;
    const { notReady, metrics, streams } = this.#options;
    app.get("/healthz", async () => ({ status: "ok" }));
    app.get("/readyz", async (_request, reply) => {
      const status = notReady();
      if (status === undefined) return { status: "ready" };
      return reply.code(503).header("retry-after", RETRY_AFTER_DOWN_S).send({ status });
    });
    app.get("/metrics", (request, reply) => {
      reply.hijack();
      metrics.handle(request.raw, reply.raw);
    });
    app.get("/v1/models", async () => ({
      object: "list",
      data: streams.view.models().map(modelBody),
    }));
    app.get<{ Params: { "*": string } }>("/v1/models/*", async (request, reply) => {
      const found = streams.resolve(request.params["*"]);
      return "fault" in found ? sendFault(reply, found.fault) : modelBody(found.view);
    });
    app.post("/v1/completions", (request, reply) => this.#answer(request, reply, parseCompletion(request.body)));
    app.post("/v1/chat/completions", (request, reply) => this.#answer(request, reply, parseChat(request.body)));
  }

  async #answer(request: FastifyRequest, reply: FastifyReply, parsed: Parsed | { fault: Fault }): Promise<unknown> {
    if ("fault" in parsed) return sendFault(reply, parsed.fault);
    return parsed.presentation.stream ? this.#stream(request, reply, parsed) : this.#whole(reply, parsed);
  }

  async #whole(reply: FastifyReply, { ask, presentation }: Parsed): Promise<unknown> {
    const { streams } = this.#options;
    const found = streams.resolve(ask.model);
    if ("fault" in found) return sendFault(reply, found.fault);
    const { title } = found.view;
    const sink = new WholeSink(ask.inputs.length * ask.n);
    const started = streams.start(ask, sink);
    if ("fault" in started) return sendFault(reply, started.fault);
    const { job } = started;
    reply.raw.on("close", () => {
      if (reply.raw.writableFinished || job.over) return;
      streams.cancel(job);
      sink.failed(transient(CLIENT_GONE, "the client went away"));
    });
    const fault = await sink.result;
    if (fault) return fault.code === CLIENT_GONE ? reply.code(499).send() : sendFault(reply, fault);
    return wholeBody(answerOf(title, presentation), job.choices, sink.wholes, ask.n);
  }

  #stream(request: FastifyRequest, reply: FastifyReply, { ask, presentation }: Parsed): unknown {
    const { metrics, streams } = this.#options;
    const found = streams.resolve(ask.model);
    if ("fault" in found) return sendFault(reply, found.fault);
    const { promise, resolve } = Promise.withResolvers<unknown>();
    const sink: SseSink = new SseSink({
      response: reply.raw,
      answer: answerOf(found.view.title, presentation),
      n: ask.n,
      limits: streams.limits,
      headers: { "x-request-id": request.id, ...(streams.isDraining ? { connection: "close" } : {}) },
      begin: () => reply.hijack(),
      refused: (fault) => resolve(sendFault(reply, fault)),
      over: (status) => {
        this.#sinks.delete(sink);
        if (status === "dropped") metrics.clientDropped();
        resolve(undefined);
      },
    });
    const started = streams.start(ask, sink);
    if ("fault" in started) return sendFault(reply, started.fault);
    const { job } = started;
    this.#sinks.set(sink, () => streams.cancel(job));
    reply.raw.on("close", () => {
      this.#sinks.delete(sink);
      streams.cancel(job);
    });
    return promise;
  }

  #dropStalled(): void {
    const now = performance.now();
    for (const [sink, cancel] of this.#sinks) {
      if (!sink.isStalled(now)) continue;
      cancel();
      sink.drop();
    }
  }

  #notFound(request: FastifyRequest, reply: FastifyReply): unknown {
    const [path = ""] = request.url.split("?");
    const method = allowedMethod(path);
    if (method === undefined) {
      return reply.code(404).send(refusalBody("unknown_url", `unknown URL ${request.method} ${path}`));
    }
    reply.header("allow", method);
    const message = `${request.method} is not allowed on ${path}; use ${method}`;
    return reply.code(405).send(refusalBody("method_not_allowed", message));
  }
}

const getPaths = new Set(["/healthz", "/readyz", "/metrics", "/v1/models"]);
const postPaths = new Set(["/v1/completions", "/v1/chat/completions"]);

/** The method a known path takes; nothing for an unknown path. */
function allowedMethod(path: string): "GET" | "POST" | undefined {
  if (getPaths.has(path) || path.startsWith("/v1/models/")) return "GET";
  return postPaths.has(path) ? "POST" : undefined;
}

function requestId(given: string | string[] | undefined): string {
  if (typeof given === "string" && /^[\w.:-]{1,128}$/.test(given)) return given;
  return `req_${randomBytes(12).toString("hex")}`;
}

const answerOf = (model: string, presentation: Answer["presentation"]): Answer => ({
  id: `${presentation.api === "chat" ? "chatcmpl" : "cmpl"}-${randomBytes(12).toString("hex")}`,
  created: Math.floor(Date.now() / 1000),
  model,
  presentation,
});

const modelBody = ({ title, served, replicas }: ModelView): object => ({
  id: title,
  object: "model",
  created: Number(served.createdUnixS),
  owned_by: "muster",
  muster: {
    aliases: served.aliases,
    revision: served.revision,
    numerics_id: served.numericsId,
    family: served.family,
    context_tokens: served.contextTokens,
    vocab_size: served.vocabSize,
    cause: served.cause,
    chat: served.hasChatTemplate,
    replicas: replicas.filter(({ leader, served: one }) => leader !== undefined && !one.draining).length,
  },
});

const refusalBody = (code: string, message: string): object => errorBody(invalid("", message, code));

function sendFault(reply: FastifyReply, fault: Fault): FastifyReply {
  const { http, retry } = consequence(fault);
  if (retry) reply.header("retry-after", http === 429 ? RETRY_AFTER_QUEUE_S : RETRY_AFTER_DOWN_S);
  return reply.code(http).send(errorBody(fault));
}

/** What fastify found wrong before a route saw the request; anything else is ours and is a 500. */
function sendError(error: FastifyError, reply: FastifyReply): FastifyReply {
  const status = error.statusCode ?? 500;
  if (status >= 500) {
    process.stderr.write(`gateway: ${reply.request.method} ${reply.request.url}: ${error.stack ?? error.message}\n`);
    const body = { message: "internal error of the gateway", type: "server_error", param: null, code: "internal" };
    return reply.code(500).send({ error: body });
  }
  if (status === 413) {
    return reply
      .code(413)
      .send(refusalBody("body_too_large", `the body is larger than ${BODY_BYTES_MAX} bytes, the most allowed`));
  }
  if (status === 415) {
    return reply
      .code(415)
      .send(refusalBody("unsupported_media_type", "send the body as content-type application/json"));
  }
  return reply.code(status).send(refusalBody("malformed_request", `the request could not be read: ${error.message}`));
}

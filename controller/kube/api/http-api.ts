// KubeApi over HTTP. Owns requests: their deadline, rate, retries, bounds, and what each failure is called.
//
//   H1  bodies go out and come in as JSON, field for field; no serializer knows what a kind may have.
//   H2  every call ends within its deadline, waits for rate, socket and retries included.
//   H3  what the server refused before doing anything (429) is tried again when it says; what may have been done is tried
//       again only where it reads. The caller decides about the rest.
//   H4  a watch holds one socket; it ends by itself some time after the server should have ended it, or when nothing comes.
import type { Readable } from "node:stream";
import type { Dispatcher } from "undici";
import type { KubeMetrics } from "../metrics/metrics.ts";
import { Slots } from "../watch/slots.ts";
import {
  type DeleteOptions,
  type KubeApi,
  KubeError,
  type KubeList,
  type KubeObject,
  type ListOptions,
  type PatchOptions,
  type Resource,
  titleOf,
  type WatchLine,
  type WatchOptions,
  type WriteOptions,
} from "./client.ts";
import { systemClock } from "./clock.ts";
import type { Connections } from "./connections.ts";
import { asKubeError } from "./http-errors.ts";
import { linesOf } from "./line-reader.ts";
import { backoffMs, type Rate, TokenBucket, waitForToken } from "./rate-limit.ts";
import {
  errorOf,
  groupPathOf,
  isRecord,
  listOf,
  listQueryOf,
  objectOf,
  pathOf,
  watchLineOf,
  watchQueryOf,
} from "./wire.ts";

export type HttpLimits = {
  callMs: number;
  /** Calls at a time, each on a socket. */
  callsMax: number;
  watchesMax: number;
  rate: Rate;
  tries: number;
  /** Of an answer; a page of 500 pods is about 5 MB. */
  bodyBytesMax: number;
  /** One object: etcd has 1.5 MiB at most, JSON escapes make it more. */
  lineBytesMax: number;
  /** Bookmarks come once a minute. */
  watchIdleMs: number;
};

export const defaultHttpLimits: HttpLimits = {
  callMs: 30_000,
  callsMax: 16,
  watchesMax: 96,
  // A start of 5,000 groups is some 50,000 writes; a server that has too much of it says so (429), and is heard (H3).
  rate: { perSecond: 200, burst: 300 },
  tries: 4,
  bodyBytesMax: 128 << 20,
  lineBytesMax: 8 << 20,
  watchIdleMs: 180_000,
};

export type HttpApiOptions = {
  connections: Connections;
  limits?: Partial<HttpLimits>;
  metrics?: KubeMetrics;
  random?: () => number;
  userAgent?: string;
};

const PATCH_TYPES = {
  json: "application/json-patch+json",
  merge: "application/merge-patch+json",
  // YAML by name; JSON is YAML.
  apply: "application/apply-patch+yaml",
} as const;

const RETRY_BACKOFF = { baseMs: 100, maxMs: 5_000 };
/** After the server's own time-out of a watch. */
const WATCH_SLACK_MS = 30_000;

type Call = {
  verb: "GET" | "POST" | "PUT" | "PATCH" | "DELETE";
  path: string;
  query?: URLSearchParams;
  body?: unknown;
  contentType?: string;
  accept?: string;
  /** For messages: "create pods/default/a". */
  title: string;
};

export class HttpKubeApi implements KubeApi {
  readonly #options: HttpApiOptions;
  readonly #limits: HttpLimits;
  readonly #bucket: TokenBucket;
  readonly #calls: Slots;
  readonly #watches: Slots;

  constructor(options: HttpApiOptions) {
    this.#options = options;
    this.#limits = { ...defaultHttpLimits, ...options.limits };
    this.#bucket = new TokenBucket(this.#limits.rate, systemClock.nowMs());
    this.#calls = new Slots(this.#limits.callsMax);
    this.#watches = new Slots(this.#limits.watchesMax);
  }

  async get(resource: Resource, name: string, namespace: string | undefined, signal: AbortSignal) {
    const call = {
      verb: "GET",
      path: pathOf(resource, namespace, name),
      title: `get ${titleOf(resource, name, namespace)}`,
    } as const;
    const answer = await this.#call(call, signal).catch(undefinedIfMissing);
    return answer === undefined ? undefined : objectOf(answer, resource);
  }

  async list(resource: Resource, options: ListOptions, signal: AbortSignal): Promise<KubeList> {
    const path = pathOf(resource, options.namespace);
    const call = { verb: "GET", path, query: listQueryOf(options), title: `list ${resource.plural}` } as const;
    return listOf(await this.#call(call, signal), resource);
  }

  async create(resource: Resource, object: KubeObject, signal: AbortSignal, options: WriteOptions = {}) {
    const { name, namespace } = object.metadata;
    return this.#write(resource, signal, {
      verb: "POST",
      path: pathOf(resource, namespace),
      query: writeQueryOf(options),
      body: object,
      title: `create ${titleOf(resource, name, namespace)}`,
    });
  }

  async replace(resource: Resource, object: KubeObject, signal: AbortSignal, options: WriteOptions = {}) {
    return this.#put(resource, object, { signal, options, subresource: undefined });
  }

  async replaceStatus(resource: Resource, object: KubeObject, signal: AbortSignal, options: WriteOptions = {}) {
    return this.#put(resource, object, { signal, options, subresource: "status" });
  }

  async patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ): Promise<KubeObject> {
    const query = writeQueryOf(options);
    if (options.type === "apply") query.set("force", String(options.force ?? false));
    return this.#write(resource, signal, {
      verb: "PATCH",
      path: pathOf(resource, namespace, name, options.subresource),
      query,
      body,
      contentType: PATCH_TYPES[options.type],
      title: `${options.type} patch of ${titleOf(resource, name, namespace)}`,
    });
  }

  async delete(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    options: DeleteOptions,
    signal: AbortSignal,
  ): Promise<boolean> {
    const answer = await this.#call(
      {
        verb: "DELETE",
        path: pathOf(resource, namespace, name),
        body: { kind: "DeleteOptions", apiVersion: "v1", ...options },
        title: `delete ${titleOf(resource, name, namespace)}`,
      },
      signal,
    ).catch(undefinedIfMissing);
    return answer !== undefined;
  }

  async serves(resource: Resource, signal: AbortSignal): Promise<boolean> {
    const path = groupPathOf(resource);
    try {
      const answer = await this.#call({ verb: "GET", path, title: `discover ${path}` }, signal);
      const kinds = isRecord(answer) && Array.isArray(answer.resources) ? answer.resources : [];
      return kinds.some((kind) => isRecord(kind) && kind.name === resource.plural);
    } catch (error) {
      if (error instanceof KubeError && error.code === 404) return false;
      throw error;
    }
  }

  /** What the server says at a path that is no resource: its keys, its issuer. `accept`: the form it has there, of JSON. */
  document(path: string, accept: string, signal: AbortSignal): Promise<unknown> {
    return this.#call({ verb: "GET", path, accept, title: `get ${path}` }, signal);
  }

  async *watch(resource: Resource, options: WatchOptions, signal: AbortSignal): AsyncGenerator<WatchLine> {
    const title = `watch ${resource.plural}`;
    const leave = this.#watches.tryEnter();
    if (leave === undefined) {
      throw new KubeError(
        0,
        "TooManyWatches",
        `${title}: ${this.#limits.watchesMax} watches are open; raise watchesMax`,
      );
    }
    const deadline = new Deadline(signal, options.timeoutSeconds * 1000 + WATCH_SLACK_MS, title);
    const path = pathOf(resource, options.namespace);
    let body: Readable | undefined;
    try {
      await this.#token(title, deadline, this.#limits.callMs);
      const call = { verb: "GET", path, query: watchQueryOf(options), title } as const;
      const response = await this.#send(call, deadline, this.#limits.watchIdleMs);
      body = response.body;
      if (response.statusCode !== 200) throw await this.#failure(response, title);
      for await (const line of linesOf(body, this.#limits.lineBytesMax)) yield watchLineOf(line, resource);
    } catch (error) {
      throw asKubeError(error, title, deadline.signal);
    } finally {
      body?.on("error", () => {}).destroy();
      deadline.end();
      leave();
    }
  }

  #put(
    resource: Resource,
    object: KubeObject,
    how: { signal: AbortSignal; options: WriteOptions; subresource: string | undefined },
  ): Promise<KubeObject> {
    const { name, namespace } = object.metadata;
    return this.#write(resource, how.signal, {
      verb: "PUT",
      path: pathOf(resource, namespace, name, how.subresource),
      query: writeQueryOf(how.options),
      body: object,
      title: `replace ${how.subresource ? `${how.subresource} of ` : ""}${titleOf(resource, name, namespace)}`,
    });
  }

  async #write(resource: Resource, signal: AbortSignal, call: Call): Promise<KubeObject> {
    return objectOf(await this.#call(call, signal), resource);
  }

  /** Answers the parsed body. */
  async #call(call: Call, signal: AbortSignal): Promise<unknown> {
    const deadline = new Deadline(signal, this.#limits.callMs, call.title);
    let leave: (() => void) | undefined;
    try {
      leave = await this.#calls.enter(deadline.signal);
      for (let attempt = 1; ; attempt += 1) {
        await this.#token(call.title, deadline, this.#limits.callMs);
        const outcome = await this.#attempt(call, deadline);
        if (!(outcome instanceof KubeError)) return outcome.value;
        const waitMs = this.#retryMs(call, outcome, attempt);
        if (waitMs === undefined || waitMs >= deadline.leftMs()) throw outcome;
        await systemClock.sleep(deadline.signal, systemClock.nowMs() + waitMs);
        deadline.signal.throwIfAborted();
      }
    } catch (error) {
      throw asKubeError(error, call.title, deadline.signal);
    } finally {
      leave?.();
      deadline.end();
    }
  }

  /** H3: when to try again, undefined for not. */
  #retryMs(call: Call, error: KubeError, attempt: number): number | undefined {
    const isUntouched = error.code === 429 || error.code === 401;
    const mayHelp = isUntouched || error.code === 0 || error.code === 502 || error.code === 503 || error.code === 504;
    if (attempt >= this.#limits.tries || !mayHelp || (!isUntouched && call.verb !== "GET")) return undefined;
    // Once, with credentials read anew.
    if (error.code === 401) return attempt === 1 ? 0 : undefined;
    const own = backoffMs(attempt, RETRY_BACKOFF, this.#options.random ?? Math.random);
    return Math.max(own, error.retryAfterMs ?? 0);
  }

  async #attempt(call: Call, deadline: Deadline): Promise<KubeError | { value: unknown }> {
    const { metrics, connections } = this.#options;
    const begunMs = performance.now();
    let code = 0;
    try {
      const response = await this.#send(call, deadline, this.#limits.callMs);
      code = response.statusCode;
      if (code === 401) connections.distrust();
      if (code >= 300) return await this.#failure(response, call.title);
      const text = await bodyOf(response.body, this.#limits.bodyBytesMax);
      return { value: JSON.parse(text) };
    } catch (error) {
      return asKubeError(error, call.title, deadline.signal);
    } finally {
      metrics?.count("muster_kube_requests_total", { verb: call.verb, code: String(code) });
      metrics?.observe("muster_kube_request_seconds", { verb: call.verb }, (performance.now() - begunMs) / 1000);
    }
  }

  async #send(call: Call, deadline: Deadline, bodyIdleMs: number): Promise<Dispatcher.ResponseData> {
    const { agent, access } = await this.#options.connections.open();
    const query = call.query?.toString();
    const prefix = access.server.pathname.replace(/\/$/, "");
    return agent.request({
      origin: access.server.origin,
      path: `${prefix}${call.path}${query ? `?${query}` : ""}`,
      method: call.verb,
      headers: {
        accept: call.accept ?? "application/json",
        "user-agent": this.#options.userAgent ?? "muster",
        ...(call.body === undefined ? {} : { "content-type": call.contentType ?? "application/json" }),
        ...access.headers,
      },
      body: call.body === undefined ? null : JSON.stringify(call.body),
      signal: deadline.signal,
      headersTimeout: this.#limits.callMs,
      bodyTimeout: bodyIdleMs,
    });
  }

  async #failure(response: Dispatcher.ResponseData, title: string): Promise<KubeError> {
    const text = await bodyOf(response.body, 1 << 20).catch(() => "");
    const header = response.headers["retry-after"];
    return errorOf(response.statusCode, text, title, typeof header === "string" ? header : undefined);
  }

  async #token(title: string, deadline: Deadline, waitMsMax: number): Promise<void> {
    const begunMs = performance.now();
    const isGranted = await waitForToken(this.#bucket, systemClock, deadline.signal, waitMsMax);
    deadline.signal.throwIfAborted();
    if (!isGranted) throw new KubeError(0, "Throttled", `${title}: too many calls of our own wait already`);
    this.#options.metrics?.observe("muster_kube_throttled_seconds", {}, (performance.now() - begunMs) / 1000);
  }
}

/** The caller's signal or a time-out, whichever is first; the time-out is a KubeError. */
class Deadline {
  readonly signal: AbortSignal;
  readonly #endMs: number;
  readonly #release: () => void;

  constructor(signal: AbortSignal, ms: number, title: string) {
    const stop = new AbortController();
    const onAbort = () => stop.abort(signal.reason);
    if (signal.aborted) onAbort();
    signal.addEventListener("abort", onAbort, { once: true });
    const timer = setTimeout(() => stop.abort(new KubeError(0, "Timeout", `${title}: no answer within ${ms} ms`)), ms);
    this.signal = stop.signal;
    this.#endMs = performance.now() + ms;
    this.#release = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", onAbort);
    };
  }

  leftMs(): number {
    return this.#endMs - performance.now();
  }

  end(): void {
    this.#release();
  }
}

async function bodyOf(body: Readable, bytesMax: number): Promise<string> {
  const parts: Buffer[] = [];
  let held = 0;
  for await (const part of body) {
    held += part.length;
    if (held > bytesMax) {
      body.on("error", () => {}).destroy();
      throw new KubeError(0, "TooLarge", `the answer is longer than ${bytesMax} bytes: ask for smaller pages`);
    }
    parts.push(part);
  }
  return Buffer.concat(parts).toString("utf8");
}

function writeQueryOf({ dryRun, fieldManager }: WriteOptions): URLSearchParams {
  const query = new URLSearchParams();
  if (dryRun) query.set("dryRun", "All");
  if (fieldManager) query.set("fieldManager", fieldManager);
  return query;
}

/** No such object, as against no such kind or path. */
function undefinedIfMissing(error: unknown): undefined {
  const isMissing = error instanceof KubeError && error.code === 404 && error.reason === "NotFound";
  if (isMissing && !error.message.includes("could not find the requested resource")) return undefined;
  throw error;
}

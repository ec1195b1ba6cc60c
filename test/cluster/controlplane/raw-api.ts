// The test bed's own way to talk to an API server: one JSON request, one watch. Deliberately not controller/kube, which is what
// the beds test: a fault in it must not hide itself in the kubelet that plays the other side.
import { Agent, fetch } from "undici";
import { z } from "zod";

const REQUEST_TIMEOUT_MS = 10_000;
const WATCH_SECONDS = 300;

const Metadata = z.looseObject({
  name: z.string(),
  namespace: z.string().default(""),
  uid: z.string().default(""),
  resourceVersion: z.string().default(""),
  labels: z.record(z.string(), z.string()).default({}),
  annotations: z.record(z.string(), z.string()).default({}),
});
export const Thing = z.looseObject({ metadata: Metadata });
export type Thing = z.infer<typeof Thing>;
const List = z.looseObject({ metadata: z.looseObject({ resourceVersion: z.string() }), items: z.array(Thing) });
const WatchLine = z.looseObject({ type: z.string(), object: z.unknown() });

export class ApiRefusal extends Error {
  readonly code: number;
  constructor(code: number, message: string) {
    super(message);
    this.code = code;
  }
}

export type Access = { url: string; ca: string; token: string };
export type Ask = {
  method: "GET" | "POST" | "PUT" | "PATCH" | "DELETE";
  path: string;
  body?: unknown;
  /** Media type of a patch. */
  patch?: "merge-patch" | "strategic-merge-patch" | "apply-patch" | "json-patch";
  signal?: AbortSignal;
};

export class RawApi {
  readonly #access: Access;
  readonly #agent: Agent;
  readonly #closing = new AbortController();

  constructor(access: Access) {
    this.#access = access;
    // HTTP/1.1: an HTTP/2 session that is closed while it is being opened throws where nobody can catch it.
    this.#agent = new Agent({ connect: { ca: access.ca }, bodyTimeout: 0, allowH2: false });
  }

  /** The parsed answer; throws ApiRefusal with the server's message where it says no, the cause where it is not reached. */
  async ask(ask: Ask): Promise<unknown> {
    const bound = AbortSignal.timeout(REQUEST_TIMEOUT_MS);
    const answer = await this.#fetch(ask, ask.signal ? AbortSignal.any([ask.signal, bound]) : bound);
    const text = await answer.text();
    if (!answer.ok) throw new ApiRefusal(answer.status, messageOf(text));
    return answer.headers.get("content-type")?.includes("json") ? JSON.parse(text) : text;
  }

  /** As `ask`, but a 404 is undefined. */
  async find(path: string, signal?: AbortSignal): Promise<unknown> {
    try {
      return await this.ask({ method: "GET", path, ...(signal ? { signal } : {}) });
    } catch (error) {
      if (error instanceof ApiRefusal && error.code === 404) return undefined;
      throw error;
    }
  }

  async list(path: string, signal?: AbortSignal): Promise<z.infer<typeof List>> {
    return List.parse(await this.ask({ method: "GET", path, ...(signal ? { signal } : {}) }));
  }

  /** Everything that is and comes: `whole` with the list, then `changed` with each event, until the watch ends or fails. */
  async follow(
    path: string,
    hear: { whole(items: Thing[]): void; changed(type: string, thing: Thing): void },
    signal: AbortSignal,
  ): Promise<void> {
    const list = await this.list(path, signal);
    hear.whole(list.items);
    const query = `watch=1&resourceVersion=${list.metadata.resourceVersion}&timeoutSeconds=${WATCH_SECONDS}`;
    const answer = await this.#fetch(
      { method: "GET", path: `${path}${path.includes("?") ? "&" : "?"}${query}` },
      signal,
    );
    if (!answer.ok || !answer.body) throw new ApiRefusal(answer.status, messageOf(await answer.text()));
    let rest = "";
    const decoder = new TextDecoder();
    for await (const chunk of answer.body) {
      rest += decoder.decode(chunk, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) {
        const event = WatchLine.parse(JSON.parse(line));
        if (event.type === "ERROR") throw new ApiRefusal(410, line);
        hear.changed(event.type, Thing.parse(event.object));
      }
    }
  }

  /** Gives up what is asked and followed, then the connections. (Destroying the agent under requests rejects where nobody hears.) */
  async close(): Promise<void> {
    this.#closing.abort();
    await this.#agent.close();
  }

  async #fetch(ask: Ask, signal: AbortSignal) {
    const type = ask.patch
      ? `application/${ask.patch}+${ask.patch === "apply-patch" ? "yaml" : "json"}`
      : "application/json";
    return await fetch(`${this.#access.url}${ask.path}`, {
      method: ask.method,
      headers: { authorization: `Bearer ${this.#access.token}`, "content-type": type, accept: "application/json" },
      ...(ask.body === undefined ? {} : { body: JSON.stringify(ask.body) }),
      dispatcher: this.#agent,
      signal: AbortSignal.any([signal, this.#closing.signal]),
    });
  }
}

function messageOf(text: string): string {
  try {
    return z.looseObject({ message: z.string() }).parse(JSON.parse(text)).message;
  } catch {
    return text.slice(0, 2_000);
  }
}

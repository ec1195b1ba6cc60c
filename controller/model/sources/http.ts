// One HTTP GET, made safe: redirects, retries and waits are bounded, a token goes only to the origin that it belongs to.
//
//   N1  Authorization is sent only to `credentials.origin`; a redirect elsewhere goes without.
//   N2  http:// is for loopback only, also after a redirect.
//   N3  every wait has an end: connect and headers, each piece of the body, between tries.
import { setTimeout as sleep } from "node:timers/promises";
import { FaultError, invalid, transient } from "../../../proto/fault.ts";
import { reject } from "../reject.ts";

export type Credentials = { origin: string; token: string };
export type HttpOptions = { credentials?: Credentials; signal?: AbortSignal };

export type Answer = {
  status: number;
  headers: Headers;
  /** Headers of the redirects on the way, first to last: Hugging Face names commit and sha256 there. */
  hops: Headers[];
  /** Pieces of the body; ends the connection when the caller stops early. */
  body(): AsyncGenerator<Uint8Array>;
  discard(): Promise<void>;
};

const REDIRECTS_MAX = 5;
export const TRIES_MAX = 5;
const HEADERS_TIMEOUT_MS = 30_000;
/** A body that sends nothing for so long is given up and asked for again. */
const STALL_TIMEOUT_MS = 30_000;
const BACKOFF_FIRST_MS = 200;
const BACKOFF_MAX_MS = 8_000;
const RETRY_AFTER_MAX_MS = 30_000;
const RETRIED: ReadonlySet<number> = new Set([408, 429, 500, 502, 503, 504]);

/** The connection failed in a way that a new try may mend. */
export class Interrupted extends Error {}

export function isLoopback(host: string): boolean {
  return host === "localhost" || host === "[::1]" || /^127\.\d+\.\d+\.\d+$/.test(host);
}

/** N2. */
export function checkUrl(url: URL, field = "source"): URL {
  if (url.username || url.password) reject(field, "a URL must not hold a user name or password");
  if (url.protocol === "https:") return url;
  if (url.protocol !== "http:") reject(field, `${url.protocol}// cannot be downloaded`);
  if (!isLoopback(url.hostname))
    reject(field, `http://${url.host} is not encrypted; only loopback may use http, write https://`);
  return url;
}

/** Waits before try `attempt` (1, 2, ...): exponential with full jitter, or as long as the server asked. */
export async function backOff(
  attempt: number,
  retryAfter: string | null,
  signal: AbortSignal | undefined,
): Promise<void> {
  const ceiling = Math.min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** attempt);
  const asked = Number(retryAfter) * 1000;
  const wait = asked > 0 ? Math.min(asked, RETRY_AFTER_MAX_MS) : Math.random() * ceiling;
  try {
    await sleep(wait, undefined, signal ? { signal } : {});
  } catch (cause) {
    throw cancelled(cause);
  }
}

export const cancelled = (cause?: unknown): FaultError =>
  new FaultError(transient("cancelled", "reading the model was cancelled"), { cause });

/** GET with retries of what may pass. Any other status is the caller's to judge. Throws TRANSIENT after the last try. */
export async function get(url: URL, headers: Record<string, string>, options: HttpOptions): Promise<Answer> {
  for (let attempt = 1; ; attempt++) {
    let why: string;
    let retryAfter: string | null = null;
    try {
      const answer = await follow(url, headers, options);
      if (!RETRIED.has(answer.status)) return answer;
      why = `HTTP ${answer.status}`;
      retryAfter = answer.headers.get("retry-after");
      await answer.discard();
    } catch (cause) {
      if (!(cause instanceof Interrupted)) throw cause;
      why = cause.message;
    }
    if (attempt >= TRIES_MAX)
      throw new FaultError(
        transient("source_unreachable", `${withoutQuery(url)}: ${why}, ${TRIES_MAX} tries`, "source"),
      );
    await backOff(attempt, retryAfter, options.signal);
  }
}

/** For messages: signatures in queries are secrets. */
export const withoutQuery = (url: URL): string => `${url.origin}${url.pathname}`;

async function follow(start: URL, headers: Record<string, string>, options: HttpOptions): Promise<Answer> {
  let url = checkUrl(start);
  const hops: Headers[] = [];
  for (let redirects = 0; redirects <= REDIRECTS_MAX; redirects++) {
    const answer = await once(url, headers, options);
    const location = answer.headers.get("location");
    if (answer.status < 300 || answer.status >= 400 || answer.status === 304 || !location) return { ...answer, hops };
    await answer.discard();
    hops.push(answer.headers);
    if (!URL.canParse(location, url.href))
      reject("source", `${withoutQuery(url)} redirects to something that is no URL`);
    const next = checkUrl(new URL(location, url), "redirect");
    if (url.protocol === "https:" && next.protocol !== "https:")
      reject("redirect", `${withoutQuery(url)} leads to http`);
    url = next;
  }
  throw new FaultError(invalid("source", `${withoutQuery(start)}: more than ${REDIRECTS_MAX} redirects`));
}

async function once(url: URL, headers: Record<string, string>, options: HttpOptions): Promise<Answer> {
  const { credentials, signal } = options;
  if (signal?.aborted) throw cancelled(signal.reason);
  const sent: Record<string, string> = { "accept-encoding": "identity", "user-agent": "muster", ...headers };
  if (credentials && credentials.origin === url.origin) sent.authorization = `Bearer ${credentials.token}`;
  const stop = new AbortController();
  const forward = () => stop.abort();
  signal?.addEventListener("abort", forward, { once: true });
  const release = () => signal?.removeEventListener("abort", forward);
  const timer = setTimeout(() => stop.abort(), HEADERS_TIMEOUT_MS);
  try {
    const response = await fetch(url, { headers: sent, redirect: "manual", signal: stop.signal });
    return {
      status: response.status,
      headers: response.headers,
      hops: [],
      body: () => pieces(response, { stop, release, signal }),
      discard: async () => {
        release();
        await response.body?.cancel().catch(() => {});
      },
    };
  } catch (cause) {
    release();
    if (signal?.aborted) throw cancelled(cause);
    throw new Interrupted(`no answer (${reasonOf(cause)})`, { cause });
  } finally {
    clearTimeout(timer);
  }
}

type Wiring = { stop: AbortController; release: () => void; signal: AbortSignal | undefined };

async function* pieces(response: Response, wiring: Wiring): AsyncGenerator<Uint8Array> {
  const { stop, release, signal } = wiring;
  const reader = response.body?.getReader();
  try {
    while (reader) {
      const timer = setTimeout(() => stop.abort(), STALL_TIMEOUT_MS);
      try {
        const { done, value } = await reader.read();
        if (done) return;
        yield value;
      } catch (cause) {
        if (signal?.aborted) throw cancelled(cause);
        throw new Interrupted(`the connection broke (${reasonOf(cause)})`, { cause });
      } finally {
        clearTimeout(timer);
      }
    }
  } finally {
    release();
    await reader?.cancel().catch(() => {});
  }
}

function reasonOf(cause: unknown): string {
  if (!(cause instanceof Error)) return "unknown";
  const inner = cause.cause;
  if (inner instanceof Error && "code" in inner) return String(inner.code);
  return inner instanceof Error ? inner.message : cause.message;
}

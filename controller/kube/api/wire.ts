// The Kubernetes REST conventions as data: paths, queries, and parsers of what comes back. No I/O.
//
//   W1  items of a typed list carry neither apiVersion nor kind: they are filled in from the resource asked for.
//   W2  an error body may be a Status, any other JSON, plain text or nothing; each becomes a KubeError that names the call.
import type { KubeList, KubeObject, ListOptions, Resource, WatchLine, WatchOptions } from "./client.ts";
import { apiVersionOf, KubeError } from "./client.ts";

export function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Longest piece of a foreign error text that goes into a message. */
const DETAIL_MAX = 500;

export function pathOf(resource: Resource, namespace: string | undefined, name?: string, subresource?: string): string {
  const root = resource.group ? `/apis/${resource.group}/${resource.version}` : `/api/${resource.version}`;
  const place = resource.namespaced && namespace ? `/namespaces/${encodeURIComponent(namespace)}` : "";
  const object = name === undefined ? "" : `/${encodeURIComponent(name)}`;
  return `${root}${place}/${resource.plural}${object}${subresource ? `/${subresource}` : ""}`;
}

/** Where the server tells which kinds of a group and version it has. */
export function groupPathOf(resource: Resource): string {
  return resource.group ? `/apis/${resource.group}/${resource.version}` : `/api/${resource.version}`;
}

export function listQueryOf(options: ListOptions): URLSearchParams {
  const query = new URLSearchParams();
  for (const key of ["labelSelector", "fieldSelector", "continue", "resourceVersion"] as const) {
    const value = options[key];
    if (value) query.set(key, value);
  }
  if (options.limit !== undefined) query.set("limit", String(options.limit));
  return query;
}

export function watchQueryOf(options: WatchOptions): URLSearchParams {
  const query = listQueryOf(options);
  query.set("watch", "true");
  query.set("allowWatchBookmarks", "true");
  query.set("timeoutSeconds", String(options.timeoutSeconds));
  return query;
}

function isKubeObject(value: unknown): value is KubeObject {
  return (
    isRecord(value) &&
    typeof value.apiVersion === "string" &&
    typeof value.kind === "string" &&
    isRecord(value.metadata) &&
    typeof value.metadata.name === "string"
  );
}

export function objectOf(value: unknown, resource: Resource): KubeObject {
  if (isKubeObject(value)) return value;
  const whole = isRecord(value) ? { apiVersion: apiVersionOf(resource), kind: resource.kind, ...value } : value;
  if (isKubeObject(whole)) return whole;
  throw new KubeError(
    0,
    "BadReply",
    `the API server sent no object of kind ${resource.kind}: metadata.name is missing`,
  );
}

export function listOf(value: unknown, resource: Resource): KubeList {
  const meta = isRecord(value) ? value.metadata : undefined;
  if (!isRecord(value) || !isRecord(meta) || typeof meta.resourceVersion !== "string") {
    throw new KubeError(
      0,
      "BadReply",
      `the API server sent no list of ${resource.plural}: metadata.resourceVersion is missing`,
    );
  }
  // An empty list of a Go server is null.
  const items = Array.isArray(value.items) ? value.items : [];
  return {
    items: items.map((item) => objectOf(item, resource)),
    resourceVersion: meta.resourceVersion,
    continue: typeof meta.continue === "string" ? meta.continue : "",
  };
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Throws a KubeError where the line is not what a watch may send. */
export function watchLineOf(line: string, resource: Resource): WatchLine {
  const value = parseJson(line);
  const type = isRecord(value) ? value.type : undefined;
  const object = isRecord(value) ? value.object : undefined;
  switch (type) {
    case "ADDED":
    case "MODIFIED":
    case "DELETED":
      return { type, object: objectOf(object, resource) };
    case "BOOKMARK": {
      const meta = isRecord(object) ? object.metadata : undefined;
      if (isRecord(meta) && typeof meta.resourceVersion === "string") {
        return { type, resourceVersion: meta.resourceVersion };
      }
      break;
    }
    case "ERROR":
      return { type, error: statusErrorOf(object, 500, `watch of ${resource.plural}`) };
  }
  const start = line.slice(0, 80);
  throw new KubeError(0, "BadReply", `the watch of ${resource.plural} sent a line that is no event: ${start}`);
}

/** `call` says what was tried, for the message. */
export function errorOf(code: number, body: string, call: string, retryAfter?: string): KubeError {
  const value = parseJson(body);
  // A body that is a JSON string holding JSON comes from proxies that encode twice.
  const status = typeof value === "string" ? (parseJson(value) ?? value) : (value ?? body);
  return statusErrorOf(status, code, call, retryAfter);
}

function statusErrorOf(status: unknown, httpCode: number, call: string, retryAfter?: string): KubeError {
  const isStatus = isRecord(status) && (status.kind === "Status" || typeof status.message === "string");
  const code = isStatus && typeof status.code === "number" && httpCode >= 400 ? status.code : httpCode;
  const reason = isStatus && typeof status.reason === "string" && status.reason ? status.reason : `HTTP${code}`;
  const detail = isStatus && typeof status.message === "string" ? status.message : textOf(status);
  const details = isStatus && isRecord(status.details) ? status.details : undefined;
  const wishSeconds = typeof details?.retryAfterSeconds === "number" ? details.retryAfterSeconds : undefined;
  const retryAfterMs = retryAfterMsOf(retryAfter) ?? (wishSeconds === undefined ? undefined : wishSeconds * 1000);
  const message = `${call}: ${code} ${reason}${detail ? `: ${detail.slice(0, DETAIL_MAX)}` : ""}`;
  return new KubeError(code, reason, message, retryAfterMs === undefined ? {} : { retryAfterMs });
}

const textOf = (value: unknown): string =>
  (typeof value === "string" ? value : (JSON.stringify(value) ?? "")).replace(/\s+/g, " ").trim();

/** The header is seconds or a date; undefined where it is neither. */
function retryAfterMsOf(header: string | undefined, nowMs: number = Date.now()): number | undefined {
  if (header === undefined || header.trim() === "") return undefined;
  const seconds = Number(header);
  if (Number.isFinite(seconds)) return Math.max(0, seconds * 1000);
  const date = Date.parse(header);
  return Number.isNaN(date) ? undefined : Math.max(0, date - nowMs);
}

/** A MicroTime as the server wants it: exactly six decimals. */
export function microTimeOf(nowMs: number): string {
  return new Date(nowMs).toISOString().replace(/\.(\d{3})Z$/, ".$1000Z");
}

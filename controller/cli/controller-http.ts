// What kubelet and Prometheus ask of a controller: GET /healthz, /readyz, /metrics. Owns the socket and its bounds. Ready says
// that the process is up and what others need of it before anything else is there; it waits for no lease, NATS or gateway.
import { createServer, type Server } from "node:http";
import type { KubeMetrics } from "../kube/metrics/metrics.ts";
import { METRICS_TYPE, metricsText } from "../kube/metrics/metrics-text.ts";

/** Probes and scrapers come one by one. */
const CONNECTIONS_MAX = 64;
const REQUEST_MS = 5_000;
const HEADERS_BYTES_MAX = 8 * 1024;

export type ControllerHttpOptions = {
  /** host:port. */
  listen: string;
  metrics: KubeMetrics;
  /** Why it is not ready; undefined: it is. */
  whyNotReady: () => string | undefined;
};

export type ControllerHttp = { port: number; close(): Promise<void> };

/** Rejects where it cannot listen. */
export async function serveControllerHttp(options: ControllerHttpOptions): Promise<ControllerHttp> {
  const { hostname, port } = new URL(`http://${options.listen}`);
  const server = createServer({ requestTimeout: REQUEST_MS, maxHeaderSize: HEADERS_BYTES_MAX });
  server.maxConnections = CONNECTIONS_MAX;
  server.on("request", (request, response) => {
    request.resume(); // a body is nothing to us; requestTimeout bounds it
    const { code, type, text } = answerOf(request.method, request.url, options);
    response.writeHead(code, { "content-type": type, "cache-control": "no-store" }).end(text);
  });
  await new Promise<void>((resolve, reject) => {
    const fail = (error: Error) => reject(new Error(`--http: cannot listen on ${options.listen}: ${error.message}`));
    server.once("error", fail);
    server.listen(Number(port || "80"), hostname.replaceAll(/[[\]]/g, ""), () => {
      server.off("error", fail);
      resolve();
    });
  });
  return { port: portOf(server), close: () => closed(server) };
}

type Answer = { code: number; type: string; text: string };

function answerOf(method = "", url = "", { metrics, whyNotReady }: ControllerHttpOptions): Answer {
  const plain = (code: number, text: string): Answer => ({
    code,
    type: "text/plain; charset=utf-8",
    text: `${text}\n`,
  });
  if (method !== "GET" && method !== "HEAD") return plain(405, "only GET is answered");
  switch (url.split("?")[0]) {
    case "/healthz":
      return plain(200, "ok");
    case "/readyz": {
      const why = whyNotReady();
      return why === undefined ? plain(200, "ok") : plain(503, why);
    }
    case "/metrics":
      return { code: 200, type: METRICS_TYPE, text: metricsText(metrics) };
    default:
      return plain(404, "there are /healthz, /readyz and /metrics");
  }
}

function portOf(server: Server): number {
  const address = server.address();
  return typeof address === "object" && address !== null ? address.port : 0;
}

function closed(server: Server): Promise<void> {
  server.closeAllConnections();
  return new Promise((resolve) => server.close(() => resolve()));
}

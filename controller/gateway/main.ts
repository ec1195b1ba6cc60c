// Wires the gateway: controller's view, streams, both front doors, and their end. Owns start and stop order:
// up: view, HTTP, gRPC, then ready; down: refuse and unready first, streams finish up to a bound, then sockets close.
import { FaultError, invalid, transient } from "../../proto/fault.ts";
import { noTrust, type Trust } from "../../proto/trust.ts";
import { DemandClient, type DemandLimits } from "./demand.ts";
import type { Feed } from "./feed.ts";
import { HttpFront } from "./http.ts";
import { GrpcFront } from "./inference.ts";
import { isLoopback } from "./key.ts";
import { defaultLimits, type GatewayLimits } from "./limits.ts";
import { GatewayMetrics } from "./metrics.ts";
import { Streams } from "./streams.ts";
import { ModelsView } from "./watch.ts";

/** After all answers have ended or were cut: for their last bytes to leave. */
const CLOSE_TIMEOUT_MS = 2_000;
const IDLE_SWEEP_MS = 10;

export type GatewayOptions = {
  /** Who tells of models and leaders. */
  feed: Feed;
  /** Ready once a state has been told; else once a model serves too. */
  readyWithoutModels?: boolean;
  /** Whom to tell what is asked for, and as whom; nobody where it is left out. */
  demand?: { target: string; gateway: string; limits?: Partial<DemandLimits> } | undefined;
  /** For links to leaders and controllers; clients' doors are not affected. */
  trust?: Trust;
  /** HOST:PORT to listen on; port 0 takes a free one. */
  http: string;
  grpc: string;
  apiKey?: string | undefined;
  limits?: Partial<GatewayLimits>;
  /** Called once with the bound addresses, both sockets listening. */
  onListening?: (addresses: GatewayAddresses) => void;
};

/** HTTP as a URL, gRPC as HOST:PORT. */
export type GatewayAddresses = { http: string; grpc: string };

export type Listen = { host: string; port: number };

/** HOST:PORT or [IPV6]:PORT; a FaultError names the option. */
export function parseListen(option: string, value: string): Listen {
  const match = /^(?:\[([0-9a-fA-F:]+)\]|([^:]+)):(\d{1,5})$/.exec(value);
  const host = match?.[1] ?? match?.[2];
  const port = Number(match?.[3]);
  if (host === undefined || port > 65_535) {
    throw new FaultError(invalid(option, `${JSON.stringify(value)} is not HOST:PORT, for example 127.0.0.1:8080`));
  }
  return { host, port };
}

function checkExposure(option: string, { host }: Listen, apiKey: string | undefined): void {
  if (apiKey !== undefined || isLoopback(host)) return;
  throw new FaultError(
    invalid(option, `listening on ${host} lets others in: give --api-key or MUSTER_API_KEY, or bind to 127.0.0.1`),
  );
}

/** A port that cannot be had, said so that a person knows what to do. */
async function listening<T>(option: string, { host, port }: Listen, bind: () => Promise<T>): Promise<T> {
  try {
    return await bind();
  } catch (cause) {
    const text = cause instanceof Error ? cause.message : String(cause);
    const taken = text.includes("EADDRINUSE");
    const why = taken
      ? `port ${port} on ${host} is taken by another program`
      : `cannot listen on ${host}:${port}: ${text}`;
    const remedy = `stop that program, or give ${option} ${host}:PORT with another port (0 picks a free one)`;
    throw new FaultError(
      transient("port_unavailable", `${why}; ${taken ? remedy : `give another ${option} HOST:PORT`}`),
      {
        cause,
      },
    );
  }
}

const joinHost = (host: string, port: number): string => (host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`);

/** Serves until the signal aborts, then drains; throws a FaultError where it cannot start. */
export async function runGateway(options: GatewayOptions, signal: AbortSignal): Promise<void> {
  const apiKey = options.apiKey === "" ? undefined : options.apiKey;
  const http = parseListen("--http", options.http);
  const grpc = parseListen("--grpc", options.grpc);
  checkExposure("--http", http, apiKey);
  checkExposure("--grpc", grpc, apiKey);
  const limits = { ...defaultLimits, ...options.limits };

  const trust = options.trust ?? noTrust;

  const metrics = new GatewayMetrics();
  const view = new ModelsView(options.feed);
  const streams = new Streams({ view, metrics, limits, trust });
  const notReady = () => whyNotReady(streams, options.readyWithoutModels ?? false);
  const httpFront = new HttpFront({ streams, metrics, apiKey, notReady });
  const grpcFront = new GrpcFront({ streams, apiKey });
  view.onChange(() => grpcFront.setReady(notReady() === undefined));
  const ended = new AbortController();
  const fed = view.run(ended.signal);
  fed.catch(() => {}); // it is awaited below; it may break before that
  const demand = options.demand && new DemandClient({ ...options.demand, trust, read: () => streams.demand() });
  if (demand) metrics.observeDemand(() => demand.isUp);
  try {
    const bound = await listening("--http", http, () => httpFront.listen(http.host, http.port));
    const grpcPort = await listening("--grpc", grpc, () => grpcFront.listen(grpc.host, grpc.port));
    options.onListening?.({ http: `http://${joinHost(http.host, bound.port)}`, grpc: joinHost(grpc.host, grpcPort) });
    // A feed that breaks is a fault of this program: it ends.
    await Promise.race([aborted(signal), fed]);
    const drained = streams.drain(limits.drainMs);
    grpcFront.setReady(false);
    const closing = [httpFront.close(), grpcFront.close()];
    await drained;
    // Connections of answers that were running are kept alive by their clients; each is closed once its bytes have left.
    const sweep = setInterval(() => httpFront.app.server.closeIdleConnections(), IDLE_SWEEP_MS);
    await Promise.race([Promise.all(closing), new Promise((resolve) => setTimeout(resolve, CLOSE_TIMEOUT_MS).unref())]);
    clearInterval(sweep);
  } finally {
    httpFront.app.server.closeAllConnections();
    grpcFront.forceClose();
    await httpFront.close();
    ended.abort();
    demand?.close();
    streams.close();
    await metrics.close();
    await fed;
  }
}

function whyNotReady({ isDraining, view }: Streams, withoutModels: boolean): string | undefined {
  if (isDraining) return "draining";
  if (!view.told) return `no word from ${view.feed.source} yet: ${view.feed.trouble ?? "it is asked"}`;
  const serves = withoutModels || view.models().some(({ downSince }) => downSince === undefined);
  return serves ? undefined : "no model is serving";
}

function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

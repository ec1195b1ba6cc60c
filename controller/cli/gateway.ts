// `muster gateway`: the front door alone, pointed at a controller or at a cluster. Prints one JSON line with the bound addresses.
import { randomBytes } from "node:crypto";
import { writeSync } from "node:fs";
import os from "node:os";
import { logVerbosity, setLogVerbosity } from "@grpc/grpc-js";
import { Command, InvalidArgumentError } from "commander";
import { FaultError, invalid } from "../../proto/fault.ts";
import { Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { ControlFeed, type Feed } from "../gateway/feed.ts";
import { defaultLimits, type GatewayLimits } from "../gateway/limits.ts";
import { runGateway } from "../gateway/main.ts";
import { trustOf } from "./identity.ts";

type Flags = {
  control?: string;
  kubernetes?: boolean;
  kubeconfig?: string;
  context?: string;
  namespace?: string;
  reports?: string;
  identity?: string;
  enrol?: string;
  http: string;
  grpc: string;
  apiKey?: string;
  holdSeconds: number;
  wakeSeconds: number;
  drainSeconds: number;
  openMax: number;
  readyFd: number;
  lifeline?: boolean;
};

const STDOUT_FD = 1;

function positive(text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || value <= 0) throw new InvalidArgumentError("a number above 0 is needed.");
  return value;
}

function descriptor(text: string): number {
  const fd = Number(text);
  if (!Number.isInteger(fd) || fd < 1) throw new InvalidArgumentError("a file descriptor number is needed.");
  return fd;
}

/** The `gateway` sub-command. */
export function gatewayCommand(): Command {
  const { holdMs, wakeMs, drainMs, openRequestsMax } = defaultLimits;
  return new Command("gateway")
    .description("The front door alone: OpenAI HTTP and gRPC for the models of one controller, or of a cluster.")
    .option("--control <host:port>", "gRPC address of a controller of this machine")
    .option("--kubernetes", "serve the ModelDeployments of a cluster; of several namespaces, ask for NAMESPACE/NAME")
    .option("--kubeconfig <file>", "default: KUBECONFIG, ~/.kube/config, or the service account of this pod")
    .option("--context <name>", "context of the kubeconfig; default: its current one")
    .option("--namespace <name>", "serve this namespace alone; default: all")
    .option("--reports <host:port>", "whom to tell what is asked for: the controller that leads")
    .option("--identity <folder>", "with token and ca.crt: links are mutual TLS; needs --enrol")
    .option("--enrol <host:port>", "where the certificate comes from; needs --identity")
    .option("--http <host:port>", "where to take HTTP; port 0 picks a free one", "127.0.0.1:8080")
    .option("--grpc <host:port>", "where to take gRPC; port 0 picks a free one", "127.0.0.1:8081")
    .option("--api-key <key>", "ask clients for this key; needed beyond loopback (or MUSTER_API_KEY)")
    .option("--hold-seconds <n>", "hold streams so long while a model has no leader", positive, holdMs / 1000)
    .option("--wake-seconds <n>", "hold requests so long for a model that comes up from zero", positive, wakeMs / 1000)
    .option("--drain-seconds <n>", "let streams run on so long after SIGTERM", positive, drainMs / 1000)
    .option("--open-max <n>", "requests answered at once", positive, openRequestsMax)
    .option("--lifeline", "end as soon as standard input ends")
    .option("--ready-fd <fd>", "write the JSON line with the addresses to this descriptor", descriptor, STDOUT_FD)
    .action((flags: Flags) => serve(flags));
}

type Source = { feed: Feed; readyWithoutModels: boolean; close: () => Promise<void> };

const refuse = (option: string, detail: string): FaultError => new FaultError(invalid(option, detail));

async function sourceOf(flags: Flags): Promise<Source> {
  const { control, kubernetes, kubeconfig, context, namespace } = flags;
  if (control !== undefined && kubernetes) throw refuse("--control", "give it or --kubernetes, not both");
  if (control !== undefined) {
    return { feed: new ControlFeed(control), readyWithoutModels: false, close: async () => {} };
  }
  if (!kubernetes) throw refuse("--control", "give the address of a controller, or --kubernetes");
  // Only here: a local gateway does without the libraries of a cluster.
  const [{ Connections }, { kubeconfigCredentials }, { HttpKubeApi }, { systemClock }, { ServedModels }] =
    await Promise.all([
      import("../kube/api/connections.ts"),
      import("../kube/api/credentials.ts"),
      import("../kube/api/http-api.ts"),
      import("../kube/api/clock.ts"),
      import("../kube/served/served-models.ts"),
    ]);
  const path = kubeconfig === undefined ? {} : { path: kubeconfig };
  const connections = new Connections(
    kubeconfigCredentials({ ...path, ...(context === undefined ? {} : { context }) }),
  );
  const api = new HttpKubeApi({ connections });
  const own = namespace === undefined ? {} : { namespace };
  const feed = new ServedModels({ api, clock: systemClock, random: Math.random, ...own });
  // A cluster may serve nothing, or only what sleeps: that is no reason to send nobody here.
  return { feed, readyWithoutModels: true, close: () => connections.close() };
}

function limitsOf(flags: Flags): Partial<GatewayLimits> {
  return {
    holdMs: flags.holdSeconds * 1000,
    wakeMs: flags.wakeSeconds * 1000,
    drainMs: flags.drainSeconds * 1000,
    openRequestsMax: Math.floor(flags.openMax),
  };
}

async function serve(flags: Flags): Promise<void> {
  // Its faults come back as values; its own lines on stderr would only say them twice.
  setLogVerbosity(logVerbosity.NONE);
  const stop = new AbortController();
  const renewals = new AbortController();
  const onSignal = () => stop.abort();
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  if (flags.lifeline) process.stdin.on("end", onSignal).on("error", onSignal).resume();
  let source: Source | undefined;
  try {
    const { http, grpc, readyFd, reports } = flags;
    source = await sourceOf(flags);
    const { feed, readyWithoutModels } = source;
    const onTrouble = (detail: string) => process.stderr.write(`muster gateway: ${detail}\n`);
    const trust = await trustOf(flags, { signal: AbortSignal.any([stop.signal, renewals.signal]), onTrouble });
    const gateway = process.env.MUSTER_POD_NAME || `${os.hostname()}-${randomBytes(4).toString("hex")}`;
    await runGateway(
      {
        feed,
        readyWithoutModels,
        trust,
        ...(reports === undefined ? {} : { demand: { target: reports, gateway } }),
        http,
        grpc,
        apiKey: flags.apiKey ?? process.env.MUSTER_API_KEY,
        limits: limitsOf(flags),
        onListening: (addresses) => writeSync(readyFd, `${JSON.stringify(addresses)}\n`),
      },
      stop.signal,
    );
  } catch (error) {
    if (error === stop.signal.reason) return; // asked to end before it had a certificate
    if (!(error instanceof FaultError)) throw error;
    process.stderr.write(`muster gateway: ${error.message}\n`);
    process.exitCode = error.fault.kind === Fault_Kind.INVALID ? 2 : 1;
  } finally {
    renewals.abort();
    await source?.close();
    process.off("SIGTERM", onSignal).off("SIGINT", onSignal);
  }
}

// `muster controller`: looks after ModelDeployments and DraftPools of a cluster. Any number may run; one leads.
//
// Exit codes: 0 it was asked to end; 1 it failed; 2 the call is wrong, or the cluster lacks what the chart installs.
import { randomBytes } from "node:crypto";
import os from "node:os";
import { setFlagsFromString } from "node:v8";
import { Command } from "commander";
import pino from "pino";
import { FaultError, invalid } from "../../proto/fault.ts";
import type { Trust } from "../../proto/trust.ts";
import type { Broker } from "../api/mapping.ts";
import { KubeError } from "../kube/client.ts";
import { type Clock, systemClock } from "../kube/clock.ts";
import { Connections } from "../kube/connections.ts";
import { kubeconfigCredentials } from "../kube/credentials.ts";
import { HttpKubeApi } from "../kube/http-api.ts";
import { InspectionsDoor } from "../kube/inspections.ts";
import { leaseTimesOf } from "../kube/lease.ts";
import { LoadSamples } from "../kube/load-samples.ts";
import { KubeMetrics } from "../kube/metrics.ts";
import { measuredPart } from "../kube/plan-measured.ts";
import { threadPlanner } from "../kube/plan-threads.ts";
import type { WorkerTemplate } from "../kube/pods.ts";
import { listenReports, Reports } from "../kube/reports.ts";
import { ReportsBoard } from "../kube/reports-board.ts";
import { missingKinds, type Part, runController } from "../kube/run-controller.ts";
import { readTemplate } from "../kube/worker-template.ts";
import type { Because } from "../reconcile/world.ts";
import { serveControllerHttp } from "./controller-http.ts";
import { openTrusted } from "./controller-trust.ts";

/** What parts need to know of how the program was called. */
export type Installation = {
  clock: Clock;
  random: () => number;
  template: WorkerTemplate;
  trust: Trust;
  broker: Broker | undefined;
  /** What leaders of groups report, and where to; undefined: this controller hears nobody. */
  reports: { board: ReportsBoard; address: string } | undefined;
  experts: { lookMs: number };
  metrics: KubeMetrics;
  onBecause: (key: string, because: readonly Because[]) => void;
  onFailure: (key: string, detail: string) => void;
};

type Flags = {
  kubeconfig?: string;
  context?: string;
  namespace?: string;
  leaseNamespace?: string;
  leaseName: string;
  workerImage: string;
  workerTemplate?: string;
  natsUrl?: string;
  listen?: string;
  enrol?: string;
  advertise?: string;
  tls?: boolean;
  http?: string;
  expertLookSeconds: number;
  leaseSeconds: number;
};

const SECONDS_MAX = 86_400;
/** Above what lives; by itself V8 lets it become several times as much where the machine has memory, and pods have limits. */
const HEAP_GROWTH_PERCENT = 40;
const LEASE_SECONDS_MIN = 3;
const EXIT = { failed: 1, invalid: 2 };

/** `partsOf`: what runs beside it while it leads; given by whoever wires the program. */
export function controllerCommand(partsOf: (installation: Installation) => readonly Part[] = () => []): Command {
  return new Command("controller")
    .description("Looks after the ModelDeployments of a Kubernetes cluster: plans, replicas, rollout, status.")
    .option("--kubeconfig <file>", "default: KUBECONFIG, ~/.kube/config, or the service account of this pod")
    .option("--context <name>", "context of the kubeconfig; default: its current one")
    .option("--namespace <name>", "look after this namespace alone; default: all")
    .option("--lease-namespace <name>", "where the Lease lies by which one leads; default: that of the context")
    .option("--lease-name <name>", "name of that Lease", "muster-controller")
    .option("--lease-seconds <n>", "after a leader that has died the next one waits so long", leaseSeconds, 15)
    .requiredOption("--worker-image <image>", "image of the workers of new plans, by digest; stored plans keep theirs")
    .option("--worker-template <file>", "YAML: port, resources, service account, command... of every worker pod")
    .option(
      "--nats-url <url>",
      "where drafts and leaders meet; its token is in MUSTER_NATS_TOKEN, or with --tls in Secret muster-nats",
    )
    .option(
      "--listen <host:port>",
      "where leaders of groups and gateways report, such as 0.0.0.0:7441; default: nowhere",
    )
    .option("--advertise <host>", "name or address by which they find the controller that leads; needed with --listen")
    .option("--enrol <host:port>", "where pods get their certificates, such as 0.0.0.0:7442; needed with --tls")
    .option(
      "--tls",
      "every link with a certificate at both ends, of an authority kept in Secret muster-ca; default: in clear",
    )
    .option("--http <host:port>", "where /healthz, /readyz and /metrics are answered; default: nowhere")
    .option(
      "--expert-look-seconds <n>",
      "how often the load of experts is looked at where they move by it",
      seconds,
      60,
    )
    .action(async (flags: Flags) => {
      process.exitCode = await serve(flags, partsOf);
    });
}

async function serve(flags: Flags, partsOf: (installation: Installation) => readonly Part[]): Promise<number> {
  setFlagsFromString(`--heap-growing-percent=${HEAP_GROWTH_PERCENT}`);
  const template = readTemplate(flags.workerTemplate, flags.workerImage);
  const log = pino({ name: "controller" }, pino.destination({ fd: 2, sync: true }));
  const { kubeconfig, context, namespace, leaseName, workerImage } = flags;
  const credentials = kubeconfigCredentials({
    ...(kubeconfig === undefined ? {} : { path: kubeconfig }),
    ...(context === undefined ? {} : { context }),
  });
  const connections = new Connections(credentials);
  const metrics = new KubeMetrics();
  const api = new HttpKubeApi({ connections, metrics });
  const onBecause = (key: string, because: readonly Because[]) => log.info({ key, because }, "acts");
  const board = new ReportsBoard(systemClock.nowMs);
  const loads = new LoadSamples({ clock: systemClock, board });
  const inspections = new InspectionsDoor();
  const reports = new Reports({ board, loads, inspections, metrics });
  const address = reportsAddress(flags);
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  const open: { close(): void | Promise<void> }[] = [];
  let isTrusted = flags.tls !== true;
  const whyNotReady = () => (isTrusted ? undefined : "the certificate authority of the installation is not there yet");
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  try {
    if (flags.http !== undefined) open.push(await serveControllerHttp({ listen: flags.http, metrics, whyNotReady }));
    const missing = await missingKinds(api, stop.signal);
    if (missing.length > 0) {
      process.stderr.write(
        `muster controller: the cluster does not serve ${missing.join(", ")}: install the chart first\n`,
      );
      return EXIT.invalid;
    }
    const leaseNamespace = flags.leaseNamespace ?? (await credentials.namespace());
    const { trust, broker, ...trusted } = await openTrusted(
      {
        flags,
        api,
        readDocument: (path, signal) => api.document(path, "application/jwk-set+json, application/json", signal),
        template,
        namespace: leaseNamespace,
        onNews: (detail) => log.info({ detail }, "trust"),
        onTrouble: (detail) => log.warn({ detail }, "trust"),
      },
      stop.signal,
    );
    isTrusted = true;
    if (flags.listen !== undefined) open.push(await listenReports(reports, { listen: flags.listen, trust }));
    const parts = partsOf({
      clock: systemClock,
      random: Math.random,
      template: trusted.template,
      trust,
      broker,
      reports: address === undefined ? undefined : { board, address },
      experts: { lookMs: flags.expertLookSeconds * 1000 },
      metrics,
      onBecause,
      onFailure: (key, detail) => log.warn({ key, detail }, "a group cannot be looked after"),
    });
    const measured = measuredPart({ board, clock: systemClock, random: Math.random });
    const heard = address === undefined ? [] : [reports.part, measured];
    const identity = `${os.hostname()}-${randomBytes(4).toString("hex")}`;
    await runController(
      {
        api,
        clock: systemClock,
        random: Math.random,
        planner: threadPlanner,
        workerImage,
        identity,
        lease: { namespace: leaseNamespace, name: leaseName, times: leaseTimesOf(flags.leaseSeconds * 1000) },
        parts: [...trusted.parts, ...parts, ...heard],
        inspect:
          address === undefined
            ? undefined
            : { door: inspections, template: trusted.template, target: { to: address } },
        loadOf: (kind, key) => (kind === "ModelDeployment" ? loads.of(key) : []),
        onWaiting: (wake) => loads.subscribe(wake),
        metrics,
        ...(namespace === undefined ? {} : { namespace }),
        onLead: (isLeading) => log.info({ identity, isLeading }, isLeading ? "leads" : "leads no more"),
        onBecause,
        onFailure: (key, error, againMs) => log.warn({ key, error: textOf(error), againMs }, "a turn has failed"),
      },
      stop.signal,
    );
    return 0;
  } catch (error) {
    if (stop.signal.aborted) return 0;
    if (!(error instanceof KubeError)) throw error;
    process.stderr.write(`muster controller: ${error.message}\n`);
    return EXIT.failed;
  } finally {
    process.off("SIGTERM", onSignal).off("SIGINT", onSignal);
    for (const each of open.reverse()) await each.close();
    await connections.close();
  }
}

function seconds(text: string): number {
  const value = Number(text);
  if (Number.isFinite(value) && value >= 1 && value <= SECONDS_MAX) return value;
  throw new FaultError(invalid("--expert-look-seconds", `"${text}": write seconds, 1 to ${SECONDS_MAX}`));
}

/** Below the least a pause of the machine is the end of a term. */
function leaseSeconds(text: string): number {
  const value = Number(text);
  if (Number.isInteger(value) && value >= LEASE_SECONDS_MIN && value <= SECONDS_MAX) return value;
  const detail = `"${text}": write whole seconds, ${LEASE_SECONDS_MIN} to ${SECONDS_MAX}`;
  throw new FaultError(invalid("--lease-seconds", detail));
}

/** The port is that of --listen where --advertise names none. */
function reportsAddress({ listen, advertise }: Pick<Flags, "listen" | "advertise">): string | undefined {
  if (listen === undefined) return undefined;
  if (advertise === undefined)
    throw new FaultError(invalid("--advertise", "with --listen: say by which name this controller is found"));
  return /:\d+$/.test(advertise) ? advertise : `${advertise}:${listen.slice(listen.lastIndexOf(":") + 1)}`;
}

const textOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

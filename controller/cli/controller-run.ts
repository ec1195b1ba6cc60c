// What `muster controller` is made of, once its flags are read: who hears reports, whom it trusts, what runs while it leads.
import { randomBytes } from "node:crypto";
import os from "node:os";
import type { Logger } from "pino";
import { FaultError, invalid } from "../../proto/fault.ts";
import type { Trust } from "../../proto/trust.ts";
import type { Broker } from "../api/mapping.ts";
import type { KubeApi } from "../kube/api/client.ts";
import { type Clock, systemClock } from "../kube/api/clock.ts";
import type { HttpKubeApi } from "../kube/api/http-api.ts";
import { type GangLimits, gangLimits } from "../kube/gangs/reservations.ts";
import type { WorkerTemplate } from "../kube/groups/pods.ts";
import { leaseTimesOf } from "../kube/lease/lease.ts";
import type { KubeMetrics } from "../kube/metrics/metrics.ts";
import { LoadSamples } from "../kube/owners/load-samples.ts";
import { measuredPart } from "../kube/owners/plan-measured.ts";
import { threadPlanner } from "../kube/owners/plan-threads.ts";
import { type ControllerOptions, missingKinds, type Part, runController } from "../kube/run-controller.ts";
import { InspectionsDoor } from "../kube/sources/inspections.ts";
import { listenReports, Reports } from "../kube/workers/reports.ts";
import { ReportsBoard } from "../kube/workers/reports-board.ts";
import type { Because } from "../reconcile/world.ts";
import { serveControllerHttp } from "./controller-http.ts";
import { openTrusted, type Trusted } from "./controller-trust.ts";

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
  gangLimits: GangLimits;
  metrics: KubeMetrics;
  onBecause: (key: string, because: readonly Because[]) => void;
  onFailure: (key: string, detail: string) => void;
};

export type Flags = {
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
  /** Seconds. */
  gangTimeout: number;
  leaseSeconds: number;
};

export type PartsOf = (installation: Installation) => readonly Part[];

/** What is there before anything is asked of the cluster. */
export type Base = {
  flags: Flags;
  template: WorkerTemplate;
  api: HttpKubeApi;
  /** For the Lease alone: thousands of groups that start fill the line of `api`. */
  leaseApi: KubeApi;
  metrics: KubeMetrics;
  log: Logger;
  /** Of the kubeconfig's context, or of this pod. */
  namespaceOf: () => Promise<string>;
  /** Closed by whoever has begun, in reverse order. */
  opened: { close(): void | Promise<void> }[];
};

/** Rejects where a part breaks; resolves with undefined when asked to end, or with what the cluster does not serve. */
export async function runInstallation(base: Base, partsOf: PartsOf, signal: AbortSignal): Promise<string | undefined> {
  const { flags, api, metrics, opened } = base;
  const hearing = hearingOf(base);
  let isTrusted = flags.tls !== true;
  const whyNotReady = () => (isTrusted ? undefined : "the certificate authority of the installation is not there yet");
  if (flags.http !== undefined) opened.push(await serveControllerHttp({ listen: flags.http, metrics, whyNotReady }));
  const missing = await missingKinds(api, signal);
  if (missing.length > 0) return missing.join(", ");
  const namespace = flags.leaseNamespace ?? (await base.namespaceOf());
  const trusted = await trustOf(base, namespace, signal);
  isTrusted = true;
  if (flags.listen !== undefined)
    opened.push(await listenReports(hearing.reports, { listen: flags.listen, trust: trusted.trust }));
  await runController(optionsOf(base, { hearing, trusted, namespace, partsOf }), signal);
  return undefined;
}

type Hearing = {
  board: ReportsBoard;
  loads: LoadSamples;
  inspections: InspectionsDoor;
  reports: Reports;
  /** Where to; undefined: nobody is heard. */
  address: string | undefined;
};

function hearingOf({ flags, metrics }: Base): Hearing {
  const board = new ReportsBoard(systemClock.nowMs);
  const loads = new LoadSamples({ clock: systemClock, board });
  const inspections = new InspectionsDoor();
  const reports = new Reports({ board, loads, inspections, metrics });
  return { board, loads, inspections, reports, address: reportsAddress(flags) };
}

function trustOf({ flags, api, template, log }: Base, namespace: string, signal: AbortSignal): Promise<Trusted> {
  const wiring = {
    flags,
    api,
    readDocument: (path: string, until: AbortSignal) =>
      api.document(path, "application/jwk-set+json, application/json", until),
    template,
    namespace,
    watched: flags.namespace,
    onNews: (detail: string) => log.info({ detail }, "trust"),
    onTrouble: (detail: string) => log.warn({ detail }, "trust"),
  };
  return openTrusted(wiring, signal);
}

type Wired = { hearing: Hearing; trusted: Trusted; namespace: string; partsOf: PartsOf };

function optionsOf(
  { flags, api, leaseApi, metrics, log }: Base,
  { hearing, trusted, namespace, partsOf }: Wired,
): ControllerOptions {
  const { board, loads, inspections, reports, address } = hearing;
  const common = { clock: systemClock, random: Math.random, metrics };
  const onBecause = (key: string, because: readonly Because[]) => log.info({ key, because }, "acts");
  const parts = partsOf({
    ...common,
    template: trusted.template,
    trust: trusted.trust,
    broker: trusted.broker,
    reports: address === undefined ? undefined : { board, address },
    experts: { lookMs: flags.expertLookSeconds * 1000 },
    gangLimits: { ...gangLimits, wholeMs: flags.gangTimeout * 1000 },
    onBecause,
    onFailure: (key, detail) => log.warn({ key, detail }, "a group cannot be looked after"),
  });
  const heard = address === undefined ? [] : [reports.part, measuredPart({ board, loads, ...common })];
  const identity = `${os.hostname()}-${randomBytes(4).toString("hex")}`;
  return {
    ...common,
    api,
    planner: threadPlanner,
    workerImage: flags.workerImage,
    identity,
    lease: { namespace, name: flags.leaseName, times: leaseTimesOf(flags.leaseSeconds * 1000), api: leaseApi },
    parts: [...trusted.parts, ...parts, ...heard],
    inspect:
      address === undefined ? undefined : { door: inspections, template: trusted.template, target: { to: address } },
    loadOf: (kind, key) => (kind === "ModelDeployment" ? loads.of(key) : []),
    onWaiting: (wake) => loads.subscribe(wake),
    ...(flags.namespace === undefined ? {} : { namespace: flags.namespace }),
    onLead: (isLeading) => log.info({ identity, isLeading }, isLeading ? "leads" : "leads no more"),
    onBecause,
    onFailure: (key, error, againMs) => log.warn({ key, error: textOf(error), againMs }, "a turn has failed"),
  };
}

/** The port is that of --listen where --advertise names none. */
function reportsAddress({ listen, advertise }: Pick<Flags, "listen" | "advertise">): string | undefined {
  if (listen === undefined) return undefined;
  if (advertise === undefined)
    throw new FaultError(invalid("--advertise", "with --listen: say by which name this controller is found"));
  return /:\d+$/.test(advertise) ? advertise : `${advertise}:${listen.slice(listen.lastIndexOf(":") + 1)}`;
}

const textOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

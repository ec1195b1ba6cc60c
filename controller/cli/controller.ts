// `muster controller`: looks after ModelDeployments and DraftPools of a cluster. Any number may run; one leads.
//
// Exit codes: 0 it was asked to end; 1 it failed; 2 the call is wrong, or the cluster lacks what the chart installs.
import { randomBytes } from "node:crypto";
import os from "node:os";
import { Command } from "commander";
import pino from "pino";
import type { Broker } from "../api/mapping.ts";
import { KubeError } from "../kube/client.ts";
import { type Clock, systemClock } from "../kube/clock.ts";
import { Connections } from "../kube/connections.ts";
import { kubeconfigCredentials } from "../kube/credentials.ts";
import { HttpKubeApi } from "../kube/http-api.ts";
import { KubeMetrics } from "../kube/metrics.ts";
import { threadPlanner } from "../kube/plan-desk.ts";
import type { WorkerTemplate } from "../kube/pods.ts";
import { missingKinds, type Part, runController } from "../kube/run-controller.ts";
import { readTemplate } from "../kube/worker-template.ts";
import type { Because } from "../reconcile/world.ts";

/** What parts need to know of how the program was called. */
export type Installation = {
  clock: Clock;
  random: () => number;
  template: WorkerTemplate;
  broker: Broker | undefined;
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
};

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
    .requiredOption("--worker-image <image>", "image of the workers of new plans, by digest; stored plans keep theirs")
    .option("--worker-template <file>", "YAML: port, resources, service account, command... of every worker pod")
    .option("--nats-url <url>", "where drafts and leaders meet; its token is in MUSTER_NATS_TOKEN")
    .action(async (flags: Flags) => {
      process.exitCode = await serve(flags, partsOf);
    });
}

async function serve(flags: Flags, partsOf: (installation: Installation) => readonly Part[]): Promise<number> {
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
  const parts = partsOf({
    clock: systemClock,
    random: Math.random,
    template,
    broker:
      flags.natsUrl === undefined ? undefined : { url: flags.natsUrl, token: process.env.MUSTER_NATS_TOKEN ?? "" },
    onBecause,
    onFailure: (key, detail) => log.warn({ key, detail }, "a group cannot be looked after"),
  });
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  try {
    const missing = await missingKinds(api, stop.signal);
    if (missing.length > 0) {
      process.stderr.write(
        `muster controller: the cluster does not serve ${missing.join(", ")}: install the chart first\n`,
      );
      return EXIT.invalid;
    }
    const identity = `${os.hostname()}-${randomBytes(4).toString("hex")}`;
    await runController(
      {
        api,
        clock: systemClock,
        random: Math.random,
        planner: threadPlanner,
        workerImage,
        identity,
        lease: { namespace: flags.leaseNamespace ?? (await credentials.namespace()), name: leaseName },
        parts,
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
    await connections.close();
  }
}

const textOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

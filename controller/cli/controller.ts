// `muster controller`: looks after ModelDeployments and DraftPools of a cluster. Any number may run; one leads.
//
// Exit codes: 0 it was asked to end; 1 it failed; 2 the call is wrong, or the cluster lacks what the chart installs.
import { randomBytes } from "node:crypto";
import os from "node:os";
import { Command } from "commander";
import pino from "pino";
import { KubeError } from "../kube/client.ts";
import { systemClock } from "../kube/clock.ts";
import { Connections } from "../kube/connections.ts";
import { kubeconfigCredentials } from "../kube/credentials.ts";
import { HttpKubeApi } from "../kube/http-api.ts";
import { KubeMetrics } from "../kube/metrics.ts";
import { threadPlanner } from "../kube/plan-desk.ts";
import { missingKinds, type Part, runController } from "../kube/run-controller.ts";

type Flags = {
  kubeconfig?: string;
  context?: string;
  namespace?: string;
  leaseNamespace?: string;
  leaseName: string;
  workerImage: string;
};

const EXIT = { failed: 1, invalid: 2 };

/** `parts`: what runs beside it while it leads; given by whoever wires the program. */
export function controllerCommand(parts: readonly Part[] = []): Command {
  return new Command("controller")
    .description("Looks after the ModelDeployments of a Kubernetes cluster: plans, replicas, rollout, status.")
    .option("--kubeconfig <file>", "default: KUBECONFIG, ~/.kube/config, or the service account of this pod")
    .option("--context <name>", "context of the kubeconfig; default: its current one")
    .option("--namespace <name>", "look after this namespace alone; default: all")
    .option("--lease-namespace <name>", "where the Lease lies by which one leads; default: that of the context")
    .option("--lease-name <name>", "name of that Lease", "muster-controller")
    .requiredOption("--worker-image <image>", "image of the workers of new plans, by digest; stored plans keep theirs")
    .action(async (flags: Flags) => {
      process.exitCode = await serve(flags, parts);
    });
}

async function serve(flags: Flags, parts: readonly Part[]): Promise<number> {
  const log = pino({ name: "controller" }, pino.destination({ fd: 2, sync: true }));
  const { kubeconfig, context, namespace, leaseName, workerImage } = flags;
  const credentials = kubeconfigCredentials({
    ...(kubeconfig === undefined ? {} : { path: kubeconfig }),
    ...(context === undefined ? {} : { context }),
  });
  const connections = new Connections(credentials);
  const metrics = new KubeMetrics();
  const api = new HttpKubeApi({ connections, metrics });
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
        onBecause: (key, because) => log.info({ key, because }, "acts"),
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

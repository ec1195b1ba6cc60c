// `muster controller`: looks after ModelDeployments and DraftPools of a cluster. Any number may run; one leads.
//
// Exit codes: 0 it was asked to end; 1 it failed; 2 the call is wrong, or the cluster lacks what the chart installs.
import { setFlagsFromString } from "node:v8";
import { Command } from "commander";
import pino from "pino";
import { FaultError, invalid } from "../../proto/fault.ts";
import { KubeError } from "../kube/api/client.ts";
import { Connections } from "../kube/api/connections.ts";
import { kubeconfigCredentials } from "../kube/api/credentials.ts";
import { HttpKubeApi } from "../kube/api/http-api.ts";
import { gangLimits } from "../kube/gangs/reservations.ts";
import { readTemplate } from "../kube/groups/worker-template.ts";
import { KubeMetrics } from "../kube/metrics/metrics.ts";
import { type Base, type Flags, type PartsOf, runInstallation } from "./controller-run.ts";

const SECONDS_MAX = 86_400;
/** Above what lives; by itself V8 lets it become several times as much where the machine has memory, and pods have limits. */
const HEAP_GROWTH_PERCENT = 40;
const LEASE_SECONDS_MIN = 3;
/** A renewal, and the look that follows a conflict. */
const LEASE_CALLS_MAX = 2;
/** Below the least a watch that lags behind gives healthy gangs back; above the most GPUs idle half a shift for one lost pod. */
const GANG_SECONDS = { least: 10, most: 3_600 };
const EXIT = { failed: 1, invalid: 2 };

/** `partsOf`: what runs beside it while it leads; given by whoever wires the program. */
export function controllerCommand(partsOf: PartsOf = () => []): Command {
  return new Command("controller")
    .description("Looks after the ModelDeployments of a Kubernetes cluster: plans, replicas, rollout, status.")
    .option("--kubeconfig <file>", "default: KUBECONFIG, ~/.kube/config, or the service account of this pod")
    .option("--context <name>", "context of the kubeconfig; default: its current one")
    .option("--namespace <name>", "look after this namespace alone; default: all")
    .option("--lease-namespace <name>", "where the Lease lies by which one leads; default: that of the context")
    .option("--lease-name <name>", "name of that Lease", "muster-controller")
    .option("--lease-seconds <n>", "after a leader that has died the next one waits so long", leaseSeconds, 15)
    .option(
      "--gang-timeout <seconds>",
      "pods of a group that do not all have their nodes so long after the GPUs were reserved are deleted, the GPUs given back",
      gangSeconds,
      gangLimits.wholeMs / 1000,
    )
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

async function serve(flags: Flags, partsOf: PartsOf): Promise<number> {
  setFlagsFromString(`--heap-growing-percent=${HEAP_GROWTH_PERCENT}`);
  const template = readTemplate(flags.workerTemplate, flags.workerImage);
  const log = pino({ name: "controller" }, pino.destination({ fd: 2, sync: true }));
  const { kubeconfig, context } = flags;
  const credentials = kubeconfigCredentials({
    ...(kubeconfig === undefined ? {} : { path: kubeconfig }),
    ...(context === undefined ? {} : { context }),
  });
  const connections = new Connections(credentials);
  const metrics = new KubeMetrics();
  const api = new HttpKubeApi({ connections, metrics });
  const leaseApi = new HttpKubeApi({ connections, metrics, limits: { callsMax: LEASE_CALLS_MAX } });
  const opened: Base["opened"] = [];
  const base = { flags, template, api, leaseApi, metrics, log, namespaceOf: () => credentials.namespace(), opened };
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  try {
    const missing = await runInstallation(base, partsOf, stop.signal);
    if (missing === undefined) return 0;
    process.stderr.write(`muster controller: the cluster does not serve ${missing}: install the chart first\n`);
    return EXIT.invalid;
  } catch (error) {
    if (stop.signal.aborted) return 0;
    if (!(error instanceof KubeError)) throw error;
    process.stderr.write(`muster controller: ${error.message}\n`);
    return EXIT.failed;
  } finally {
    process.off("SIGTERM", onSignal).off("SIGINT", onSignal);
    for (const each of opened.reverse()) await each.close();
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

function gangSeconds(text: string): number {
  const value = Number(text);
  const { least, most } = GANG_SECONDS;
  if (Number.isInteger(value) && value >= least && value <= most) return value;
  throw new FaultError(invalid("--gang-timeout", `"${text}": write whole seconds, ${least} to ${most}`));
}

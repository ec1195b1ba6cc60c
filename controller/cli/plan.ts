// `muster plan`: reads a model's headers and prints what the planner answers, on given devices (SOURCE --gpus) or on a cluster
// as it is (-f, plan-cluster.ts). Exit 0: it fits; 2: a usage error, an invalid source or field; 3: nothing fits, or nothing
// is free; 1: anything else, such as a network that does not answer.
import os from "node:os";
import { Command, type CommanderError, InvalidArgumentError } from "commander";
import { FaultError, invalid } from "../../proto/fault.ts";
import { Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { KubeError } from "../kube/api/client.ts";
import { CHANGE_HELP } from "../kube/what-if/what-if-changes.ts";
import { readModel } from "../model/model.ts";
import { cpuInventory, type Inventory, PRODUCTS, parseInventory } from "../plan/hardware.ts";
import { planShards } from "../plan/plan.ts";
import { planJson, planText } from "../plan/print.ts";
import { CONCURRENCY_DEFAULT, wishesOf } from "../plan/wishes.ts";

type PlanOptions = {
  gpus?: string;
  /** Tokens; with -f the kubeconfig's context. */
  context?: string;
  concurrency?: number;
  kvBytes?: number;
  ranks?: number;
  nodes?: number;
  tp?: number;
  ep?: number;
  etp?: number;
  json?: boolean;
  filename?: string;
  kubeconfig?: string;
  namespace?: string;
  whatIf?: string[];
};

/** On a cluster the fields of the ModelDeployment say it. */
const WITH_SOURCE = ["gpus", "concurrency", "kvBytes", "ranks", "nodes", "tp", "ep", "etp"] as const;
const WITH_FILE = ["kubeconfig", "namespace", "whatIf"] as const;
const HELP = `
With -f the cluster is read once and nothing is written: each document is planned on what the ones before it leave, and the
nodes are those that the controller would bind. --what-if supposes a change first; it may be given several times:
${CHANGE_HELP}

Exit status: 0 it fits, 2 the call, the source or a field is invalid, 3 nothing fits or nothing is free.`;

const EXIT = { invalid: 2, infeasible: 3, other: 1 };

/** `8`, `32k`, `1M`; `suffixes` says what k and M stand for. */
function countOf(text: string, base: number): number {
  const match = /^(\d{1,15})([kKmMgG]?)$/.exec(text);
  const power = { "": 0, k: 1, m: 2, g: 3 }[(match?.[2] ?? "").toLowerCase()] ?? 0;
  const count = Number(match?.[1] ?? Number.NaN) * base ** power;
  if (!Number.isSafeInteger(count) || count < 1) {
    throw new InvalidArgumentError("It must be a whole number of at least 1, such as 16 or 32k.");
  }
  return count;
}

/** Tokens and bytes count in 1,024s. */
export const parseTokens = (text: string): number => countOf(text, 1024);
export const parseCount = (text: string): number => countOf(text, 1000);

/** The machine this runs on, as `nodes` CPU nodes that share it. */
export function thisMachine(nodes: number): Inventory {
  const constrained = process.constrainedMemory();
  const memory = constrained > 0 ? Math.min(constrained, os.totalmem()) : os.totalmem();
  const cores = Math.max(1, Math.floor(os.availableParallelism() / nodes));
  return cpuInventory(nodes, { cores, memoryBytes: Math.floor(memory / nodes) });
}

export function planCommand(): Command {
  return new Command("plan")
    .description("Shows how a model would be cut over devices, whether it fits, and why. Downloads no weights.")
    .argument("[source]", "builtin://name, file:///path, hf://org/name[@rev] or https://...")
    .option(
      "--gpus <count>x<product>",
      `devices, such as 8xH200 or 4xcpu; default: this machine (${PRODUCTS.join(", ")})`,
    )
    .option(
      "--context <tokens>",
      "tokens one sequence may have, such as 32k; default: what the model and memory allow. With -f: context of the kubeconfig",
    )
    .option("--concurrency <count>", `sequences that run at once (default: ${CONCURRENCY_DEFAULT})`, parseCount)
    .option(
      "--kv-bytes <bytes>",
      "KV memory of each rank, such as 64M; default: what context and concurrency need",
      parseTokens,
    )
    .option("--ranks <count>", "ranks of the group", parseCount)
    .option("--nodes <count>", "nodes the group is spread over", parseCount)
    .option("--tp <count>", "ranks that attention is cut over", parseCount)
    .option("--ep <count>", "slots that whole experts are dealt to", parseCount)
    .option("--etp <count>", "ranks that one expert is cut over", parseCount)
    .option(
      "-f, --filename <file>",
      "instead of a source: ModelDeployments and DraftPools as YAML; - is standard input",
    )
    .option("--kubeconfig <file>", "with -f; default: KUBECONFIG, ~/.kube/config, or the service account of this pod")
    .option("--namespace <name>", "with -f, of documents that name none; default: that of the context")
    .option("--what-if <change>", "with -f: suppose it first, such as nodes-=gpu-3", (each, all: string[] = []) => [
      ...all,
      each,
    ])
    .option("--json", "one JSON document instead of the table")
    .addHelpText("after", HELP)
    .exitOverride((error: CommanderError) => {
      process.exit(error.exitCode === 0 ? 0 : EXIT.invalid);
    })
    .action(async (source: string | undefined, options: PlanOptions) => {
      process.exitCode = await run(source, options);
    });
}

async function run(source: string | undefined, options: PlanOptions): Promise<number> {
  const { filename: file, whatIf = [], kubeconfig, namespace, context, json } = options;
  if ((source === undefined) === (file === undefined))
    return complain("write a source, or -f and a file, and not both", EXIT.invalid);
  const strange = (source === undefined ? WITH_SOURCE : WITH_FILE).find((name) => options[name] !== undefined);
  if (strange !== undefined) {
    const flag = strange.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
    return complain(`--${flag} goes with ${source === undefined ? "a source" : "-f"} alone`, EXIT.invalid);
  }
  try {
    if (source !== undefined) return await runPlan(source, options);
    const { planOnCluster } = await import("./plan-cluster.ts");
    const given = Object.entries({ kubeconfig, namespace, context }).filter(([, value]) => value !== undefined);
    const flags = { file: file ?? "", whatIf, json: json ?? false, ...Object.fromEntries(given) };
    return await planOnCluster(flags, (text) => process.stdout.write(text));
  } catch (error) {
    if (error instanceof KubeError) return complain(error.message, EXIT.other);
    if (!(error instanceof FaultError)) throw error;
    return complain(error.message, error.fault.kind === Fault_Kind.INVALID ? EXIT.invalid : EXIT.other);
  }
}

async function runPlan(source: string, options: PlanOptions): Promise<number> {
  const inventory =
    options.gpus === undefined ? thisMachine(options.nodes ?? 1) : parseInventory(options.gpus, options.nodes);
  if (typeof inventory === "string") return complain(inventory, EXIT.invalid);
  const { ranks, nodes, tp, ep, etp, concurrency = CONCURRENCY_DEFAULT, context } = options;
  const contextTokens = context === undefined ? undefined : contextOf(context);
  const pins = { ranks, workers: nodes, tp, ep, etp };
  const wishes = wishesOf({ contextTokens, kvBytes: options.kvBytes, concurrency, pins });
  const spec = await readModel(source, { headersOnly: true });
  const planned = planShards(spec, inventory, wishes);
  const asked = { spec, inventory, wishes };
  process.stdout.write(options.json ? `${JSON.stringify(planJson(asked, planned))}\n` : planText(asked, planned));
  return planned.kind === "feasible" ? 0 : EXIT.infeasible;
}

function contextOf(text: string): number {
  try {
    return parseTokens(text);
  } catch (error) {
    throw new FaultError(invalid("--context", error instanceof Error ? error.message : String(error)));
  }
}

function complain(text: string, exit: number): number {
  process.stderr.write(`muster plan: ${text}\n`);
  return exit;
}

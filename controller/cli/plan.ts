// `muster plan`: reads a model's headers and prints what the planner answers. Exit 0: a plan fits; 2: a usage error or an
// invalid source; 3: nothing fits; 1: anything else, such as a network that does not answer.
import os from "node:os";
import { Command, type CommanderError, InvalidArgumentError } from "commander";
import { FaultError } from "../../proto/fault.ts";
import { Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { readModel } from "../model/model.ts";
import { cpuInventory, type Inventory, PRODUCTS, parseInventory } from "../plan/hardware.ts";
import { planShards } from "../plan/plan.ts";
import { planJson, planText } from "../plan/print.ts";
import { CONCURRENCY_DEFAULT, wishesOf } from "../plan/wishes.ts";

type PlanOptions = {
  gpus?: string;
  context?: number;
  concurrency: number;
  kvBytes?: number;
  ranks?: number;
  nodes?: number;
  tp?: number;
  ep?: number;
  etp?: number;
  json?: boolean;
};

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
    .argument("<source>", "builtin://name, file:///path, hf://org/name[@rev] or https://...")
    .option(
      "--gpus <count>x<product>",
      `devices, such as 8xH200 or 4xcpu; default: this machine (${PRODUCTS.join(", ")})`,
    )
    .option(
      "--context <tokens>",
      "tokens one sequence may have, such as 32k; default: what the model and memory allow",
      parseTokens,
    )
    .option("--concurrency <count>", "sequences that run at once", parseCount, CONCURRENCY_DEFAULT)
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
    .option("--json", "one JSON document instead of the table")
    .addHelpText("after", "\nExit status: 0 a plan fits, 2 usage or source is invalid, 3 nothing fits.")
    .exitOverride((error: CommanderError) => {
      process.exit(error.exitCode === 0 ? 0 : EXIT.invalid);
    })
    .action(async (source: string, options: PlanOptions) => {
      process.exitCode = await runPlan(source, options);
    });
}

async function runPlan(source: string, options: PlanOptions): Promise<number> {
  const inventory =
    options.gpus === undefined ? thisMachine(options.nodes ?? 1) : parseInventory(options.gpus, options.nodes);
  if (typeof inventory === "string") return complain(inventory, EXIT.invalid);
  const { ranks, nodes, tp, ep, etp, concurrency } = options;
  const pins = { ranks, workers: nodes, tp, ep, etp };
  const wishes = wishesOf({ contextTokens: options.context, kvBytes: options.kvBytes, concurrency, pins });
  try {
    const spec = await readModel(source, { headersOnly: true });
    const planned = planShards(spec, inventory, wishes);
    const asked = { spec, inventory, wishes };
    process.stdout.write(options.json ? `${JSON.stringify(planJson(asked, planned))}\n` : planText(asked, planned));
    return planned.kind === "feasible" ? 0 : EXIT.infeasible;
  } catch (error) {
    if (!(error instanceof FaultError)) throw error;
    return complain(error.message, error.fault.kind === Fault_Kind.INVALID ? EXIT.invalid : EXIT.other);
  }
}

function complain(text: string, exit: number): number {
  process.stderr.write(`muster plan: ${text}\n`);
  return exit;
}

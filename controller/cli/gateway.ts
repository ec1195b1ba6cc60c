// `muster gateway`: the front door alone, pointed at a controller. Prints one JSON line with the bound addresses.
import { writeSync } from "node:fs";
import { logVerbosity, setLogVerbosity } from "@grpc/grpc-js";
import { Command, InvalidArgumentError } from "commander";
import { FaultError } from "../../proto/fault.ts";
import { Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { defaultLimits, type GatewayLimits } from "../gateway/limits.ts";
import { runGateway } from "../gateway/main.ts";

type Flags = {
  control: string;
  http: string;
  grpc: string;
  apiKey?: string;
  holdSeconds: number;
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
  return new Command("gateway")
    .description("The front door alone: OpenAI HTTP and gRPC for the models of one controller.")
    .requiredOption("--control <host:port>", "gRPC address of the controller")
    .option("--http <host:port>", "where to take HTTP; port 0 picks a free one", "127.0.0.1:8080")
    .option("--grpc <host:port>", "where to take gRPC; port 0 picks a free one", "127.0.0.1:8081")
    .option("--api-key <key>", "ask clients for this key; needed beyond loopback (or MUSTER_API_KEY)")
    .option(
      "--hold-seconds <n>",
      "hold streams so long while a model has no leader",
      positive,
      defaultLimits.holdMs / 1000,
    )
    .option("--drain-seconds <n>", "let streams run on so long after SIGTERM", positive, defaultLimits.drainMs / 1000)
    .option("--open-max <n>", "requests answered at once", positive, defaultLimits.openRequestsMax)
    .option("--lifeline", "end as soon as standard input ends")
    .option("--ready-fd <fd>", "write the JSON line with the addresses to this descriptor", descriptor, STDOUT_FD)
    .action((flags: Flags) => serve(flags));
}

async function serve(flags: Flags): Promise<void> {
  // Its faults come back as values; its own lines on stderr would only say them twice.
  setLogVerbosity(logVerbosity.NONE);
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  if (flags.lifeline) process.stdin.on("end", onSignal).on("error", onSignal).resume();
  const limits: Partial<GatewayLimits> = {
    holdMs: flags.holdSeconds * 1000,
    drainMs: flags.drainSeconds * 1000,
    openRequestsMax: Math.floor(flags.openMax),
  };
  try {
    const { control, http, grpc, readyFd } = flags;
    await runGateway(
      {
        control,
        http,
        grpc,
        apiKey: flags.apiKey ?? process.env.MUSTER_API_KEY,
        limits,
        onListening: (addresses) => writeSync(readyFd, `${JSON.stringify(addresses)}\n`),
      },
      stop.signal,
    );
  } catch (error) {
    if (!(error instanceof FaultError)) throw error;
    process.stderr.write(`muster gateway: ${error.message}\n`);
    process.exitCode = error.fault.kind === Fault_Kind.INVALID ? 2 : 1;
  } finally {
    process.off("SIGTERM", onSignal).off("SIGINT", onSignal);
  }
}

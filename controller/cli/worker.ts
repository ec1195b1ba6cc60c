// `muster worker`: one node's slice of a group. Started by `muster up` or a pod, loaded over gRPC by the controller.
import { Command, InvalidArgumentError } from "commander";
import { FaultError } from "../../proto/fault.ts";
import { Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { runWorker } from "../../worker/serve/main.ts";
import type { Localise } from "../../worker/serve/role.ts";
import { localise } from "../model/localise.ts";
import { trustOf } from "./identity.ts";

type Flags = {
  listen: string;
  incarnation: bigint;
  worker: number;
  commHost: string;
  lifeline?: boolean;
  drainSeconds: number;
  identity?: string;
  enrol?: string;
};

function incarnationOf(text: string): bigint {
  if (!/^\d{1,20}$/.test(text)) throw new InvalidArgumentError("a whole number is needed.");
  return BigInt(text);
}

function indexOf(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 0 || value > 0xffff)
    throw new InvalidArgumentError("a number from 0 is needed.");
  return value;
}

function secondsOf(text: string): number {
  const value = Number(text);
  if (!(value >= 0 && value <= 86_400)) throw new InvalidArgumentError("seconds from 0 to 86400 are needed.");
  return value;
}

/** The `worker` sub-command. Exit codes: 0 drained; 1 state was lost; 2 the call is wrong. */
export function workerCommand(): Command {
  return new Command("worker")
    .description("One node's slice of a group: an engine over its ranks behind gRPC. Started by `up` or a pod.")
    .requiredOption("--listen <host:port>", "where to take gRPC: host:port (port 0 picks a free one) or unix:/path")
    .requiredOption("--incarnation <n>", "life of the group this worker belongs to; others are refused", incarnationOf)
    .option("--worker <n>", "index in the group; 0 leads", indexOf, 0)
    .option("--comm-host <host>", "address on which collectives of other workers are taken", "127.0.0.1")
    .option("--lifeline", "end as soon as standard input ends")
    .option("--drain-seconds <n>", "let sequences run on so long after SIGTERM", secondsOf, 2)
    .option("--identity <folder>", "with token and ca.crt: links are mutual TLS; needs --enrol")
    .option("--enrol <host:port>", "where the certificate comes from; needs --identity")
    .action((flags: Flags) => serve(flags));
}

/** A pod has its own files and a cache of its own; whoever starts a worker beside itself names files that are there. */
function localiserOf(cacheDir: string | undefined): Localise | undefined {
  return cacheDir ? (plan, options) => localise(plan, { ...options, cacheDir }) : undefined;
}

async function serve(flags: Flags): Promise<void> {
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  if (flags.lifeline) watchStdin(onSignal);
  const { listen, incarnation, worker, commHost, drainSeconds } = flags;
  const podUid = process.env.MUSTER_POD_UID || undefined;
  const localise = localiserOf(process.env.MUSTER_CACHE);
  try {
    // Before it has a certificate a worker is nobody, and need not listen.
    const onTrouble = (detail: string) => process.stderr.write(`muster worker: ${detail}\n`);
    const trust = await trustOf(flags, { signal: stop.signal, onTrouble });
    await runWorker(
      { listen, incarnation, worker, commHost, podUid, localise, trust, drainMs: drainSeconds * 1000 },
      stop.signal,
    );
  } catch (error) {
    if (stop.signal.aborted && error === stop.signal.reason) process.exit(); // asked to end before it was anybody
    if (!(error instanceof FaultError)) throw error;
    process.stderr.write(`muster worker: ${error.message}\n`);
    process.exitCode = error.fault.kind === Fault_Kind.INVALID ? 2 : 1;
  } finally {
    process.off("SIGTERM", onSignal).off("SIGINT", onSignal);
  }
  // What is left may hold the process: an open standard input, sockets of peers. The work is done and everything is closed.
  process.exit();
}

// Whoever started us holds the other end: when that process dies in whatever way, the pipe ends and so do we.
function watchStdin(onEnd: () => void): void {
  process.stdin.on("end", onEnd).on("error", onEnd).resume();
}

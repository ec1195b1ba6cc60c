// `muster inspect`: looks at a model's source where only this pod can, and sends what it has read to the controller. Started by
// a pod that the controller makes; decides nothing about the model.
//
// Exit codes: 0 the controller has taken it; 1 it could not be read or sent; 2 the call or the source is wrong.
import { once } from "node:events";
import type { ServiceError } from "@grpc/grpc-js";
import { Command } from "commander";
import { FaultError, invalid, transient } from "../../proto/fault.ts";
import { type InspectedPart, ReportsClient, type ReportTaken } from "../../proto/gen/muster/v1/report.ts";
import { type Fault, Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../proto/grpc.ts";
import type { Trust } from "../../proto/trust.ts";
import { readModel } from "../model/model.ts";
import { openSource } from "../model/sources/open.ts";
import { type Recording, recorder } from "../model/sources/recorded.ts";
import { trustOf } from "./identity.ts";

type Flags = { to: string; identity?: string; enrol?: string };
/** Who the pod is. */
export type Inspector = Pick<InspectedPart, "namespace" | "inspection" | "podUid">;
type Said = NonNullable<InspectedPart["kind"]>;

/** Of one message. */
const PIECE_BYTES = 1024 * 1024;
/** To look, connect and be heard in all; the pod is ended soon after. */
const SEND_MS = 120_000;
const TRIES_MAX = 15;
const AGAIN_MS = 2_000;

export function inspectCommand(): Command {
  return new Command("inspect")
    .description("Reads a model's headers where only this pod can, and sends them to the controller. Started by a pod.")
    .argument("<source>", "such as pvc://claim/path")
    .requiredOption("--to <host:port>", "where the controller takes reports")
    .option("--identity <folder>", "with token and ca.crt: links are mutual TLS; needs --enrol")
    .option("--enrol <host:port>", "where the certificate comes from; needs --identity")
    .action(async (source: string, flags: Flags) => {
      process.exitCode = await inspect(source, flags);
    });
}

async function inspect(source: string, flags: Flags): Promise<number> {
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  try {
    const me = inspector(process.env);
    const trust = await trustOf(flags, { signal: stop.signal, onTrouble: tell });
    const found = await look(source, stop.signal);
    await sendInspected(partsOf(found), { me, to: flags.to, trust, signal: stop.signal });
    if (!("fault" in found)) return 0;
    tell(textOf(found.fault));
    return found.fault.kind === Fault_Kind.INVALID ? 2 : 1;
  } catch (error) {
    if (!(error instanceof FaultError)) throw error;
    tell(error.message);
    return error.fault.kind === Fault_Kind.INVALID ? 2 : 1;
  } finally {
    stop.abort();
    process.off("SIGTERM", onSignal).off("SIGINT", onSignal);
  }
}

const tell = (text: string): void => void process.stderr.write(`muster inspect: ${text}\n`);
const textOf = ({ field, detail }: Fault): string => (field === "" ? detail : `${field}: ${detail}`);

function inspector(env: NodeJS.ProcessEnv): Inspector {
  const need = (name: string): string => {
    const value = env[name];
    if (!value) throw new FaultError(invalid(name, "is not set: this command is started by a pod"));
    return value;
  };
  return {
    namespace: need("MUSTER_POD_NAMESPACE"),
    inspection: need("MUSTER_POD_NAME"),
    podUid: need("MUSTER_POD_UID"),
  };
}

/** What the controller's own readers have read, or why they could not. */
export async function look(source: string, signal: AbortSignal): Promise<Recording | { fault: Fault }> {
  try {
    const { place, recording } = recorder(await openSource(source, { signal }));
    await readModel(source, { place, headersOnly: true, tokenizer: true, signal });
    return recording;
  } catch (error) {
    if (!(error instanceof FaultError)) throw error;
    return { fault: error.fault };
  }
}

export function* partsOf(found: Recording | { fault: Fault }): Generator<Said> {
  if ("fault" in found) {
    yield { $case: "fault", value: found.fault };
    return;
  }
  const { url, name, gguf = "", ggufs, files } = found;
  yield { $case: "source", value: { url, name, gguf, ggufs } };
  let sent = 0;
  for (const { name: file, size, etag, parts } of files) {
    yield { $case: "file", value: { name: file, bytes: BigInt(size), etag } };
    for (const { offset, data } of parts) {
      for (let begin = 0; begin < data.length; begin += PIECE_BYTES) {
        const piece = Buffer.from(data.subarray(begin, begin + PIECE_BYTES));
        yield { $case: "bytes", value: { offset: BigInt(offset + begin), data: piece } };
        sent += piece.length;
      }
    }
  }
  yield { $case: "end", value: { files: files.length, bytes: BigInt(sent) } };
}

export type Sending = { me: Inspector; to: string; trust: Trust; signal: AbortSignal };

/** Sends all again where the leader has changed meanwhile. Rejects with FaultError after a few tries. */
export async function sendInspected(parts: Iterable<Said>, sending: Sending): Promise<void> {
  const all = [...parts];
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await sendOnce(all, sending);
    } catch (error) {
      if (sending.signal.aborted) throw new FaultError(transient("cancelled", "it was asked to end"), { cause: error });
      const detail = error instanceof Error ? error.message : String(error);
      if (attempt >= TRIES_MAX)
        throw new FaultError(transient("not_heard", `${sending.to} does not take it: ${detail}`, "--to"), {
          cause: error,
        });
      await new Promise((done) => setTimeout(done, AGAIN_MS));
    }
  }
}

async function sendOnce(parts: readonly Said[], { me, to, trust, signal }: Sending): Promise<void> {
  const client = new ReportsClient(to, trust.channel({ role: "controller" }), channelOptions);
  const taken = Promise.withResolvers<ReportTaken>();
  taken.promise.catch(() => {}); // awaited below
  const call = client.inspected((error: ServiceError | null, answer: ReportTaken) =>
    error === null ? taken.resolve(answer) : taken.reject(error),
  );
  const cancel = () => call.cancel();
  const timer = setTimeout(cancel, SEND_MS);
  signal.addEventListener("abort", cancel, { once: true });
  try {
    for (const kind of parts) {
      if (!call.write({ ...me, kind })) await Promise.race([once(call, "drain"), taken.promise]);
    }
    call.end();
    await taken.promise;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", cancel);
    client.close();
  }
}

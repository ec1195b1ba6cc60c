// Probes of a container, as a kubelet runs them: exec in its view, HTTP, TCP and gRPC health on its pod's address.
// Owns one loop per probe with its thresholds. Says only changes; what follows from them is the pod's business.
import { execFile } from "node:child_process";
import { Client, credentials } from "@grpc/grpc-js";
import type { NetworkSpace } from "../controlplane/network-space.ts";
import { type Container, type Probe, portOf } from "./pod.ts";
import { insideView } from "./sandbox.ts";

const OUTPUT_BYTES_MAX = 10_240;
const HEALTH_SERVING = 1;

export type Target = { space: NetworkSpace; ip: string; pid: number; container: Container };

/** Whether the probe passes now. Never rejects: a refusal, a wrong answer and a time-out all are "no". */
export async function passes(target: Target, probe: Probe): Promise<boolean> {
  const timeoutMs = probe.timeoutSeconds * 1000;
  const signal = AbortSignal.timeout(timeoutMs);
  try {
    if (probe.exec) return (await runInside(target.pid, probe.exec.command, timeoutMs)) === 0;
    if (probe.httpGet) return await httpPasses(target, probe.httpGet, signal);
    if (probe.tcpSocket) return await tcpPasses(target, portOf(target.container, probe.tcpSocket.port));
    if (probe.grpc) return await grpcPasses(target, probe.grpc, timeoutMs);
    return true;
  } catch {
    return false;
  }
}

/** Runs a command in the container's view; resolves with its exit code, -1 where it ran over its time. */
export function runInside(pid: number, command: readonly string[], timeoutMs: number): Promise<number> {
  const [file = "false", ...args] = insideView(pid, command);
  return new Promise((done) => {
    execFile(file, args, { timeout: timeoutMs, killSignal: "SIGKILL", maxBuffer: OUTPUT_BYTES_MAX }, (error) => {
      done(error === null ? 0 : typeof error.code === "number" ? error.code : -1);
    });
  });
}

export async function httpPasses(
  { space, ip, container }: Pick<Target, "space" | "ip" | "container">,
  get: NonNullable<Probe["httpGet"]>,
  signal: AbortSignal,
): Promise<boolean> {
  const headers = Object.fromEntries(get.httpHeaders.map(({ name, value }) => [name, value]));
  const { status } = await space.get(
    { address: ip, port: portOf(container, get.port), path: get.path, headers },
    signal,
  );
  return status >= 200 && status < 400;
}

async function tcpPasses({ space, ip }: Target, port: number): Promise<boolean> {
  (await space.dial(ip, port)).destroy();
  return true;
}

/** grpc.health.v1.Health/Check, its two one-field messages written out: field 1 is the service's name, field 1 the answer. */
async function grpcPasses(
  { space, ip }: Target,
  { port, service }: { port: number; service: string },
  timeoutMs: number,
): Promise<boolean> {
  const way = await space.forward(ip, port);
  const client = new Client(`127.0.0.1:${way.port}`, credentials.createInsecure());
  const name = Buffer.from(service);
  const asked = name.length === 0 ? Buffer.alloc(0) : Buffer.concat([Buffer.from([0x0a, name.length]), name]);
  try {
    return await new Promise((done, fail) => {
      client.makeUnaryRequest(
        "/grpc.health.v1.Health/Check",
        (bytes: Buffer) => bytes,
        (bytes: Buffer) => bytes,
        asked,
        { deadline: Date.now() + timeoutMs },
        (error, answer?: Buffer) => (error ? fail(error) : done(answer?.[0] === 0x08 && answer[1] === HEALTH_SERVING)),
      );
    });
  } finally {
    client.close();
    await way.close();
  }
}

/** Runs a probe until `signal`; `say` hears each verdict that the thresholds make, the first included. */
export async function watchProbe(
  target: Target,
  probe: Probe,
  say: (isPassing: boolean) => void,
  signal: AbortSignal,
): Promise<void> {
  await pause(probe.initialDelaySeconds * 1000, signal);
  let verdict: boolean | undefined;
  let streak = { isPassing: false, length: 0 };
  while (!signal.aborted) {
    const isPassing = await passes(target, probe);
    if (signal.aborted) return;
    streak = { isPassing, length: streak.isPassing === isPassing ? streak.length + 1 : 1 };
    const needed = isPassing ? probe.successThreshold : probe.failureThreshold;
    if (streak.length >= needed && verdict !== isPassing) {
      verdict = isPassing;
      say(isPassing);
    }
    await pause(probe.periodSeconds * 1000, signal);
  }
}

/** Resolves after `ms` or when `signal` fires, whichever is first. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    if (signal.aborted) return done();
    const wake = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", wake);
      done();
    };
    const timer = setTimeout(wake, ms);
    signal.addEventListener("abort", wake, { once: true });
  });
}

// The guard: one process that owns every child of a local cluster. It lives on a lifeline pipe (its standard input): when the
// parent ends in whatever way, kill -9 included, the pipe ends and the guard stops all children, removes the run folder and
// exits. Knows nothing of models or requests.
//
//   G1  a child never outlives the guard: each has a pipe from the guard as its standard input and ends with it; what cannot
//       watch a pipe (nats-server) is started through `setpriv --pdeathsig` where that is installed.
//   G2  stop is SIGTERM, then SIGKILL of the process group after the grace.
//   G3  commands and events are JSON lines of at most LINE_BYTES_MAX.
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { closeSync, openSync, rmSync, writeSync } from "node:fs";
import { createInterface } from "node:readline";

/** Parent -> guard, on standard input. */
export type GuardCommand =
  | {
      kind: "spawn";
      id: string;
      command: string;
      args: string[];
      env: Record<string, string>;
      log: string;
      /** The child ends when its standard input does. */
      watchesStdin: boolean;
    }
  | { kind: "stop"; id: string; graceMs: number }
  | { kind: "kill"; id: string; signal: string };

/** Guard -> parent, on standard output. */
export type GuardEvent =
  | { kind: "ready"; pid: number }
  | { kind: "started"; id: string; pid: number }
  | { kind: "line"; id: string; line: string }
  | { kind: "exited"; id: string; code: number | undefined; signal: string | undefined; detail: string };

const LINE_BYTES_MAX = 64 * 1024;
const LOG_BYTES_MAX = 64 * 1024 * 1024; // of one child; then its log says that it was cut
const END_GRACE_MS = 3_000; // between SIGTERM and SIGKILL when the parent is gone

type Child = { process: ChildProcess; killer?: NodeJS.Timeout };

export function runGuard(runFolder: string): void {
  const children = new Map<string, Child>();
  let isEnding = false;

  const say = (event: GuardEvent) => {
    try {
      writeSync(1, `${JSON.stringify(event)}\n`);
    } catch {
      // The parent is gone: its end of the pipe closing is what ends us, below.
    }
  };

  const killGroup = (child: Child, signal: NodeJS.Signals) => {
    const pid = child.process.pid;
    if (pid === undefined || child.process.exitCode !== null) return;
    try {
      process.kill(-pid, signal);
    } catch {
      child.process.kill(signal);
    }
  };

  const finishIfEmpty = () => {
    if (!isEnding || children.size > 0) return;
    rmSync(runFolder, { recursive: true, force: true });
    process.exit(0);
  };

  const start = (command: Extract<GuardCommand, { kind: "spawn" }>) => {
    if (isEnding || children.has(command.id)) return;
    const log = openSync(command.log, "a");
    let logged = 0;
    const write = (chunk: Buffer) => {
      if (logged > LOG_BYTES_MAX) return;
      logged += chunk.length;
      writeSync(log, logged > LOG_BYTES_MAX ? Buffer.from("(log cut: too long)\n") : chunk);
    };
    const [file, args] = command.watchesStdin
      ? [command.command, command.args]
      : withDeathSignal(command.command, command.args);
    const child = spawn(file, args, { env: command.env, stdio: ["pipe", "pipe", "pipe"], detached: true });
    children.set(command.id, { process: child });
    let lastWords = "";
    child.stdin.on("error", () => {}); // the child closed it: its business
    child.stderr.on("data", (chunk: Buffer) => {
      write(chunk);
      lastWords = (lastWords + chunk.toString()).slice(-2_000);
    });
    child.stdout.on("data", write);
    createInterface({ input: child.stdout }).on("line", (line) => {
      if (line.length <= LINE_BYTES_MAX) say({ kind: "line", id: command.id, line });
    });
    child.on("spawn", () => say({ kind: "started", id: command.id, pid: child.pid ?? 0 }));
    const ended = (code: number | undefined, signal: string | undefined, detail: string) => {
      const seen = children.get(command.id);
      if (!seen) return;
      clearTimeout(seen.killer);
      children.delete(command.id);
      closeSync(log);
      say({ kind: "exited", id: command.id, code, signal, detail });
      finishIfEmpty();
    };
    child.on("error", (error) => ended(undefined, undefined, error.message));
    child.on("close", (code, signal) =>
      ended(code ?? undefined, signal ?? undefined, lastWords.trim().split("\n").at(-1) ?? ""),
    );
  };

  const stop = (id: string, graceMs: number) => {
    const child = children.get(id);
    if (!child) return;
    killGroup(child, "SIGTERM");
    child.killer ??= setTimeout(() => killGroup(child, "SIGKILL"), graceMs);
  };

  const end = () => {
    if (isEnding) return;
    isEnding = true;
    for (const id of children.keys()) stop(id, END_GRACE_MS);
    finishIfEmpty();
  };

  for (const signal of ["SIGINT", "SIGHUP", "SIGTERM"] as const)
    process.on(signal, signal === "SIGTERM" ? end : () => {});
  process.stdout.on("error", () => {});
  const input = createInterface({ input: process.stdin });
  input.on("line", (line) => {
    const command: GuardCommand = JSON.parse(line);
    if (command.kind === "spawn") start(command);
    else if (command.kind === "stop") stop(command.id, command.graceMs);
    else {
      const child = children.get(command.id);
      if (child) killGroup(child, command.signal === "SIGKILL" ? "SIGKILL" : "SIGTERM");
    }
  });
  input.on("close", end);
  say({ kind: "ready", pid: process.pid });
}

let deathSignal: boolean | undefined;

function withDeathSignal(command: string, args: string[]): [string, string[]] {
  deathSignal ??= spawnSync("setpriv", ["--pdeathsig", "KILL", "true"], { stdio: "ignore" }).status === 0;
  return deathSignal ? ["setpriv", ["--pdeathsig", "KILL", command, ...args]] : [command, args];
}

const folder = process.env.MUSTER_GUARD_FOLDER;
if (process.argv[1]?.endsWith("guard.ts") && folder) runGuard(folder);

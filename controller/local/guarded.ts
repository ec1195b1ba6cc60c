// The parent's side of the guard (guard.ts): starts it, sends commands, keeps what is known of each child.
import { type ChildProcess, spawn } from "node:child_process";
import { EventEmitter, once } from "node:events";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import type { GuardCommand, GuardEvent } from "./guard.ts";

/** What was seen of a child last. A child that ended stays known until it is forgotten. */
export type Seen =
  | { state: "starting" }
  | { state: "running"; pid: number }
  | { state: "exited"; code: number | undefined; signal: string | undefined; detail: string; atMs: number };

export type SpawnRequest = Omit<Extract<GuardCommand, { kind: "spawn" }>, "kind">;

const READY_TIMEOUT_MS = 10_000;

/** Emits "change" when a child's state changes and "line" (id, line) for each line of a child's standard output. */
export class Guarded extends EventEmitter<{ change: [string]; line: [string, string]; lost: [] }> {
  readonly children = new Map<string, Seen>();
  readonly #guard: ChildProcess;
  #isClosed = false;

  private constructor(guard: ChildProcess) {
    super();
    this.#guard = guard;
  }

  /** Starts a guard for `runFolder`, which the guard removes when it ends. Throws where it does not answer in time. */
  static async start(runFolder: string): Promise<Guarded> {
    const file = fileURLToPath(new URL("./guard.ts", import.meta.url));
    const guard = spawn(process.execPath, [file], {
      stdio: ["pipe", "pipe", "inherit"],
      detached: true, // a Ctrl-C at the terminal is for the parent alone
      env: { ...process.env, MUSTER_GUARD_FOLDER: runFolder },
    });
    const guarded = new Guarded(guard);
    guard.stdin?.on("error", () => {});
    const lines = createInterface({ input: guard.stdout ?? process.stdin });
    lines.on("line", (line) => guarded.#hear(JSON.parse(line)));
    guard.on("close", () => {
      if (!guarded.#isClosed) guarded.emit("lost");
    });
    await once(guarded, "change", { signal: AbortSignal.timeout(READY_TIMEOUT_MS) });
    return guarded;
  }

  spawn(request: SpawnRequest): void {
    this.children.set(request.id, { state: "starting" });
    this.#send({ kind: "spawn", ...request });
  }

  stop(id: string, graceMs: number): void {
    this.#send({ kind: "stop", id, graceMs });
  }

  kill(id: string): void {
    this.#send({ kind: "kill", id, signal: "SIGKILL" });
  }

  /** Forgets a child that has ended. */
  forget(id: string): void {
    if (this.children.get(id)?.state === "exited") this.children.delete(id);
  }

  isRunning(id: string): boolean {
    const seen = this.children.get(id);
    return seen !== undefined && seen.state !== "exited";
  }

  /** Resolves when the child has ended; at once where it is not known. */
  async ended(id: string, signal: AbortSignal): Promise<void> {
    while (this.isRunning(id)) await once(this, "change", { signal });
  }

  /** Ends the guard and with it every child; resolves when it is gone. */
  async close(): Promise<void> {
    this.#isClosed = true;
    if (this.#guard.exitCode !== null || this.#guard.signalCode !== null) return;
    const gone = once(this.#guard, "close");
    this.#guard.stdin?.end();
    await gone;
  }

  #send(command: GuardCommand): void {
    this.#guard.stdin?.write(`${JSON.stringify(command)}\n`);
  }

  #hear(event: GuardEvent): void {
    switch (event.kind) {
      case "ready":
        this.emit("change", "");
        return;
      case "line":
        this.emit("line", event.id, event.line);
        return;
      case "started":
        this.children.set(event.id, { state: "running", pid: event.pid });
        break;
      case "exited":
        this.children.set(event.id, {
          state: "exited",
          code: event.code,
          signal: event.signal,
          detail: event.detail,
          atMs: Date.now(),
        });
        break;
    }
    this.emit("change", event.id);
  }
}

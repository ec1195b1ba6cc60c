// Starts the real thing for tests: `muster up` as a process of its own, on free ports, found and killed by what /proc says.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { until } from "../until.ts";

const MAIN = join(import.meta.dirname, "../../controller/cli/main.ts");
const READY_MS = 60_000;

/** What `npm start` serves. */
export const START = [
  "builtin://nano-maverick",
  "--nodes",
  "2",
  "--ranks",
  "2",
  "--ep",
  "2",
  "--draft",
  "builtin://nano-draft",
];

export type Ready = { http: string; grpc: string; logs: string; run: string };

export class Muster {
  readonly process: ChildProcess;
  readonly ready: Ready;
  readonly said: { stdout: string; stderr: string };

  private constructor(process: ChildProcess, ready: Ready, said: { stdout: string; stderr: string }) {
    this.process = process;
    this.ready = ready;
    this.said = said;
  }

  /** Resolves when it says that it is ready; rejects with what it said where it ends first. */
  static async up(args: string[], env: Record<string, string> = {}): Promise<Muster> {
    const all = ["up", ...args, "--json", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    const child = spawn(process.execPath, [MAIN, ...all], {
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, ...env },
    });
    const said = { stdout: "", stderr: "" };
    child.stderr.on("data", (chunk) => {
      said.stderr += chunk;
    });
    const ready = await new Promise<Ready>((done, fail) => {
      const lines = createInterface({ input: child.stdout });
      lines.on("line", (line) => {
        said.stdout += `${line}\n`;
        if (line.startsWith("{")) done(JSON.parse(line));
      });
      child.on("close", (code) => fail(new Error(`muster up ended with ${code}:\n${said.stdout}${said.stderr}`)));
      const timer = setTimeout(
        () => fail(new Error(`not ready in ${READY_MS} ms:\n${said.stdout}${said.stderr}`)),
        READY_MS,
      );
      timer.unref();
    }).catch(async (error) => {
      child.kill("SIGTERM");
      throw error;
    });
    return new Muster(child, ready, said);
  }

  get hasEnded(): boolean {
    return this.process.exitCode !== null || this.process.signalCode !== null;
  }

  /** Ctrl-C; resolves with the exit code. */
  async stop(): Promise<number | null> {
    if (!this.hasEnded) {
      const closed = once(this.process, "close");
      this.process.kill("SIGINT");
      await closed;
    }
    return this.process.exitCode;
  }

  /** Process id of worker `index` of the model's group in its newest incarnation; undefined while there is none. */
  worker(index: number, group = "nano-maverick"): number | undefined {
    const pattern = new RegExp(`unix:${this.ready.run}/${group}-(\\d+)-${index}\\.sock`);
    return this.processes()
      .map(({ pid, command }) => ({ pid, incarnation: Number(pattern.exec(command)?.[1] ?? -1) }))
      .filter((found) => found.incarnation >= 0)
      .sort((a, b) => b.incarnation - a.incarnation)[0]?.pid;
  }

  /** All processes that have this run's folder in their command line or environment. */
  processes(): { pid: number; command: string }[] {
    return processesOf(this.ready.run);
  }

  async kill9(index: number, group?: string): Promise<void> {
    await until(() => this.worker(index, group) !== undefined, `worker ${index} runs`);
    const pid = this.worker(index, group);
    if (pid !== undefined) process.kill(pid, "SIGKILL");
  }

  async complete(body: Record<string, unknown>): Promise<Completion> {
    const answer = await fetch(`${this.ready.http}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "nano-maverick", muster: { return_token_ids: true }, ...body }),
    });
    const text = await answer.text();
    if (!answer.ok) throw new Error(`HTTP ${answer.status}: ${text}`);
    return JSON.parse(text);
  }
}

export type Completion = {
  choices: { text: string; finish_reason: string; token_ids?: number[]; muster?: { token_ids?: number[] } }[];
  usage: { completion_tokens: number; muster?: { drafted: number; accepted: number; target_steps: number } };
};

export function processesOf(runFolder: string): { pid: number; command: string }[] {
  const found: { pid: number; command: string }[] = [];
  for (const name of readdirSync("/proc").filter((entry) => /^\d+$/.test(entry))) {
    try {
      const command = readFileSync(`/proc/${name}/cmdline`, "utf8").replaceAll("\0", " ");
      const environment = readFileSync(`/proc/${name}/environ`, "utf8");
      const isOurs = command.includes(runFolder) || environment.includes(`MUSTER_GUARD_FOLDER=${runFolder}`);
      if (isOurs) found.push({ pid: Number(name), command });
    } catch {
      // ended while we looked
    }
  }
  return found;
}

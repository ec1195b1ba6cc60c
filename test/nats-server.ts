// A real nats-server for a test: on a free port of loopback, which it keeps over deaths.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findNatsServer } from "../controller/local/nats.ts";
import { until } from "./until.ts";

export class NatsServer {
  /** Files of its own; they go with it. */
  readonly folder = mkdtempSync(join(tmpdir(), "muster-nats-"));
  #process: ChildProcess | undefined;
  #port = -1;

  get port(): number {
    return this.#port;
  }

  /** On a free port, later on the same. */
  async start(args: readonly string[]): Promise<void> {
    const file = findNatsServer();
    if (file === undefined) throw new Error("no nats-server on this machine: run `npm run setup`");
    const where = ["-a", "127.0.0.1", "-p", String(this.#port), "--ports_file_dir", this.folder];
    this.#process = spawn(file, [...args, ...where], { stdio: "ignore" });
    await until(() => {
      const ports = readdirSync(this.folder).find((name) => name.endsWith(".ports"));
      const text = ports === undefined ? "" : readFileSync(join(this.folder, ports), "utf8");
      this.#port = Number(/127\.0\.0\.1:(\d+)/.exec(text)?.[1] ?? this.#port);
      return this.#port > 0;
    }, "nats-server tells its port");
  }

  async kill(): Promise<void> {
    if (this.#process === undefined) return;
    const closed = once(this.#process, "close");
    this.#process.kill("SIGKILL");
    await closed;
    this.#process = undefined;
  }

  async end(): Promise<void> {
    await this.kill();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

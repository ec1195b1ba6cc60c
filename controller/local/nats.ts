// The local nats-server: one child of the guard on a free loopback port, behind a token. It is started again when it dies;
// speculation pauses meanwhile and nothing else notices.
import { randomBytes } from "node:crypto";
import { accessSync, constants, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { delimiter, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import type { Guarded } from "./guarded.ts";

const ROOT = resolve(fileURLToPath(import.meta.url), "../../..");
const ID = "nats";
const START_TIMEOUT_MS = 10_000;
const RESTART_WAIT_MS = 500;
const POLL_MS = 20;

export type Nats = { url: string; token: string; stop(): void };

/** Looks in the checkout's own tools, then on PATH; undefined where there is none. */
export function findNatsServer(): string | undefined {
  const folders = [join(ROOT, ".tools/bin"), ...(process.env.PATH ?? "").split(delimiter), "/usr/sbin"];
  return folders
    .map((folder) => join(folder, "nats-server"))
    .find((file) => {
      try {
        accessSync(file, constants.X_OK);
        return true;
      } catch {
        return false;
      }
    });
}

/** Starts it and waits for its port, which it keeps over restarts. Throws where it does not come up in time. */
export async function startNats(guarded: Guarded, folder: string, logs: string): Promise<Nats> {
  const file = findNatsServer();
  if (!file) throw new Error("no nats-server on this machine: run `npm run setup`, or start without --draft");
  const token = randomBytes(24).toString("hex");
  const ports = join(folder, "nats");
  mkdirSync(ports, { recursive: true });
  const config = join(folder, "nats.conf");
  let port = -1; // a free one
  let isStopped = false;
  const start = () => {
    // The token is in a file, not on the command line that everybody can read.
    const lines = [
      `host: "127.0.0.1"`,
      `port: ${port}`,
      `authorization { token: "${token}" }`,
      `ports_file_dir: "${ports}"`,
    ];
    writeFileSync(config, `${lines.join("\n")}\nmax_payload: 1MB\n`, { mode: 0o600 });
    guarded.forget(ID);
    const env = { PATH: process.env.PATH ?? "" };
    guarded.spawn({
      id: ID,
      command: file,
      args: ["-c", config],
      env,
      log: join(logs, "nats.log"),
      watchesStdin: false,
    });
  };
  start();
  const deadline = Date.now() + START_TIMEOUT_MS;
  while (port < 0) {
    const said = readdirSync(ports).find((name) => name.endsWith(".ports"));
    const text = said ? readFileSync(join(ports, said), "utf8") : "";
    port = Number(/nats:\/\/127\.0\.0\.1:(\d+)/.exec(text)?.[1] ?? -1);
    if (port >= 0) break;
    const seen = guarded.children.get(ID);
    if (seen?.state === "exited") throw new Error(`nats-server ended at once: ${seen.detail}`);
    if (Date.now() > deadline)
      throw new Error(`nats-server told no port within ${START_TIMEOUT_MS} ms; see ${join(logs, "nats.log")}`);
    await new Promise((wake) => setTimeout(wake, POLL_MS));
  }
  guarded.on("change", (id) => {
    if (id !== ID || isStopped || guarded.children.get(ID)?.state !== "exited" || !existsSync(folder)) return;
    setTimeout(() => {
      if (!isStopped) start();
    }, RESTART_WAIT_MS).unref();
  });
  return {
    url: `nats://127.0.0.1:${port}`,
    token,
    stop() {
      isStopped = true;
      guarded.stop(ID, 1_000);
    },
  };
}

// Runs the `muster` program as a process of its own and keeps what it says.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";

const MAIN = join(import.meta.dirname, "../../../controller/cli/main.ts");
const OUTPUT_BYTES_MAX = 64 * 1024 * 1024;

export type Said = { code: number | null; out: string; err: string };

export async function muster(...args: string[]): Promise<Said> {
  const child = spawn(process.execPath, [MAIN, ...args], { stdio: ["ignore", "pipe", "pipe"] });
  const said = { out: "", err: "" };
  child.stdout.on("data", (chunk) => {
    if (said.out.length < OUTPUT_BYTES_MAX) said.out += chunk;
  });
  child.stderr.on("data", (chunk) => {
    if (said.err.length < OUTPUT_BYTES_MAX) said.err += chunk;
  });
  await once(child, "close");
  return { code: child.exitCode, ...said };
}

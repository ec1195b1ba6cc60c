// `npm run bench -- NAME [arguments]`: starts a bench with the checkout's own Node. Plain JavaScript, because npm may run on an
// older one. Each bench says in its header what it asks, how it measures and what it does not measure.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const ROOT = resolve(HERE, "../..");
const NODE = join(ROOT, "node_modules", `node-linux-${process.arch}`, "bin", "node");
const ADDON = resolve(process.env.MUSTER_ADDON || join(ROOT, "native/build/muster.node"));

/** Name, and what it answers. */
const BENCHES = {
  autoscale: "what the autoscaler saves and costs on recorded traffic, in virtual time",
  cluster: "what a large cluster costs the controller: time to place, reconciles, calls, memory (pods are fake)",
  overhead: "what HTTP, gRPC, scheduling and detokenising cost: tokens/s through the gateway against the bare engines",
  speculation: "what a draft in another process brings one stream: tokens per target step, tokens/s with and without",
};

function stop(text) {
  console.error(`bench: ${text}`);
  process.exit(2);
}

const [name, ...args] = process.argv.slice(2);
if (!Object.hasOwn(BENCHES, name ?? "")) {
  const known = Object.entries(BENCHES).map(([bench, what]) => `  npm run bench -- ${bench}    ${what}`);
  stop(`${name === undefined ? "which one?" : `there is no bench ${name}`}\n${known.join("\n")}`);
}
if (![NODE, ADDON, join(ROOT, "proto/gen")].every((path) => existsSync(path))) {
  stop("this checkout is not set up yet; run `npm run setup` first");
}
const child = spawn(NODE, [join(HERE, `${name}.ts`), ...args], { stdio: "inherit" });
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => child.kill(signal));
child.on("error", (error) => stop(`${NODE}: ${error.message}`));
child.on("close", (code) => process.exit(code ?? 1));

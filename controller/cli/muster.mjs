#!/usr/bin/env node
// The `muster` command. Plain JavaScript so that any Node >= 20 can start it; re-executes the checkout's own Node, which runs
// the TypeScript sources as they are.
import { spawn } from "node:child_process";
import { existsSync, realpathSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), "../..");
const node = join(ROOT, "node_modules", `node-linux-${process.arch}`, "bin", "node");

if (!existsSync(node) || !existsSync(join(ROOT, "proto/gen")) || !existsSync(join(ROOT, "native/build/muster.node"))) {
  console.error("muster: this checkout is not set up yet; run `npm run setup` first");
  process.exit(1);
}

// npm and npx put a shell between themselves and us, which dies without a word when they are told to end: whoever stops or
// kills `npm start` means us, and is heard by our parent's number changing.
const PARENT_CHECK_MS = 500;
if (process.env.npm_lifecycle_event) {
  const parent = process.ppid;
  const watch = setInterval(() => {
    if (process.ppid === parent) return;
    clearInterval(watch);
    process.kill(process.pid, "SIGTERM");
  }, PARENT_CHECK_MS);
  watch.unref();
}

// Real paths: where node_modules is a link, the other test would start itself again for ever.
if (realpathSync(process.execPath) === realpathSync(node)) {
  await import("./main.ts");
} else {
  // The extra pipe is a lifeline: when this process dies without a word, the child sees the end of it and stops by itself.
  const child = spawn(node, [fileURLToPath(import.meta.url), ...process.argv.slice(2)], {
    stdio: ["inherit", "inherit", "inherit", "pipe"],
    env: { ...process.env, MUSTER_LIFELINE_FD: "3" },
  });
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"]) process.on(signal, () => child.kill(signal));
  child.on("error", (error) => {
    console.error(`muster: ${node}: ${error.message}`);
    process.exit(1);
  });
  child.on("close", (code, signal) => {
    if (!signal) process.exit(code ?? 1);
    process.removeAllListeners(signal);
    process.kill(process.pid, signal);
  });
}

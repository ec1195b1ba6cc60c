// N2, N3: how a process with an engine ends.
import { execFile } from "node:child_process";
import { promisify } from "node:util";
import { expect, test } from "vitest";

const run = promisify(execFile);
const child = new URL("./exit-child.ts", import.meta.url).pathname;
const start = (how: string, env: NodeJS.ProcessEnv = {}) =>
  run(process.execPath, [child, how], { timeout: 30_000, env: { ...process.env, ...env } });

test("N2: an open engine that computes nothing does not keep its process alive", async () => {
  expect((await start("idle")).stdout).toBe("idle");
});

test("N3: a process may exit in the middle of a step", async () => {
  expect((await start("exit")).stderr).toBe("");
});

test("a missing addon says how to get it", async () => {
  await expect(start("idle", { MUSTER_ADDON: "/nowhere/muster.node" })).rejects.toThrow(
    'the native engine /nowhere/muster.node cannot be loaded: run "npm run setup"',
  );
});

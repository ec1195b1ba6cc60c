import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { Guarded } from "../../../controller/local/guarded.ts";
import { isAlive, until } from "../../until.ts";

const GUARDED = join(import.meta.dirname, "../../../controller/local/guarded.ts");
const open: Guarded[] = [];
const parents: ChildProcess[] = [];

afterEach(async () => {
  for (const guarded of open.splice(0)) await guarded.close();
  for (const parent of parents.splice(0)) parent.kill("SIGKILL");
});

const runFolder = () => mkdtempSync(join(tmpdir(), "guard-"));
const env = { PATH: process.env.PATH ?? "" };

async function start(folder: string): Promise<Guarded> {
  const guarded = await Guarded.start(folder);
  open.push(guarded);
  return guarded;
}

/** A child that ignores SIGTERM and its standard input: only SIGKILL ends it. */
const stubborn = {
  command: "bash",
  args: ["-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"],
  env,
  watchesStdin: true,
};

describe("guard", () => {
  test("a child's state, lines and last words are seen", async () => {
    const folder = runFolder();
    const guarded = await start(folder);
    const lines: string[] = [];
    guarded.on("line", (id, line) => lines.push(`${id}: ${line}`));
    const script = "echo hello; echo 'port 8080 is taken' >&2; exit 3";
    guarded.spawn({
      id: "a",
      command: "bash",
      args: ["-c", script],
      env,
      log: join(folder, "a.log"),
      watchesStdin: true,
    });
    await guarded.ended("a", AbortSignal.timeout(10_000));
    expect(guarded.children.get("a")).toMatchObject({ state: "exited", code: 3, detail: "port 8080 is taken" });
    expect(lines).toEqual(["a: hello"]);
    expect(readFileSync(join(folder, "a.log"), "utf8")).toContain("hello");
  });

  test("a program that does not exist is an exit with its reason, not a crash", async () => {
    const folder = runFolder();
    const guarded = await start(folder);
    guarded.spawn({
      id: "a",
      command: "/no/such/program",
      args: [],
      env,
      log: join(folder, "a.log"),
      watchesStdin: true,
    });
    await guarded.ended("a", AbortSignal.timeout(10_000));
    expect(guarded.children.get("a")).toMatchObject({ state: "exited", detail: expect.stringContaining("ENOENT") });
  });

  test("G2: stop ends with SIGKILL what does not end by itself", async () => {
    const folder = runFolder();
    const guarded = await start(folder);
    guarded.spawn({ id: "a", ...stubborn, log: join(folder, "a.log") });
    await once(guarded, "line", { signal: AbortSignal.timeout(10_000) });
    guarded.stop("a", 100);
    await guarded.ended("a", AbortSignal.timeout(10_000));
    expect(guarded.children.get("a")).toMatchObject({ state: "exited", signal: "SIGKILL" });
  });

  test("close ends every child and removes the run folder", async () => {
    const folder = runFolder();
    const guarded = await start(folder);
    guarded.spawn({ id: "a", command: "sleep", args: ["1000"], env, log: join(folder, "a.log"), watchesStdin: false });
    await until(() => guarded.children.get("a")?.state === "running", "the child runs");
    const seen = guarded.children.get("a");
    await guarded.close();
    expect(existsSync(folder)).toBe(false);
    expect(seen?.state === "running" && isAlive(seen.pid)).toBe(false);
  });

  test.each(["SIGKILL", "SIGTERM"] as const)("G1: nothing stays behind after %s of the parent", async (signal) => {
    const folder = runFolder();
    const script = join(mkdtempSync(join(tmpdir(), "parent-")), "parent.ts");
    const children = [
      { id: "stubborn", ...stubborn, log: join(folder, "a.log") },
      { id: "sleeper", command: "sleep", args: ["1000"], env, log: join(folder, "b.log"), watchesStdin: false },
    ];
    writeFileSync(
      script,
      `import { Guarded } from ${JSON.stringify(GUARDED)};
       const guarded = await Guarded.start(${JSON.stringify(folder)});
       guarded.on("change", () => {
         const seen = [...guarded.children.values()];
         if (seen.length === 2 && seen.every((s) => s.state === "running")) console.log(JSON.stringify(seen.map((s) => s.pid)));
       });
       for (const child of ${JSON.stringify(children)}) guarded.spawn(child);`,
    );
    const parent = spawn(process.execPath, [script], { stdio: ["ignore", "pipe", "inherit"] });
    parents.push(parent);
    const [line] = await once(parent.stdout, "data", { signal: AbortSignal.timeout(15_000) });
    const pids: number[] = JSON.parse(String(line).trim());
    expect(pids.every(isAlive)).toBe(true);
    parent.kill(signal);
    await until(() => !pids.some(isAlive) && !existsSync(folder), "children and run folder are gone");
  });
});

import { execFile } from "node:child_process";
import { expect, test } from "vitest";
import { fixtureUrl } from "./fixtures.ts";

const COMMAND = new URL("../../../controller/cli/plan.ts", import.meta.url).href;
const PROGRAM = `const { planCommand } = await import(${JSON.stringify(COMMAND)});
await planCommand().parseAsync(process.argv.slice(1), { from: "user" });`;

type Ran = { exit: number; out: string; err: string };

function plan(...args: string[]): Promise<Ran> {
  return new Promise((resolve) => {
    execFile(process.execPath, ["--input-type=module", "-e", PROGRAM, "--", ...args], (error, out, err) => {
      resolve({ exit: typeof error?.code === "number" ? error.code : 0, out, err });
    });
  });
}

test("a plan that fits: exit 0, the table on stdout, nothing on stderr", async () => {
  const { exit, out, err } = await plan("builtin://nano-maverick", "--gpus", "4xcpu", "--ranks", "4", "--ep", "2");
  expect({ exit, err }).toEqual({ exit: 0, err: "" });
  expect(out).toContain("tp4·ep2·etp2");
  expect(out).toContain("only-cut-of-pins");
});

test("nothing fits: exit 3 with the remedy; as JSON it is one line", async () => {
  const args = [fixtureUrl("llama-4-maverick"), "--gpus", "4xH200", "--context", "32k", "--json"];
  const { exit, out } = await plan(...args);
  expect(exit).toBe(3);
  expect(out.trimEnd().split("\n")).toHaveLength(1);
  expect(JSON.parse(out).remedy.text).toBe("8xH200 fit");
});

test("usage and source errors: exit 2, the cause on stderr, nothing on stdout", async () => {
  for (const [args, cause] of [
    [["builtin://no-such-model"], "no-such-model"],
    [["builtin://nano-maverick", "--gpus", "8xB300"], "B300"],
    [["builtin://nano-maverick", "--ep", "0"], "--ep"],
    [["builtin://nano-maverick", "--context", "lots"], "--context"],
    [["builtin://nano-maverick", "--no-such-flag"], "--no-such-flag"],
    [[], "source"],
  ] as const) {
    const { exit, out, err } = await plan(...args);
    expect({ exit, out }, cause).toEqual({ exit: 2, out: "" });
    expect(err).toContain(cause);
  }
});

test("help names every option and the exit status", async () => {
  const { exit, out } = await plan("--help");
  expect(exit).toBe(0);
  for (const word of [
    "--gpus",
    "--context",
    "--concurrency",
    "--kv-bytes",
    "--ranks",
    "--nodes",
    "--tp",
    "--ep",
    "--etp",
    "--json",
  ])
    expect(out).toContain(word);
  expect(out).toContain("3 nothing fits");
});

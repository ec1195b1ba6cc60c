// `muster gateway` and `muster chat` as processes, the way scripts see them.
import { type ChildProcess, spawn } from "node:child_process";
import { createServer } from "node:net";
import { afterEach, expect, test } from "vitest";
import { type Bed, MODEL, makeBed, until } from "./bed.ts";
import { chatPromptIds, expectedAnswer } from "./scripted-leader.ts";
import { ask } from "./sse-client.ts";

const MAIN = new URL("../../../controller/cli/main.ts", import.meta.url).pathname;

let bed: Bed | undefined;
const children: ChildProcess[] = [];
afterEach(async () => {
  for (const child of children.splice(0)) child.kill("SIGKILL");
  await bed?.stop();
  bed = undefined;
});

type Run = { child: ChildProcess; out: () => string; err: () => string; code: Promise<number | null> };

function muster(...args: string[]): Run {
  const env = { ...process.env, NO_COLOR: "1", MUSTER_API_KEY: "" };
  const child = spawn(process.execPath, [MAIN, ...args], { env, stdio: "pipe" });
  children.push(child);
  let out = "";
  let err = "";
  child.stdout.on("data", (data) => (out += data));
  child.stderr.on("data", (data) => (err += data));
  return { child, out: () => out, err: () => err, code: new Promise((resolve) => child.on("close", resolve)) };
}

const contentOf = (turns: [role: string, content: string][], maxTokens: number): string => {
  const prompt = chatPromptIds(turns.map(([role, content]) => ({ role, content })));
  return expectedAnswer({ prompt, seedLow: 5n, seedHigh: 0n }, { stop: [], maxTokens, ignoreEos: false }).text;
};

test("gateway prints one JSON line, serves, drains on SIGTERM and exits 0", async () => {
  bed = await makeBed();
  const run = muster("gateway", "--control", bed.controller.address, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0");
  await until(() => run.out().includes("\n"));
  const { http, grpc }: { http: string; grpc: string } = JSON.parse(run.out());
  expect(grpc).toMatch(/^127\.0\.0\.1:\d+$/);
  await until(async () => (await ask(http, "/readyz")).status === 200);
  expect((await ask(http, "/v1/completions", { model: MODEL, prompt: "a" })).status).toBe(200);
  run.child.kill("SIGTERM");
  expect(await run.code).toBe(0);
  expect(run.err()).toBe("");
});

test("gateway: a wrong call is exit 2 with a message, a taken port exit 1", async () => {
  const exposed = muster("gateway", "--control", "127.0.0.1:1", "--http", "0.0.0.0:0");
  expect(await exposed.code).toBe(2);
  expect(exposed.err()).toMatch(/MUSTER_API_KEY/);
  const missing = muster("gateway");
  expect(await missing.code).toBe(2);
  expect(missing.err()).toMatch(/--control/);
  const both = muster("gateway", "--control", "127.0.0.1:1", "--kubernetes");
  expect(await both.code).toBe(2);
  expect(both.err()).toMatch(/--control.*not both/);
  const half = muster("gateway", "--control", "127.0.0.1:1", "--identity", "/nowhere");
  expect(await half.code).toBe(2);
  expect(half.err()).toMatch(/--enrol/);
  const odd = muster("gateway", "--control", "x", "--hold-seconds", "soon");
  expect(await odd.code).toBe(2);

  const other = createServer();
  await new Promise<void>((resolve) => other.listen(0, "127.0.0.1", resolve));
  const address = other.address();
  const port = typeof address === "object" ? address?.port : 0;
  const taken = muster("gateway", "--control", "127.0.0.1:1", "--http", `127.0.0.1:${port}`, "--grpc", "127.0.0.1:0");
  expect(await taken.code).toBe(1);
  expect(taken.err()).toContain(`port ${port} on 127.0.0.1 is taken`);
  expect(taken.out()).toBe("");
  const takenGrpc = muster(
    "gateway",
    "--control",
    "127.0.0.1:1",
    "--http",
    "127.0.0.1:0",
    "--grpc",
    `127.0.0.1:${port}`,
  );
  expect(await takenGrpc.code).toBe(1);
  expect(takenGrpc.err().split("\n")).toEqual([expect.stringMatching(/is taken.*--grpc/), ""]);
  other.close();
});

test("gateway writes its line to another descriptor where asked", async () => {
  bed = await makeBed();
  const args = ["gateway", "--control", bed.controller.address, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
  const child = spawn(process.execPath, [MAIN, ...args, "--ready-fd", "3"], {
    stdio: ["ignore", "pipe", "pipe", "pipe"],
  });
  children.push(child);
  let line = "";
  let out = "";
  child.stdout?.on("data", (data) => (out += data));
  child.stdio[3]?.on("data", (data) => (line += data));
  await until(() => line.endsWith("\n"));
  const { http }: { http: string } = JSON.parse(line);
  expect((await ask(http, "/healthz")).status).toBe(200);
  expect(out).toBe("");
});

test("chat with a pipe: one turn per line, answers on stdout, figures on stderr", async () => {
  bed = await makeBed();
  const run = muster("chat", "--url", bed.http, "--seed", "5", "--max-tokens", "12", "--system", "be brief");
  run.child.stdin?.end("hello\nand then?\n/reset\nhello\n");
  expect(await run.code).toBe(0);
  const first = contentOf(
    [
      ["system", "be brief"],
      ["user", "hello"],
    ],
    12,
  );
  const second = contentOf(
    [
      ["system", "be brief"],
      ["user", "hello"],
      ["assistant", first],
      ["user", "and then?"],
    ],
    12,
  );
  expect(run.out()).toBe(`${first}\n${second}\n${first}\n`);
  expect(run.err().match(/12 tokens, [\d.]+ tok\/s, first after \d+ ms, no drafts/g)).toHaveLength(3);
});

test("chat shows accepted drafts and obeys /quit", async () => {
  bed = await makeBed({ leader: { tokensPerStep: 4 } });
  const run = muster("chat", "--url", bed.http, "--model", "nano-alias", "--max-tokens", "12", "--seed", "5");
  run.child.stdin?.end("hello\n/quit\nnever\n");
  expect(await run.code).toBe(0);
  expect(run.out()).toBe(`${contentOf([["user", "hello"]], 12)}\n`);
  expect(run.err()).toMatch(/drafts \d+\/\d+ accepted in \d+ steps/);
});

test("chat: errors are readable and exit 1", async () => {
  bed = await makeBed();
  const nobody = muster("chat", "--url", "http://127.0.0.1:1");
  nobody.child.stdin?.end("hello\n");
  expect(await nobody.code).toBe(1);
  expect(nobody.err()).toMatch(/nothing answers at http:\/\/127\.0\.0\.1:1/);
  const unknown = muster("chat", "--url", bed.http, "--model", "other");
  unknown.child.stdin?.end("hello\n");
  expect(await unknown.code).toBe(1);
  expect(unknown.err()).toMatch(/does not exist; served here: nano/);
});

test("chat: SIGINT stops the answer first, then the program", async () => {
  bed = await makeBed({ leader: { stepMs: 20 } });
  const [leader] = bed.leaders;
  const run = muster("chat", "--url", bed.http);
  run.child.stdin?.write("hello\n");
  await until(() => run.out().length > 10);
  run.child.kill("SIGINT");
  await until(() => leader?.running === 0);
  await until(() => run.err().includes("stopped"));
  expect(leader?.cancels).toHaveLength(1);
  run.child.kill("SIGINT");
  expect(await run.code).toBe(0);
});

// What `helm test` runs, against a server that answers as a gateway does: it must fail where a user's request would.
import { spawn } from "node:child_process";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { join } from "node:path";
import { expect, test } from "vitest";
import { z } from "zod";

const PROGRAM = join(import.meta.dirname, "../../charts/muster/files/ask.mjs");
type Answer = { status: number; body: unknown };
const listed = (...ids: string[]): Answer => ({ status: 200, body: { data: ids.map((id) => ({ id })) } });
const completed = (text: string): Answer => ({ status: 200, body: { choices: [{ text }] } });

/** Runs it against `answers` by path; resolves with its exit code, what it said and what it asked. */
async function run(answers: Record<string, Answer>): Promise<{ code: number | null; said: string; asked: string[] }> {
  const asked: string[] = [];
  const answer = (request: IncomingMessage, response: ServerResponse) => {
    asked.push(`${request.method} ${request.url} ${request.headers.authorization}`);
    const { status, body } = answers[request.url ?? ""] ?? { status: 404, body: { error: "no such path" } };
    response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
  };
  const server = createServer(answer);
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  const { port } = z.object({ port: z.number() }).parse(server.address());
  try {
    const env = { MUSTER_URL: `http://127.0.0.1:${port}`, MUSTER_API_KEY: "sesame" };
    const child = spawn(process.execPath, [PROGRAM], { env, stdio: ["ignore", "pipe", "pipe"] });
    let said = "";
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (chunk: Buffer) => (said += chunk.toString()));
    const code = await new Promise<number | null>((done) => child.on("close", done));
    return { code, said, asked };
  } finally {
    server.close();
  }
}

test("lists the models, with the key, and completes a text with the first", async () => {
  const { code, said, asked } = await run({ "/v1/models": listed("nano"), "/v1/completions": completed(" hello") });
  expect(said).toContain('nano: " hello"');
  expect(asked).toEqual(["GET /v1/models Bearer sesame", "POST /v1/completions Bearer sesame"]);
  expect(code).toBe(0);
});

test("an installation without a model passes and says what to do", async () => {
  const { code, said } = await run({ "/v1/models": listed() });
  expect(code).toBe(0);
  expect(said).toContain("apply a ModelDeployment");
});

test.each([
  ["a refused list", { "/v1/models": { status: 401, body: { error: "key" } } }, "/v1/models answers 401"],
  ["a failed completion", { "/v1/models": listed("nano") }, "/v1/completions answers 404"],
  ["an empty completion", { "/v1/models": listed("nano"), "/v1/completions": completed("") }, "without text"],
])("%s is a failure that is told", async (_what, answers, expected) => {
  const { code, said } = await run(answers);
  expect(said).toContain(expected);
  expect(code).toBe(1);
});

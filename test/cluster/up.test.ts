// `muster up` as a person meets it: real processes, real clients.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { credentials } from "@grpc/grpc-js";
import OpenAI from "openai";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { GenerateOptions, type GenerateResponse, InferenceClient } from "../../proto/gen/muster/v1/inference.ts";
import { muster } from "../controller/cli/run.ts";
import { isAlive, until } from "../until.ts";
import { Muster, processesOf, START } from "./muster.ts";

describe("npm start's command", () => {
  let up: Muster;
  beforeAll(async () => {
    up = await Muster.up(START);
  });
  afterAll(async () => {
    await up?.stop();
  });

  test("answers the OpenAI client, streamed and whole alike", async () => {
    const client = new OpenAI({ baseURL: `${up.ready.http}/v1`, apiKey: "none" });
    const request = { model: "nano-maverick", prompt: "Mr. Speaker, Mr. President,", max_tokens: 32, temperature: 0 };
    const whole = await client.completions.create(request);
    let streamed = "";
    for await (const chunk of await client.completions.create({ ...request, stream: true })) {
      streamed += chunk.choices[0]?.text ?? "";
    }
    expect(whole.choices[0]?.text.length).toBeGreaterThan(40);
    expect(streamed).toBe(whole.choices[0]?.text);
    expect(whole.usage?.completion_tokens).toBe(32);
    const chat = await client.chat.completions.create({
      model: "nano-maverick",
      messages: [{ role: "user", content: "My fellow citizens" }],
      max_completion_tokens: 8,
      seed: 7,
    });
    expect(chat.choices[0]?.message.content?.length).toBeGreaterThan(0);
  });

  test("answers a gRPC client with the same tokens", async () => {
    const client = new InferenceClient(up.ready.grpc, credentials.createInsecure());
    const options = GenerateOptions.create({ maxTokens: 16 });
    const stream = client.generate({
      model: "nano-maverick",
      input: { $case: "text", value: "The state of" },
      options,
    });
    const tokens: number[] = [];
    let text = "";
    for await (const message of stream) {
      const answer: GenerateResponse = message;
      tokens.push(...answer.tokens);
      text += answer.text;
    }
    client.close();
    expect(tokens).toHaveLength(16);
    const http = await up.complete({ prompt: "The state of", max_tokens: 16, temperature: 0 });
    expect(http.choices[0]?.text).toBe(text);
  });

  test("health, readiness, metrics, models and status are there", async () => {
    expect((await fetch(`${up.ready.http}/healthz`)).status).toBe(200);
    expect((await fetch(`${up.ready.http}/readyz`)).status).toBe(200);
    const metrics = await (await fetch(`${up.ready.http}/metrics`)).text();
    expect(metrics).toMatch(/^# TYPE /m);
    const models: { data: { id: string }[] } = JSON.parse(await (await fetch(`${up.ready.http}/v1/models`)).text());
    expect(models.data.map((model) => model.id)).toContain("nano-maverick");
    const status = await muster("status", "--json");
    const mine = status.out.split("\n").find((line) => line.includes(up.ready.run));
    expect(JSON.parse(mine ?? "{}").models[0]).toMatchObject({
      name: "nano-maverick",
      phase: "Serving",
      readyRanks: 2,
      world: 2,
    });
  });

  test("the draft is of use, and turning it off for a request changes no token", async () => {
    const request = { prompt: "We have made progress", max_tokens: 64, temperature: 0.8, seed: 5 };
    let on = await up.complete(request);
    await until(async () => {
      on = await up.complete(request);
      return (on.usage.muster?.accepted ?? 0) > 0;
    }, "drafts arrive and are accepted");
    const off = await up.complete({ ...request, muster: { speculation: false, return_token_ids: true } });
    expect(on.choices[0]?.text).toBe(off.choices[0]?.text);
    expect(off.usage.muster?.drafted).toBe(0);
  });

  test("a taken port is named, with what to do, and leaves nothing behind", async () => {
    const port = new URL(up.ready.http).port;
    const second = await muster("up", "builtin://nano-draft", "--http", `127.0.0.1:${port}`, "--grpc", "127.0.0.1:0");
    expect(second.code).toBe(1);
    expect(second.err).toContain(port);
    expect(second.err).toMatch(/--http/);
  });

  test("Ctrl-C ends everything: exit code 0, no process, no run folder", async () => {
    const pids = up.processes().map(({ pid }) => pid);
    expect(pids.length).toBeGreaterThanOrEqual(6); // guard, nats, two workers, draft, gateway
    expect(await up.stop()).toBe(0);
    expect(pids.filter(isAlive)).toEqual([]);
    expect(existsSync(up.ready.run)).toBe(false);
  });
});

describe("muster up", () => {
  test("leaves nothing behind after kill -9 of the command", async () => {
    const up = await Muster.up(START);
    const pids = up.processes().map(({ pid }) => pid);
    up.process.kill("SIGKILL");
    await until(() => !pids.some(isAlive), "all its processes have ended");
    await until(() => !existsSync(up.ready.run), "its run folder is gone");
    expect(processesOf(up.ready.run)).toEqual([]);
  });

  test.each(["SIGTERM", "SIGKILL"] as const)("%s of npm alone ends what `npm start` has started", async (signal) => {
    const args = ["start", "--silent", "--", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--json"];
    const npm = spawn("npm", args, { cwd: join(import.meta.dirname, "../.."), stdio: ["ignore", "pipe", "ignore"] });
    const [line] = await once(npm.stdout, "data", { signal: AbortSignal.timeout(60_000) });
    const { run }: { run: string } = JSON.parse(String(line));
    const pids = processesOf(run).map(({ pid }) => pid);
    expect(pids.length).toBeGreaterThanOrEqual(6);
    npm.kill(signal);
    await until(() => !pids.some(isAlive) && !existsSync(run), "its processes and its run folder are gone");
  });

  test("refuses to listen beyond loopback without a key", async () => {
    const { code, err } = await muster("up", "builtin://nano-draft", "--http", "0.0.0.0:0", "--grpc", "127.0.0.1:0");
    expect(code).toBe(2);
    expect(err).toMatch(/--api-key/);
  });

  test("refuses a plan-only family by name, a wrong source, and a cut that does not fit with the nearest that does", async () => {
    const config = join(import.meta.dirname, "../fixtures/configs/deepseek-v3");
    const planOnly = await muster("up", `file://${config}`);
    expect(planOnly.code).toBe(3);
    expect(planOnly.err).toMatch(/deepseek/i);
    const missing = await muster("up", "file:///no/such/model");
    expect(missing.code).toBe(2);
    expect(missing.err).toContain("/no/such/model");
    const odd = await muster("up", "builtin://nano-maverick", "--ranks", "3");
    expect(odd.code).toBe(3);
    expect(odd.err).toMatch(/8 (query )?heads|heads/);
  });

  test("with an API key every route but health asks for it", async () => {
    const up = await Muster.up(["builtin://nano-draft", "--api-key", "sesame"]);
    try {
      expect((await fetch(`${up.ready.http}/healthz`)).status).toBe(200);
      expect((await fetch(`${up.ready.http}/v1/models`)).status).toBe(401);
      const known = await fetch(`${up.ready.http}/v1/models`, { headers: { authorization: "Bearer sesame" } });
      expect(known.status).toBe(200);
    } finally {
      await up.stop();
    }
  });

  test("says which port is taken when somebody else has it", async () => {
    const other = createServer().listen(0, "127.0.0.1");
    await once(other, "listening");
    const address = other.address();
    const port = typeof address === "object" ? address?.port : 0;
    const { code, err } = await muster(
      "up",
      "builtin://nano-draft",
      "--http",
      "127.0.0.1:0",
      "--grpc",
      `127.0.0.1:${port}`,
    );
    other.close();
    expect(code).toBe(1);
    expect(err).toContain(String(port));
    expect(err).toMatch(/--grpc/);
  });
});

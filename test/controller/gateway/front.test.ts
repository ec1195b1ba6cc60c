// What operators rely on: health, metrics, the key, exposure, ports, draining, clients that do not read.
import { connect, createServer, type Socket } from "node:net";
import { credentials, loadPackageDefinition } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { afterEach, expect, test } from "vitest";
import { ControlFeed } from "../../../controller/gateway/feed.ts";
import { parseListen, runGateway } from "../../../controller/gateway/main.ts";
import { type Bed, type BedOptions, MODEL, makeBed, servedModel, until } from "./bed.ts";
import { ask, chunksOf, openSse } from "./sse-client.ts";

let bed: Bed | undefined;
const make = async (options: BedOptions = {}): Promise<Bed> => {
  bed = await makeBed(options);
  return bed;
};
afterEach(async () => {
  await bed?.stop();
  bed = undefined;
});

const nobody = () => new ControlFeed("127.0.0.1:1");
const COMPLETIONS = "/v1/completions";
const body = (more: object = {}) => ({
  model: MODEL,
  prompt: "ab",
  max_tokens: 20,
  ignore_eos: true,
  seed: 1,
  ...more,
});

test("health is the process, readiness is a model that serves", async () => {
  const { http, controller } = await make();
  expect((await ask(http, "/healthz")).status).toBe(200);
  expect((await ask(http, "/readyz")).status).toBe(200);
  controller.tell([servedModel(undefined)]);
  await until(async () => (await ask(http, "/readyz")).status === 503);
  expect((await ask(http, "/healthz")).status).toBe(200);
});

test("metrics are Prometheus text of requests, tokens, latencies and the leader's load", async () => {
  const { http } = await make();
  await ask(http, COMPLETIONS, body());
  await ask(http, COMPLETIONS, body({ tools: [] }));
  await chunksOf(await openSse(http, COMPLETIONS, body({ stream: true, max_tokens: 200 })));
  await ask(http, "/nowhere");
  let text = "";
  await until(async () => {
    text = (await ask(http, "/metrics")).body;
    return text.includes('route="unknown"');
  });
  expect(text).toContain('muster_gateway_requests_total{route="/v1/completions",status="200"');
  expect(text).toContain('muster_gateway_requests_total{route="/v1/completions",status="400"');
  expect(text).toMatch(/muster_gateway_tokens_total\{model="nano",direction="out".*\} 220/);
  expect(text).toMatch(/muster_gateway_tokens_total\{model="nano",direction="in".*\} 6/);
  expect(text).toMatch(/muster_gateway_time_to_first_token_seconds_count\{model="nano".*\} 2/);
  expect(text).toMatch(/muster_gateway_inter_token_seconds_count\{model="nano".*\} \d+/);
  expect(text).toMatch(/^muster_gateway_held_streams(\{.*\})? 0/m);
  expect(text).toMatch(/^muster_gateway_in_flight(\{.*\})? 0/m);
  expect(text).toMatch(/^muster_gateway_controller_connected(\{.*\})? 1/m);
  expect(text).toMatch(/muster_leader_kv_blocks_free\{model="nano".*\} 7/);
});

test("the API key guards /v1, not probes; no header says more than that it is wrong", async () => {
  const { http } = await make({ apiKey: "secret" });
  for (const authorization of [undefined, "Bearer wrong", "Bearer", "Basic secret", "secret"]) {
    const answer = await ask(http, COMPLETIONS, body(), authorization ? { headers: { authorization } } : {});
    expect(answer.status).toBe(401);
    expect(answer.body.error).toMatchObject({ type: "invalid_request_error", code: "invalid_api_key" });
  }
  expect((await ask(http, "/v1/models")).status).toBe(401);
  expect((await ask(http, "/v1/nowhere")).status).toBe(401);
  const allowed = await ask(http, COMPLETIONS, body(), { headers: { authorization: "Bearer secret" } });
  expect(allowed.status).toBe(200);
  for (const path of ["/healthz", "/readyz", "/metrics"]) expect((await ask(http, path)).status).toBe(200);
});

test("a request id comes back, or one is made", async () => {
  const { http } = await make();
  const given = await ask(http, "/healthz", undefined, { headers: { "x-request-id": "abc-1" } });
  expect(given.headers.get("x-request-id")).toBe("abc-1");
  const odd = await ask(http, "/healthz", undefined, { headers: { "x-request-id": "a b\tc" } });
  expect(odd.headers.get("x-request-id")).toMatch(/^req_[0-9a-f]{24}$/);
  const stream = await openSse(http, COMPLETIONS, body({ stream: true }));
  expect(stream.headers.get("x-request-id")).toMatch(/^req_/);
  await stream.text();
});

test("listening beyond loopback without a key is refused, whatever the address", async () => {
  const never = new AbortController().signal;
  for (const host of ["0.0.0.0", "[::]", "192.168.0.1", "example.org"]) {
    const options = { feed: nobody(), http: `${host}:0`, grpc: "127.0.0.1:0" };
    await expect(runGateway(options, never)).rejects.toMatchObject({ fault: { field: "--http" }, message: /api-key/ });
  }
  const grpc = { feed: nobody(), http: "127.0.0.1:0", grpc: "0.0.0.0:0" };
  await expect(runGateway(grpc, never)).rejects.toMatchObject({ fault: { field: "--grpc" } });
});

test("an address that is none is refused by the option's name", () => {
  for (const value of ["8080", "localhost", "127.0.0.1:99999", "::1:80", ""]) {
    expect(() => parseListen("--http", value)).toThrow(/--http.*HOST:PORT/);
  }
  expect(parseListen("--http", "[::1]:80")).toEqual({ host: "::1", port: 80 });
});

test("a taken port says which and what to do", async () => {
  const other = createServer();
  await new Promise<void>((resolve) => other.listen(0, "127.0.0.1", resolve));
  const address = other.address();
  const port = typeof address === "object" ? address?.port : 0;
  const never = new AbortController().signal;
  for (const option of ["http", "grpc"]) {
    const options = { feed: nobody(), http: "127.0.0.1:0", grpc: "127.0.0.1:0", [option]: `127.0.0.1:${port}` };
    await expect(runGateway(options, never)).rejects.toThrow(
      new RegExp(`port ${port} on 127.0.0.1 is taken.*--${option} 127.0.0.1:PORT`),
    );
  }
  other.close();
});

test("draining: running answers finish, new ones are refused, readiness is off, then it ends", async () => {
  const made = await make({ leader: { stepMs: 20 } });
  const stream = await openSse(made.http, COMPLETIONS, body({ stream: true, stream_options: { include_usage: true } }));
  // A connection from before: the listening socket takes no new ones.
  const socket = raw(made.http);
  await new Promise<void>((resolve) => socket.once("connect", resolve));
  const answers = readAll(socket);
  socket.write(`GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n`);
  await until(() => answers().includes('"ok"'));
  const stopped = made.stop();
  socket.write(post(body(), "1.1"));
  await until(() => answers().includes("shutting_down") || socket.destroyed);
  const got = await chunksOf(stream);
  expect(got.isDone).toBe(true);
  expect(got.usage.completion_tokens).toBe(20);
  await stopped;
  bed = undefined;
  await expect(fetch(`${made.http}/healthz`)).rejects.toThrow();
});

test("draining: what does not finish in time ends with an error event", async () => {
  const made = await make({ leader: { stepMs: 50 }, limits: { drainMs: 200 } });
  const stream = await openSse(made.http, COMPLETIONS, body({ stream: true, max_tokens: 1000 }));
  const started = performance.now();
  const stopped = made.stop();
  const got = await chunksOf(stream);
  expect(got.error).toMatchObject({ code: "shutting_down" });
  expect(got.isDone).toBe(false);
  await stopped;
  bed = undefined;
  expect(performance.now() - started).toBeLessThan(3_000);
});

test("C2: a client that does not read is dropped and its sequence cancelled", async () => {
  const { http, leaders } = await make({ limits: { stallMs: 300, socketBytesMax: 16 * 1024 * 1024 } });
  const socket = unread(http, body({ stream: true, max_tokens: 4000, n: 16, logprobs: 20 }));
  const [leader] = leaders;
  await until(() => leader?.running === 16);
  await until(() => leader?.running === 0, 30_000);
  expect(leader?.cancels.length).toBeGreaterThan(0);
  await until(async () => (await ask(http, "/metrics")).body.includes("muster_gateway_clients_dropped_total 1"));
  socket.destroy();
});

test("C2: unread bytes are bounded", async () => {
  const { http, leaders } = await make({ limits: { stallMs: 60_000, socketBytesMax: 64 * 1024 } });
  const socket = unread(http, body({ stream: true, max_tokens: 4000, n: 16, logprobs: 20 }));
  const [leader] = leaders;
  await until(() => leader?.running === 16);
  await until(() => leader?.running === 0, 30_000);
  await until(async () => (await ask(http, "/metrics")).body.includes("muster_gateway_clients_dropped_total 1"));
  socket.destroy();
});

test("C3: an HTTP/1.0 client gets the events without chunk framing", async () => {
  const { http } = await make();
  const socket = raw(http);
  const got = readAll(socket);
  socket.write(post(body({ stream: true }), "1.0"));
  await until(() => socket.readableEnded);
  const [head, ...events] = got().split("\r\n\r\n");
  expect(head).not.toMatch(/transfer-encoding/i);
  expect(events.join("")).toMatch(/^data: \{/);
  expect(events.join("").split("\n\n").at(-2)).toBe("data: [DONE]");
});

test("C3: pipelined streams are answered in order, each with sound chunks", async () => {
  const { http } = await make({ leader: { stepMs: 5 } });
  const whole = await (await openSse(http, COMPLETIONS, body({ stream: true }))).text();
  const socket = raw(http);
  const got = readAll(socket);
  socket.write(post(body({ stream: true }), "1.1") + post(body({ stream: true }), "1.1"));
  await until(() => got().split("[DONE]").length === 3);
  const bodies = got()
    .split(/HTTP\/1\.1 200 OK\r\n/)
    .slice(1);
  expect(bodies.map((each) => textOf(unchunk(each)))).toEqual([textOf(whole), textOf(whole)]);
  socket.destroy();
});

test("gRPC reflection lists and describes the service", async () => {
  const { grpc } = await make();
  const proto = new URL(
    "../../../node_modules/@grpc/reflection/build/proto/grpc/reflection/v1/reflection.proto",
    import.meta.url,
  ).pathname;
  const definition = loadSync(proto, { oneofs: true });
  const Reflection = findClient(loadPackageDefinition(definition));
  const client = new Reflection(grpc, credentials.createInsecure());
  const call = client.ServerReflectionInfo?.();
  const answers: string[] = [];
  call.on("data", (answer: object) => answers.push(JSON.stringify(answer)));
  call.write({ listServices: "*" });
  call.write({ fileContainingSymbol: "muster.v1.Inference" });
  await until(() => answers.length === 2);
  expect(answers[0]).toContain("muster.v1.Inference");
  expect(answers[1]).toContain("fileDescriptorProto");
  call.end();
  client.close();
});

// biome-ignore lint/suspicious/noExplicitAny: what proto-loader makes has no static type
function findClient(root: any): any {
  return root.grpc.reflection.v1.ServerReflection;
}

function readAll(socket: Socket): () => string {
  let got = "";
  socket.on("data", (data) => {
    got += data.toString();
  });
  socket.on("error", () => {});
  return () => got;
}

function raw(url: string): Socket {
  const { hostname, port } = new URL(url);
  return connect(Number(port), hostname);
}

function post(request: object, version: "1.0" | "1.1"): string {
  const json = JSON.stringify(request);
  const head = [`POST ${COMPLETIONS} HTTP/${version}`, "Host: x", "Content-Type: application/json"];
  return [...head, `Content-Length: ${json.length}`, "", json].join("\r\n");
}

/** The body of a chunked answer; every size must be right. */
function unchunk(answer: string): string {
  let rest = Buffer.from(answer.slice(answer.indexOf("\r\n\r\n") + 4), "utf8");
  let joined = "";
  for (;;) {
    const line = rest.indexOf("\r\n");
    const size = Number.parseInt(rest.subarray(0, line).toString(), 16);
    if (!Number.isInteger(size)) throw new Error(`no chunk size: ${rest.subarray(0, 40)}`);
    if (size === 0) return joined;
    joined += rest.subarray(line + 2, line + 2 + size).toString();
    expect(rest.subarray(line + 2 + size, line + 4 + size).toString()).toBe("\r\n");
    rest = rest.subarray(line + 4 + size);
  }
}

const textOf = (events: string): string =>
  [...events.matchAll(/^data: (\{.*\})$/gm)].map(([, json = ""]) => JSON.parse(json).choices[0].text).join("");

/** Sends a request and never reads a byte of the answer. */
function unread(url: string, request: object): Socket {
  const socket = raw(url);
  socket.pause();
  socket.on("error", () => {});
  socket.write(post(request, "1.1"));
  return socket;
}

// The feed of a cluster over real sockets, in front of a real gateway: what it knows outlives the API server.
import { afterEach, expect, test } from "vitest";
import { runGateway } from "../../../../controller/gateway/main.ts";
import { systemClock } from "../../../../controller/kube/api/clock.ts";
import { modelDeployments, replicaGroups, shardPlans } from "../../../../controller/kube/api/resources.ts";
import { ServedModels } from "../../../../controller/kube/served/served-models.ts";
import type { WatchEvent } from "../../../../proto/gen/muster/v1/control.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { realTime } from "../../../sim/virtual-time.ts";
import { until } from "../../../until.ts";
import { ScriptedLeader } from "../../gateway/scripted-leader.ts";
import { ask } from "../../gateway/sse-client.ts";
import { clientOf, resources, serve } from "../beds.ts";
import { deployment, group, NS, plan } from "./served-objects.ts";

const { signal: never } = new AbortController();
const ends: (() => Promise<void> | void)[] = [];
afterEach(async () => {
  for (const end of ends.splice(0).toReversed()) await end();
});

async function cluster() {
  const server = new SimApiServer(realTime);
  const http = await serve(server, { resources });
  const feed = new ServedModels({ api: clientOf(http.url), clock: systemClock, random: Math.random });
  const stop = new AbortController();
  ends.push(() => stop.abort());
  return { server, http, feed, stop };
}

async function setStatus(server: SimApiServer, name: string, status: object): Promise<void> {
  const found = await server.get(replicaGroups, name, NS, never);
  if (found === undefined) throw new Error(`no group ${name}`);
  await server.replaceStatus(replicaGroups, { ...found, status }, never);
}

const serving = (leader: ScriptedLeader) => ({
  phase: "Serving",
  leader: leader.address,
  incarnation: Number(leader.options.incarnation),
  numericsId: "cpu-a",
});

test("M1, M3: nothing before all kinds are whole; then whole states, changes that come together told together", async () => {
  const { server, feed, stop } = await cluster();
  for (let index = 0; index < 50; index++) await server.create(modelDeployments, deployment(`m${index}`), never);
  const events: WatchEvent[] = [];
  const run = feed.run((event) => events.push(event), stop.signal);
  await until(() => events.length > 0, "the first state");
  expect(events[0]?.models).toHaveLength(50);
  for (let index = 50; index < 150; index++) await server.create(modelDeployments, deployment(`m${index}`), never);
  await until(() => events.at(-1)?.models.length === 150, "the last one is told");
  expect(events.length).toBeLessThan(50);
  for (const [index, { version }] of events.entries()) expect(version).toBe(BigInt(index + 1));
  stop.abort();
  await run;
});

test("W1, M2: the API server goes; requests go on, a leader's successor is found when it is back", async () => {
  const { server, http, feed } = await cluster();
  const first = new ScriptedLeader({ incarnation: 1n, revision: "rev-a" });
  await first.start();
  ends.push(() => first.kill());
  await server.create(shardPlans, plan("chat-p1", { revision: "rev-a", contextTokens: 4096 }), never);
  await server.create(modelDeployments, deployment("chat", {}, { planName: "chat-p1" }), never);
  await server.create(replicaGroups, group("chat-g0"), never);
  await setStatus(server, "chat-g0", serving(first));

  const stop = new AbortController();
  const listening = Promise.withResolvers<string>();
  const options = { feed, readyWithoutModels: true, http: "127.0.0.1:0", grpc: "127.0.0.1:0" };
  const ended = runGateway({ ...options, onListening: ({ http: url }) => listening.resolve(url) }, stop.signal);
  ends.push(async () => {
    stop.abort();
    await ended;
  });
  const url = await listening.promise;
  await until(async () => (await ask(url, "/readyz")).status === 200, "the gateway is ready");
  const body = { model: `${NS}/chat`, prompt: "ab", max_tokens: 4 };
  const before = await ask(url, "/v1/completions", body);
  expect(before.status).toBe(200);
  expect(before.body.model).toBe("chat");

  await http.close();
  await until(() => feed.trouble !== undefined, "the feed knows that it is without a server");
  expect((await ask(url, "/v1/completions", body)).status).toBe(200);
  expect((await ask(url, "/readyz")).status).toBe(200);
  const metrics: string = (await ask(url, "/metrics")).body;
  expect(metrics).toMatch(/^muster_gateway_controller_connected(\{[^}]*\})? 0/m);

  const second = new ScriptedLeader({ incarnation: 2n, revision: "rev-a" });
  await second.start();
  ends.push(() => second.kill());
  await setStatus(server, "chat-g0", serving(second));
  first.kill();
  await serve(server, { resources, port: http.port });
  expect((await ask(url, "/v1/completions", body)).status).toBe(200);
  expect(second.opens).toHaveLength(1);
});

test("not ready while the API server has not answered, and says why", async () => {
  const { http, feed } = await cluster();
  await http.close();
  const stop = new AbortController();
  const listening = Promise.withResolvers<string>();
  const options = { feed, readyWithoutModels: true, http: "127.0.0.1:0", grpc: "127.0.0.1:0" };
  const ended = runGateway({ ...options, onListening: ({ http: url }) => listening.resolve(url) }, stop.signal);
  const url = await listening.promise;
  await until(async () => /refused/i.test((await ask(url, "/readyz")).body.status), "it says why");
  expect((await ask(url, "/readyz")).status).toBe(503);
  const answer = await ask(url, "/v1/completions", { model: "chat", prompt: "ab" });
  expect(answer.body.error).toMatchObject({ code: "controller_unreachable" });
  expect((await ask(url, "/healthz")).status).toBe(200);
  stop.abort();
  await ended;
});

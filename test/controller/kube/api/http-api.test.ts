import { readFileSync } from "node:fs";
import type { ServerResponse } from "node:http";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { isConflict, isGone, type WatchLine } from "../../../../controller/kube/api/client.ts";
import { Connections } from "../../../../controller/kube/api/connections.ts";
import { configMaps, leases, modelDeployments, podGroups, pods } from "../../../../controller/kube/api/resources.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { realTime } from "../../../sim/virtual-time.ts";
import { until } from "../../../until.ts";
import { clientOf, failureOf, fixedCredentials, mapOf, NS, serve } from "../beds.ts";

const { signal } = new AbortController();
const pem = (name: string) => readFileSync(join(import.meta.dirname, "tls", name));

/** A server that answers every request the same. */
async function answering(answer: (response: ServerResponse, count: number) => void, options = {}) {
  let count = 0;
  const server = await serve(new SimApiServer(realTime), {
    intercept: (_, response) => {
      answer(response, (count += 1));
      return true;
    },
  });
  return { server, api: clientOf(server.url, options), count: () => count };
}

async function bed(options = {}) {
  const sim = new SimApiServer(realTime);
  const server = await serve(sim);
  return { sim, server, api: clientOf(server.url, options) };
}

describe("calls", () => {
  test("H1: every operation comes back field for field as the server has it", async () => {
    const { sim, api } = await bed();
    // Names that a serializer with a table of known fields renames or drops.
    const schema = {
      default: 1,
      enum: ["a"],
      not: {},
      "x-kubernetes-int-or-string": true,
      $ref: "#",
      nested: { default: null },
    };
    const made = await api.create(configMaps, mapOf("c", schema), signal);
    expect(made).toEqual(sim.objects(configMaps)[0]);
    expect(made.data).toEqual(schema);
    const applied = { ...mapOf("d", schema), extra: { enum: [1], default: "x" } };
    const options = { type: "apply", fieldManager: "m", force: true } as const;
    expect(await api.patch(configMaps, "d", NS, applied, options, signal)).toMatchObject({
      data: schema,
      extra: applied.extra,
    });
    expect(await api.get(configMaps, "c", NS, signal)).toEqual(made);
    expect(await api.get(configMaps, "none", NS, signal)).toBeUndefined();
    const replaced = await api.replace(configMaps, { ...made, data: { default: 2 } }, signal);
    expect(isConflict(await failureOf(api.replace(configMaps, { ...made, data: {} }, signal)))).toBe(true);
    expect(replaced.data).toEqual({ default: 2 });
    const json = [{ op: "replace", path: "/data/default", value: 3 }];
    expect((await api.patch(configMaps, "c", NS, json, { type: "json", dryRun: true }, signal)).data).toEqual({
      default: 3,
    });
    expect((await api.patch(configMaps, "c", NS, { data: { x: 1 } }, { type: "merge" }, signal)).data).toEqual({
      default: 2,
      x: 1,
    });
    expect((await failureOf(api.delete(configMaps, "c", NS, { preconditions: { uid: "x" } }, signal))).code).toBe(409);
    expect(await api.delete(configMaps, "c", NS, {}, signal)).toBe(true);
    expect(await api.delete(configMaps, "c", NS, {}, signal)).toBe(false);
  });

  test("status goes to its subresource; pages go on; items have their kind though lists leave it out", async () => {
    const { api } = await bed();
    const deployment = {
      apiVersion: "muster.dev/v1alpha1",
      kind: "ModelDeployment",
      metadata: { name: "m", namespace: NS },
    };
    const made = await api.create(modelDeployments, { ...deployment, spec: { replicas: 1 } }, signal);
    const told = await api.replaceStatus(modelDeployments, { ...made, spec: {}, status: { phase: "Serving" } }, signal);
    expect(told).toMatchObject({ spec: { replicas: 1 }, status: { phase: "Serving" } });
    for (const name of ["a", "b", "c"]) await api.create(configMaps, mapOf(name, {}, { app: name }), signal);
    const first = await api.list(configMaps, { namespace: NS, limit: 2 }, signal);
    const second = await api.list(configMaps, { namespace: NS, limit: 2, continue: first.continue }, signal);
    const names = [...first.items, ...second.items].map(({ kind, metadata }) => `${kind} ${metadata.name}`);
    expect(names).toEqual(["ConfigMap a", "ConfigMap b", "ConfigMap c"]);
    expect((await api.list(configMaps, { labelSelector: "app in (a,c)" }, signal)).items).toHaveLength(2);
    expect((await api.list(configMaps, { namespace: "elsewhere" }, signal)).items).toEqual([]);
  });

  test("a kind is served or not; asking for one that is not is an error, not an absent object", async () => {
    const { api } = await bed();
    expect(await api.serves(podGroups, signal)).toBe(true);
    expect(await api.serves({ ...podGroups, version: "v9" }, signal)).toBe(false);
    expect(await api.serves({ ...pods, plural: "nothings" }, signal)).toBe(false);
    expect((await failureOf(api.get({ ...pods, plural: "nothings" }, "a", NS, signal))).code).toBe(404);
  });

  test("times of a Lease are strings and stay so, with their microseconds", async () => {
    const { api } = await bed();
    const spec = { holderIdentity: "a", renewTime: "2026-01-02T03:04:05.678901Z" };
    const lease = { apiVersion: "coordination.k8s.io/v1", kind: "Lease", metadata: { name: "l", namespace: NS }, spec };
    expect((await api.create(leases, lease, signal)).spec).toEqual(spec);
  });
});

describe("sockets", () => {
  test("P1: 50 calls in a row share their sockets, 50 at once have as many as may run at a time", async () => {
    const server = await serve(new SimApiServer(realTime));
    const credentials = fixedCredentials({ server: new URL(server.url) });
    const api = clientOf(server.url, { connections: new Connections(credentials, { socketsMax: 16 }) });
    for (let count = 0; count < 50; count += 1) await api.list(configMaps, {}, signal);
    // Two, not one: a socket is free again a moment after its answer has been read.
    expect(server.socketsAccepted).toBeLessThanOrEqual(2);
    await Promise.all(Array.from({ length: 50 }, () => api.list(configMaps, {}, signal)));
    expect(server.requests).toHaveLength(100);
    expect(server.socketsAccepted).toBeLessThanOrEqual(16);
  });

  test("P1: 50 watches and 50 calls beside them hold a bounded number of sockets; more watches than allowed are refused", async () => {
    const sim = new SimApiServer(realTime);
    const server = await serve(sim);
    const credentials = fixedCredentials({ server: new URL(server.url) });
    const connections = new Connections(credentials, { socketsMax: 54 });
    const api = clientOf(server.url, { connections, limits: { watchesMax: 50, callsMax: 4 } });
    const stop = new AbortController();
    const open = Array.from({ length: 50 }, async () => {
      for await (const _ of api.watch(configMaps, { resourceVersion: "", timeoutSeconds: 60 }, stop.signal));
    });
    const ended = Promise.allSettled(open);
    await until(() => sim.watchCount === 50, "50 watches are open");
    await Promise.all(Array.from({ length: 50 }, () => api.list(configMaps, {}, signal)));
    expect(server.socketsAccepted).toBeLessThanOrEqual(54);
    const one = api
      .watch(configMaps, { resourceVersion: "", timeoutSeconds: 1 }, signal)
      [Symbol.asyncIterator]()
      .next();
    expect((await failureOf(one)).reason).toBe("TooManyWatches");
    stop.abort(new Error("enough"));
    expect((await ended).every((end) => end.status === "rejected" && end.reason.message === "enough")).toBe(true);
    await until(() => sim.watchCount === 0, "the watches have ended at the server too");
  });

  test("P2, P3: a new token keeps the socket, a new certificate gets a new pool, a wrong CA is refused by name", async () => {
    const sim = new SimApiServer(realTime);
    const tls = {
      key: pem("server.key"),
      cert: pem("server.pem"),
      ca: pem("ca.pem"),
      requestCert: true,
      rejectUnauthorized: true,
    };
    const server = await serve(sim, { tls });
    const access = {
      server: new URL(server.url),
      headers: { authorization: "Bearer one" },
      tls: { ca: pem("ca.pem"), cert: pem("client-a.pem"), key: pem("client-a.key") },
    };
    const connections = new Connections(
      { load: async () => ({ ...access }), namespace: async () => "" },
      { socketsMax: 1 },
    );
    const api = clientOf(server.url, { connections });
    await api.list(configMaps, {}, signal);
    access.headers = { authorization: "Bearer two" };
    connections.distrust();
    await api.list(configMaps, {}, signal);
    expect(server.socketsAccepted).toBe(1);
    expect(server.requests.map(({ headers }) => headers.authorization)).toEqual(["Bearer one", "Bearer two"]);
    access.tls = { ca: pem("ca.pem"), cert: pem("client-b.pem"), key: pem("client-b.key") };
    connections.distrust();
    await api.list(configMaps, {}, signal);
    expect(server.socketsAccepted).toBe(2);
    await until(() => server.socketsOpen === 1, "the old pool has ended");
    const stranger = fixedCredentials({ server: new URL(server.url), tls: { ...access.tls, ca: pem("client-a.pem") } });
    const error = await failureOf(
      clientOf(server.url, { connections: new Connections(stranger) }).list(configMaps, {}, signal),
    );
    expect(error.reason).toBe("Untrusted");
  });
});

describe("failures", () => {
  const status = (code: number, reason: string, more = {}) =>
    JSON.stringify({ kind: "Status", code, reason, message: "why", ...more });

  test("bodies that are Status, JSON, a JSON string, text or nothing become one kind of error that names the call", async () => {
    const bodies: [string, string, string][] = [
      [status(422, "Invalid"), "Invalid", "why"],
      [JSON.stringify(status(422, "Invalid")), "Invalid", "why"],
      [JSON.stringify({ detail: "odd" }), "HTTP422", "odd"],
      ["<html>proxy says\nno</html>", "HTTP422", "proxy says no"],
      ["", "HTTP422", "create configmaps/serving/c: 422 HTTP422"],
    ];
    for (const [body, reason, text] of bodies) {
      const { api, count } = await answering((response) => response.writeHead(422).end(body));
      const error = await failureOf(api.create(configMaps, mapOf("c"), signal));
      expect(error).toMatchObject({ code: 422, reason });
      expect(error.message).toContain(text);
      expect(error.message).toContain("create configmaps/serving/c");
      expect(count()).toBe(1);
    }
  });

  test("H3: 429 is tried again when the server says, for writes too; then it is told with its wish", async () => {
    const busy = (response: ServerResponse, count: number) => {
      if (count <= 2) response.writeHead(429, { "retry-after": "0" }).end(status(429, "TooManyRequests"));
      else response.writeHead(200).end(JSON.stringify(mapOf("c")));
    };
    const { api, count } = await answering(busy);
    expect((await api.create(configMaps, mapOf("c"), signal)).metadata.name).toBe("c");
    expect(count()).toBe(3);
    const always = await answering((response) => response.writeHead(429, { "retry-after": "3600" }).end("slow down"));
    const error = await failureOf(always.api.create(configMaps, mapOf("c"), signal));
    expect(error).toMatchObject({ code: 429, retryAfterMs: 3_600_000 });
    expect(always.count()).toBe(1);
  });

  test("H3: 5xx and lost answers are tried again for reads, never for writes", async () => {
    const sick = (response: ServerResponse, count: number) => {
      if (count === 1) response.writeHead(503).end("not ready");
      else if (count === 2) response.destroy();
      else response.writeHead(200).end(JSON.stringify({ metadata: { resourceVersion: "7" }, items: null }));
    };
    const { api, count } = await answering(sick);
    expect(await api.list(configMaps, {}, signal)).toEqual({ items: [], resourceVersion: "7", continue: "" });
    expect(count()).toBe(3);
    for (const break_ of [(r: ServerResponse) => r.writeHead(503).end("x"), (r: ServerResponse) => r.destroy()]) {
      const write = await answering(break_);
      const error = await failureOf(write.api.create(configMaps, mapOf("c"), signal));
      expect([503, 0]).toContain(error.code);
      expect(write.count()).toBe(1);
    }
  });

  test("401 is tried once more with credentials read anew", async () => {
    let loads = 0;
    const { server } = await answering((response, count) => {
      if (count === 1) response.writeHead(401).end(status(401, "Unauthorized"));
      else response.writeHead(200).end(JSON.stringify(mapOf("c")));
    });
    const load = async () => ({
      server: new URL(server.url),
      headers: { authorization: `Bearer ${(loads += 1)}` },
      tls: {},
    });
    const connections = new Connections({ load, namespace: async () => "" });
    await clientOf(server.url, { connections }).create(configMaps, mapOf("c"), signal);
    expect(server.requests.map(({ headers }) => headers.authorization)).toEqual(["Bearer 1", "Bearer 2"]);
  });

  test("H2: no answer is a Timeout, an abort is the caller's own reason, nobody there is Unreachable", async () => {
    const { api } = await answering(() => {}, { limits: { callMs: 100 } });
    expect(await failureOf(api.list(configMaps, {}, signal))).toMatchObject({ code: 0, reason: "Timeout" });
    const stop = new AbortController();
    const { api: patient, count } = await answering(() => {});
    const call = patient.list(configMaps, {}, stop.signal);
    call.catch(() => {});
    await until(() => count() === 1, "the call has arrived");
    stop.abort(new Error("enough"));
    await expect(call).rejects.toThrow("enough");
    const { server } = await bed();
    await server.close();
    const gone = clientOf(server.url, { limits: { tries: 1 } });
    expect(await failureOf(gone.list(configMaps, {}, signal))).toMatchObject({ code: 0, reason: "Unreachable" });
  });

  test("H2: waiting for a socket or for the own rate ends with the deadline as well", async () => {
    const { api } = await answering(() => {}, { limits: { callMs: 100, callsMax: 1 } });
    const calls = [api.list(configMaps, {}, signal), api.list(configMaps, {}, signal)].map(failureOf);
    expect((await Promise.all(calls)).map(({ reason }) => reason)).toEqual(["Timeout", "Timeout"]);
    const slow = await bed({ limits: { callMs: 200, rate: { perSecond: 0.001, burst: 1 } } });
    await slow.api.list(configMaps, {}, signal);
    expect((await failureOf(slow.api.list(configMaps, {}, signal))).reason).toBe("Throttled");
  });

  test("the own rate holds: a burst, then one for each interval", async () => {
    const metrics = new KubeMetrics();
    const { api } = await bed({ metrics, limits: { rate: { perSecond: 20, burst: 5 } } });
    const begunMs = performance.now();
    await Promise.all(Array.from({ length: 10 }, () => api.list(configMaps, {}, signal)));
    expect(performance.now() - begunMs).toBeGreaterThanOrEqual(240);
    expect(metrics.total("muster_kube_requests_total", { verb: "GET", code: "200" })).toBe(10);
  });

  test("answers are bounded, and must be what was asked for", async () => {
    const large = await answering((response) => response.writeHead(200).end("x".repeat(2000)), {
      limits: { bodyBytesMax: 1000, tries: 1 },
    });
    expect((await failureOf(large.api.list(configMaps, {}, signal))).reason).toBe("TooLarge");
    const odd = await answering((response) => response.writeHead(200).end("<html>login</html>"), {
      limits: { tries: 1 },
    });
    expect((await failureOf(odd.api.list(configMaps, {}, signal))).reason).toBe("BadReply");
    const empty = await answering((response) => response.writeHead(200).end("{}"), { limits: { tries: 1 } });
    expect((await failureOf(empty.api.get(configMaps, "c", NS, signal))).reason).toBe("BadReply");
  });
});

describe("watches", () => {
  const first = async (lines: AsyncIterable<WatchLine>) => {
    for await (const line of lines) return line;
    return undefined;
  };
  const watching = { resourceVersion: "1", timeoutSeconds: 60 };

  test("lines come as they happen, bookmarks among them; the query says what a watch needs", async () => {
    const sim = new SimApiServer(realTime, { bookmarkEveryMs: 50 });
    const server = await serve(sim);
    const lines: string[] = [];
    const ended = (async () => {
      const options = { namespace: NS, labelSelector: "a=b", resourceVersion: sim.version, timeoutSeconds: 1 };
      for await (const line of clientOf(server.url).watch(configMaps, options, signal)) lines.push(line.type);
    })();
    await until(() => sim.watchCount === 1, "the watch is open");
    await sim.create(configMaps, mapOf("c", {}, { a: "b" }), signal);
    await sim.delete(configMaps, "c", NS, {}, signal);
    await ended;
    expect(lines.filter((type) => type !== "BOOKMARK")).toEqual(["ADDED", "DELETED"]);
    expect(lines).toContain("BOOKMARK");
    const query = new URL(server.requests[0]?.url ?? "", server.url).searchParams;
    expect(query.get("allowWatchBookmarks")).toBe("true");
    expect(query.get("labelSelector")).toBe("a=b");
  });

  test("a version that is gone is told within the stream or as the answer, both as 410", async () => {
    const { sim, api } = await bed();
    await sim.create(configMaps, mapOf("c"), signal);
    sim.compact();
    const line = await first(api.watch(configMaps, { ...watching, resourceVersion: "1000" }, signal));
    expect(line?.type === "ERROR" && isGone(line.error)).toBe(true);
    const blunt = await answering((response) => response.writeHead(410).end("gone"));
    expect(isGone(await failureOf(first(blunt.api.watch(configMaps, watching, signal))))).toBe(true);
  });

  test("a line that is broken, odd or endless is an error, never left out", async () => {
    const cases: [string, string, number][] = [
      ['{"type":"ADDED","object":{"met\n', "BadReply", 1000],
      ['{"type":"SHOUTED","object":{}}\n', "BadReply", 1000],
      ["x".repeat(5000), "TooLarge", 1000],
    ];
    for (const [text, reason, lineBytesMax] of cases) {
      const { api } = await answering((response) => response.writeHead(200).write(text), { limits: { lineBytesMax } });
      expect((await failureOf(first(api.watch(configMaps, watching, signal)))).reason).toBe(reason);
    }
  });

  test("a line may come in any pieces, letters cut in the middle", async () => {
    const object = mapOf("c", { greeting: "grüß dich, 世界" });
    const bytes = Buffer.from(`${JSON.stringify({ type: "ADDED", object })}\n`);
    const { api } = await answering((response) => {
      response.writeHead(200);
      void (async () => {
        for (const byte of bytes) {
          response.write(Buffer.from([byte]));
          await new Promise((next) => setImmediate(next));
        }
      })();
    });
    expect(await first(api.watch(configMaps, watching, signal))).toEqual({ type: "ADDED", object });
  });

  test("H4: silence, a dead server and an early end are told apart; the socket is given back", async () => {
    const silent = await answering((response) => response.writeHead(200).flushHeaders(), {
      limits: { watchIdleMs: 300 },
    });
    expect((await failureOf(first(silent.api.watch(configMaps, watching, signal)))).reason).toBe("Idle");
    const dead = await bed();
    const broken = failureOf(first(dead.api.watch(configMaps, { ...watching, resourceVersion: "" }, signal)));
    await until(() => dead.sim.watchCount === 1, "the watch is open");
    await dead.server.close();
    expect((await broken).reason).toBe("Unreachable");
    const { sim, api } = await bed();
    await sim.create(configMaps, mapOf("c"), signal);
    expect((await first(api.watch(configMaps, { ...watching, resourceVersion: "" }, signal)))?.type).toBe("ADDED");
    await until(() => sim.watchCount === 0, "who stops reading ends the watch");
  });

  test("messages never carry the token", async () => {
    const { server } = await answering((response) => response.writeHead(403).end("forbidden"));
    const credentials = fixedCredentials({ server: new URL(server.url), headers: { authorization: "Bearer s3cret" } });
    const error = await failureOf(
      clientOf(server.url, { connections: new Connections(credentials) }).list(configMaps, {}, signal),
    );
    expect(JSON.stringify([error.message, error.stack, String(error.cause)])).not.toContain("s3cret");
  });
});

// What a controller answers to kubelet and Prometheus, over real HTTP on loopback.
import { expect, onTestFinished, test } from "vitest";
import { serveControllerHttp } from "../../../controller/cli/controller-http.ts";
import { KubeMetrics } from "../../../controller/kube/metrics/metrics.ts";

async function start(whyNotReady: () => string | undefined = () => undefined) {
  const metrics = new KubeMetrics();
  const served = await serveControllerHttp({ listen: "127.0.0.1:0", metrics, whyNotReady });
  onTestFinished(() => served.close());
  const ask = async (path: string, init: RequestInit = {}) => {
    const answer = await fetch(`http://127.0.0.1:${served.port}${path}`, init);
    return { code: answer.status, type: answer.headers.get("content-type"), text: await answer.text() };
  };
  return { metrics, ask, ...served };
}

test("health is the process; readiness is what it says, with the reason", async () => {
  let why: string | undefined = "the certificate authority is not there yet";
  const { ask } = await start(() => why);
  expect(await ask("/healthz")).toMatchObject({ code: 200, text: "ok\n" });
  expect(await ask("/readyz")).toMatchObject({ code: 503, text: `${why}\n` });
  why = undefined;
  expect(await ask("/readyz")).toMatchObject({ code: 200 });
});

test("metrics are Prometheus text: help and type once, labels escaped, buckets cumulated", async () => {
  const { ask, metrics } = await start();
  metrics.count("muster_kube_requests_total", { verb: "get", code: "200" }, 3);
  metrics.count("muster_kube_requests_total", { verb: 'a"b\\c\n', code: "0" });
  metrics.gauge("muster_leader", {}, () => 1);
  for (const seconds of [0.0005, 0.02, 100]) metrics.observe("muster_reconcile_seconds", { queue: "q" }, seconds);
  const { code, type, text } = await ask("/metrics");
  expect(code).toBe(200);
  expect(type).toBe("text/plain; version=0.0.4; charset=utf-8");
  const lines = text.trimEnd().split("\n");
  expect(lines).toContain('muster_kube_requests_total{verb="get",code="200"} 3');
  expect(lines).toContain('muster_kube_requests_total{verb="a\\"b\\\\c\\n",code="0"} 1');
  expect(lines).toContain("muster_leader 1");
  expect(lines.filter((line) => line === "# TYPE muster_kube_requests_total counter")).toHaveLength(1);
  expect(lines).toContain("# TYPE muster_reconcile_seconds histogram");
  expect(lines).toContain('muster_reconcile_seconds_bucket{queue="q",le="0.001"} 1');
  expect(lines).toContain('muster_reconcile_seconds_bucket{queue="q",le="0.025"} 2');
  expect(lines).toContain('muster_reconcile_seconds_bucket{queue="q",le="+Inf"} 3');
  expect(lines).toContain('muster_reconcile_seconds_count{queue="q"} 3');
  for (const line of lines) expect(line).toMatch(/^(# (HELP|TYPE) muster_|muster_[a-z_]+(\{.*\})? [-+0-9.eInfNa]+$)/);
});

test("nothing else is answered", async () => {
  const { ask, port } = await start();
  expect(await ask("/other")).toMatchObject({ code: 404 });
  expect(await ask("/metrics", { method: "POST", body: "x" })).toMatchObject({ code: 405 });
  const listen = `127.0.0.1:${port}`;
  const second = serveControllerHttp({ listen, metrics: new KubeMetrics(), whyNotReady: () => undefined });
  await expect(second).rejects.toThrow(`--http: cannot listen on ${listen}`);
});

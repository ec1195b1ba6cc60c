// Dashboard and alerts ask only for metrics that the programs have: those of the controller by its table, those of the gateway
// by what a scrape of it gives.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import { expect, test } from "vitest";
import { parse } from "yaml";
import { z } from "zod";
import { GatewayMetrics } from "../../controller/gateway/metrics.ts";
import { METRICS } from "../../controller/kube/metrics/metrics.ts";
import { WorkerStats } from "../../proto/gen/muster/v1/worker.ts";

const FILES = join(import.meta.dirname, "../../charts/muster/files");
const file = (name: string) => readFileSync(join(FILES, name), "utf8");
const Rule = z.strictObject({
  alert: z.string(),
  expr: z.string(),
  for: z
    .string()
    .regex(/^\d+m$/)
    .optional(),
  labels: z.strictObject({ severity: z.enum(["warning", "critical"]) }),
  annotations: z.strictObject({ summary: z.string().min(20) }),
});
const Alerts = z.strictObject({ groups: z.array(z.strictObject({ name: z.string(), rules: z.array(Rule).min(1) })) });
const Dashboard = z.looseObject({
  panels: z.array(
    z.looseObject({ id: z.number(), title: z.string(), targets: z.array(z.looseObject({ expr: z.string() })).min(1) }),
  ),
});

/** Counted with a whole request only: test/controller/gateway/front.test.ts sees it in a scrape. */
const OF_REQUESTS = "muster_gateway_tokens_total";

/** Names in a scrape after everything else has been counted once. */
async function gatewayNames(): Promise<Set<string>> {
  const metrics = new GatewayMetrics();
  metrics.observe({
    held: () => 0,
    open: () => 0,
    connected: () => true,
    leaders: () => [{ model: "m", replica: "r", stats: WorkerStats.fromPartial({}) }],
  });
  metrics.request("/v1/completions", 200, 1);
  metrics.resumed("m", true);
  metrics.queueRefused("leader");
  metrics.clientDropped();
  metrics.firstToken("m", 1);
  metrics.nextToken("m", 1);
  const server = createServer((request, response) => metrics.handle(request, response));
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  try {
    const address = z.object({ port: z.number() }).parse(server.address());
    const text = await (await fetch(`http://127.0.0.1:${address.port}/metrics`)).text();
    return new Set([OF_REQUESTS, ...[...text.matchAll(/^(muster_\w+)/gm)].map(([, name = ""]) => name)]);
  } finally {
    server.close();
    await metrics.close();
  }
}

const controllerNames = Object.keys(METRICS).flatMap((name) =>
  name.endsWith("_seconds") ? [name, `${name}_bucket`, `${name}_sum`, `${name}_count`] : [name],
);

test("every metric in dashboard and alerts is one of the controller's or the gateway's", async () => {
  const alerts = Alerts.parse(parse(file("alerts.yaml"))).groups.flatMap(({ rules }) => rules);
  const panels = Dashboard.parse(JSON.parse(file("dashboard.json"))).panels;
  const asked = [
    ...alerts.map(({ expr }) => expr),
    ...panels.flatMap(({ targets }) => targets.map(({ expr }) => expr)),
  ];
  const names = new Set(asked.flatMap((expr) => expr.match(/\bmuster_\w+/g) ?? []));
  expect(names.size).toBeGreaterThan(20);
  const known = new Set([...controllerNames, ...(await gatewayNames())]);
  expect([...names].filter((name) => !known.has(name))).toEqual([]);
  expect(asked.filter((expr) => !expr.includes("muster_"))).toEqual([]);
});

test("alerts have names of their own, panels ids", () => {
  const names = Alerts.parse(parse(file("alerts.yaml"))).groups.flatMap(({ rules }) => rules.map(({ alert }) => alert));
  expect(new Set(names).size).toBe(names.length);
  const ids = Dashboard.parse(JSON.parse(file("dashboard.json"))).panels.map(({ id }) => id);
  expect(new Set(ids).size).toBe(ids.length);
});

import { expect, test } from "vitest";
import { KubeMetrics, SECONDS_BOUNDS } from "../../../../controller/kube/metrics/metrics.ts";

test("counters add up by label, gauges are read when asked, histograms keep count, sum and buckets", () => {
  const metrics = new KubeMetrics();
  metrics.count("muster_events_total", { outcome: "sent" });
  metrics.count("muster_events_total", { outcome: "sent" }, 2);
  metrics.count("muster_events_total", { outcome: "dropped" });
  let depth = 1;
  const take = metrics.gauge("muster_queue_depth", { queue: "q" }, () => depth);
  depth = 5;
  expect(metrics.total("muster_events_total")).toBe(4);
  expect(metrics.total("muster_events_total", { outcome: "sent" })).toBe(3);
  expect(metrics.samples()).toContainEqual({
    name: "muster_queue_depth",
    kind: "gauge",
    labels: { queue: "q" },
    value: 5,
  });
  take();
  expect(metrics.samples().some(({ kind }) => kind === "gauge")).toBe(false);
  for (const seconds of [0.0005, 0.3, 0.5, 1_000]) metrics.observe("muster_reconcile_seconds", { queue: "q" }, seconds);
  const [histogram] = metrics.histograms();
  expect(histogram).toMatchObject({ count: 4, buckets: [1, 0, 0, 0, 2, 0, 0, 0, 0, 1] });
  expect(histogram?.sum).toBeCloseTo(1_000.8005);
  expect(histogram?.buckets).toHaveLength(SECONDS_BOUNDS.length + 1);
});

test("labels are bounded: a name of an object in one is found out", () => {
  const metrics = new KubeMetrics();
  expect(() => {
    for (let count = 0; count < 3_000; count += 1) metrics.count("muster_events_total", { outcome: `${count}` });
  }).toThrow("label is not bounded");
});

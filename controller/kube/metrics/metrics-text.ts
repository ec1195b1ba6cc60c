// KubeMetrics as Prometheus reads them (text format 0.0.4). Pure; every metric has its help and type once, before its series.
import { type KubeMetrics, type Labels, METRICS, type MetricName, SECONDS_BOUNDS } from "./metrics.ts";

export const METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8";

export function metricsText(metrics: KubeMetrics): string {
  const families = new Map<MetricName, { type: string; lines: string[] }>();
  const add = (name: MetricName, type: string, lines: readonly string[]) => {
    const family = families.get(name) ?? { type, lines: [] };
    family.lines.push(...lines);
    families.set(name, family);
  };
  for (const { name, kind, labels, value } of metrics.samples()) add(name, kind, [lineOf(name, labels, value)]);
  for (const { name, labels, buckets, count, sum } of metrics.histograms()) {
    let below = 0;
    const bounded = SECONDS_BOUNDS.map((bound, index) => {
      below += buckets[index] ?? 0;
      return lineOf(`${name}_bucket`, { ...labels, le: String(bound) }, below);
    });
    const all = lineOf(`${name}_bucket`, { ...labels, le: "+Inf" }, count);
    add(name, "histogram", [
      ...bounded,
      all,
      lineOf(`${name}_sum`, labels, sum),
      lineOf(`${name}_count`, labels, count),
    ]);
  }
  const texts = [...families]
    .toSorted(([one], [other]) => (one < other ? -1 : 1))
    .map(([name, { type, lines }]) =>
      [`# HELP ${name} ${METRICS[name]}`, `# TYPE ${name} ${type}`, ...lines].join("\n"),
    );
  return `${texts.join("\n")}\n`;
}

function lineOf(name: string, labels: Labels, value: number): string {
  const pairs = Object.entries(labels).map(([label, text]) => `${label}="${escaped(text)}"`);
  return `${name}${pairs.length === 0 ? "" : `{${pairs.join(",")}}`} ${numberText(value)}`;
}

const escaped = (text: string): string => text.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");

function numberText(value: number): string {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "+Inf" : "-Inf";
  return String(value);
}

// The chart as Helm renders it, for tests: the helm of the control-plane binary, which needs no cluster to render.
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseAllDocuments } from "yaml";
import { z } from "zod";
import { controlPlaneBinary } from "../cluster/controlplane/binary.ts";
import type { PodEnd } from "./policies.ts";

export const CHART = join(import.meta.dirname, "../../charts/muster");
export const RELEASE_NAMESPACE = "muster-system";
const HELM_MS_MAX = 60_000;
const OUTPUT_BYTES_MAX = 16 << 20;

const Rendered = z.looseObject({
  apiVersion: z.string(),
  kind: z.string(),
  metadata: z.looseObject({
    name: z.string(),
    namespace: z.string().optional(),
    labels: z.record(z.string(), z.string()).default({}),
    annotations: z.record(z.string(), z.string()).default({}),
  }),
});
export type Rendered = z.infer<typeof Rendered>;
export type Values = Readonly<Record<string, unknown>>;
export type Output = { code: number; stdout: string; stderr: string };

/** Runs helm with `values` as a file of their own; `{chart}` in the arguments is the chart. */
export async function helm(args: readonly string[], values: Values = {}): Promise<Output> {
  const binary = await controlPlaneBinary();
  const folder = mkdtempSync(join(tmpdir(), "muster-chart-"));
  const file = join(folder, "values.json");
  writeFileSync(file, JSON.stringify(values));
  const env = { PATH: process.env.PATH ?? "", HOME: folder };
  try {
    return await new Promise((done) => {
      const all = ["helm", ...args, "--values", file];
      const limits = { timeout: HELM_MS_MAX, maxBuffer: OUTPUT_BYTES_MAX, env };
      execFile(binary, all, limits, (error, stdout, stderr) =>
        done({ code: error === null ? 0 : typeof error.code === "number" ? error.code : -1, stdout, stderr }),
      );
    });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

const template = ["template", "muster", CHART, "--namespace", RELEASE_NAMESPACE, "--kube-version"];

/** All objects of an installation with these values. Throws with Helm's words where it refuses. */
export async function render(values: Values = {}): Promise<Rendered[]> {
  const { code, stdout, stderr } = await helm([...template, "1.33.0"], values);
  if (code !== 0) throw new Error(`helm template ended with ${code}: ${stderr}`);
  return parseAllDocuments(stdout).flatMap((document) => {
    if (document.errors.length > 0) throw document.errors[0];
    const object: unknown = document.toJS();
    return object === null ? [] : [Rendered.parse(object)];
  });
}

/** Why Helm does not render these values. Throws where it does. */
export async function refusal(values: Values, kubeVersion = "1.33.0"): Promise<string> {
  const { code, stderr } = await helm([...template, kubeVersion], values);
  if (code === 0) throw new Error("helm template took it");
  return stderr;
}

export function find(objects: readonly Rendered[], kind: string, name: string, namespace?: string): Rendered {
  const found = objects.find(
    ({ kind: its, metadata }) =>
      its === kind && metadata.name === name && (namespace === undefined || metadata.namespace === namespace),
  );
  if (found === undefined) throw new Error(`no ${kind} ${name} is rendered`);
  return found;
}

export const has = (objects: readonly Rendered[], kind: string, name?: string): boolean =>
  objects.some((object) => object.kind === kind && (name === undefined || object.metadata.name === name));

const Container = z.looseObject({
  image: z.string(),
  command: z.array(z.string()).default([]),
  args: z.array(z.string()).default([]),
  env: z.array(z.looseObject({ name: z.string(), value: z.string().optional() })).default([]),
  ports: z.array(z.looseObject({ name: z.string(), containerPort: z.int() })).default([]),
});
const PodSpec = z.looseObject({ containers: z.tuple([Container]) });
const Deployment = z.looseObject({
  spec: z.looseObject({
    replicas: z.int(),
    template: z.looseObject({
      metadata: z.looseObject({ labels: z.record(z.string(), z.string()) }),
      spec: PodSpec,
    }),
  }),
});

export function deploymentOf(objects: readonly Rendered[], name: string) {
  const { spec } = Deployment.parse(find(objects, "Deployment", name));
  const [container] = spec.template.spec.containers;
  return { replicas: spec.replicas, labels: spec.template.metadata.labels, pod: spec.template.spec, container };
}

/** A pod of a Deployment, as one end of a connection. */
export function podOf(objects: readonly Rendered[], name: string, ip: string): PodEnd {
  const { labels, container } = deploymentOf(objects, name);
  const ports = Object.fromEntries(container.ports.map((port) => [port.name, port.containerPort]));
  return { kind: "pod", name: `${name}-0`, namespace: RELEASE_NAMESPACE, labels, ip, ports };
}

/** The value after a flag in a container's arguments. */
export function flagOf({ args }: { args: readonly string[] }, flag: string): string | undefined {
  const at = args.indexOf(`--${flag}`);
  return at < 0 ? undefined : args[at + 1];
}

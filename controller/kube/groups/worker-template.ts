// What an installation says of every worker pod, from a file (the chart's ConfigMap) over these defaults. Owns the form of
// the file; what becomes of it is pods.ts.
import { readFileSync } from "node:fs";
import { parse } from "yaml";
import { z } from "zod";
import { FaultError, invalid } from "../../../proto/fault.ts";
import type { WorkerTemplate } from "./pods.ts";

/** Of one file: a handful of fields. */
const FILE_BYTES_MAX = 64 * 1024;
const quantities = z.record(z.string().max(317), z.union([z.string().max(64), z.number()]));

const template = z.strictObject({
  imagePullPolicy: z.enum(["Always", "IfNotPresent", "Never"]).default("IfNotPresent"),
  command: z.array(z.string().min(1)).min(1).max(32).default(["muster"]),
  serviceAccountName: z.string().min(1).max(253).default("muster-worker"),
  port: z.int().min(1).max(65_535).default(7440),
  listenHost: z.string().min(1).max(255).optional(),
  shmSize: z.string().min(1).max(64).default("16Gi"),
  resources: z.strictObject({ requests: quantities.default({}), limits: quantities.default({}) }).prefault({}),
  drainSeconds: z.int().min(0).max(600).default(300),
  tokenSeconds: z.int().min(600).max(86_400).default(3600),
  podCertificates: z.boolean().default(true),
  caConfigMap: z.string().min(1).max(253).optional(),
  userId: z.int().min(1).max(0x7fff_ffff).default(65_532),
});

/** `text`: YAML or JSON. Throws FaultError with the field. The image of a worker is its plan's; `image` only fills the form. */
export function parseTemplate(text: string, image: string): WorkerTemplate {
  const parsed = template.safeParse(yamlOf(text) ?? {});
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new FaultError(
      invalid(`worker template: ${issue?.path.join(".") ?? ""}`, issue?.message ?? "cannot be read"),
    );
  }
  return { ...parsed.data, image, caConfigMap: parsed.data.caConfigMap };
}

export function readTemplate(path: string | undefined, image: string): WorkerTemplate {
  if (path === undefined) return parseTemplate("", image);
  try {
    const bytes = readFileSync(path);
    if (bytes.length <= FILE_BYTES_MAX) return parseTemplate(bytes.toString(), image);
  } catch (error) {
    if (error instanceof FaultError) throw error;
    const detail = error instanceof Error ? error.message : String(error);
    throw new FaultError(invalid("--worker-template", `${path} cannot be read: ${detail}`), { cause: error });
  }
  throw new FaultError(invalid("--worker-template", `${path} has more than ${FILE_BYTES_MAX} bytes`));
}

function yamlOf(text: string): unknown {
  try {
    return parse(text);
  } catch (error) {
    const detail = error instanceof Error ? error.message : String(error);
    throw new FaultError(invalid("worker template", `it is no YAML: ${detail}`), { cause: error });
  }
}

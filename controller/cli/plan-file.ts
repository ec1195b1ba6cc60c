// The documents of `muster plan -f`: YAML in, owners out, in the order of the file. Owns bounds and what is said of a document
// that is none of ours; what its fields must be is controller/api.
import { readFileSync } from "node:fs";
import { parseAllDocuments } from "yaml";
import { FaultError, invalid } from "../../proto/fault.ts";
import { API_VERSION } from "../api/meta.ts";
import { type Parsed, parseDraftPool, parseModelDeployment } from "../api/parse.ts";
import type { KubeObject } from "../kube/api/client.ts";

const FILE_BYTES_MAX = 1024 * 1024;
const DOCUMENTS_MAX = 64;
const STDIN = 0;

/** Each with a namespace: its own, or `namespace`. Throws FaultError: `document 2: spec.gpu.count: ...`. */
export function readOwners(path: string, namespace: string): KubeObject[] {
  const documents = parseAllDocuments(contentOf(path)).filter((document) => document.contents !== null);
  if (documents.length === 0) throw new FaultError(invalid("-f", `${path} has no document`));
  if (documents.length > DOCUMENTS_MAX)
    throw new FaultError(invalid("-f", `${path} has ${documents.length} documents; at most ${DOCUMENTS_MAX}`));
  return documents.map((document, index) => {
    const at = documents.length === 1 ? "" : `document ${index + 1}: `;
    const [error] = document.errors;
    if (error !== undefined) throw new FaultError(invalid(`${at}-f`, `it is no YAML: ${error.message.split("\n")[0]}`));
    return ownerIn(document.toJS({ maxAliasCount: 100 }), at, namespace);
  });
}

function contentOf(path: string): string {
  try {
    const bytes = readFileSync(path === "-" ? STDIN : path);
    if (bytes.length <= FILE_BYTES_MAX) return bytes.toString();
  } catch (error) {
    const detail = error instanceof Error ? error.message : String(error);
    throw new FaultError(invalid("-f", `${path} cannot be read: ${detail}`), { cause: error });
  }
  throw new FaultError(invalid("-f", `${path} has more than ${FILE_BYTES_MAX} bytes`));
}

function ownerIn(value: unknown, at: string, namespace: string): KubeObject {
  const kind = typeof value === "object" && value !== null && "kind" in value ? value.kind : undefined;
  if (kind !== "ModelDeployment" && kind !== "DraftPool") {
    const detail = `it is ${JSON.stringify(kind) ?? "missing"}; a ModelDeployment or DraftPool can be planned`;
    throw new FaultError(invalid(`${at}kind`, detail));
  }
  const parsed: Parsed<{ metadata: { name: string; namespace?: string | undefined }; spec: unknown }> =
    kind === "DraftPool" ? parseDraftPool(value) : parseModelDeployment(value);
  if (parsed.kind === "refused") {
    const { fault } = parsed;
    throw new FaultError({ ...fault, field: `${at}${fault.field}` });
  }
  const { name, namespace: own, ...rest } = parsed.value.metadata;
  const { annotations, labels } = textsIn(rest);
  return {
    apiVersion: API_VERSION,
    kind,
    metadata: { name, namespace: own ?? namespace, annotations, labels },
    spec: parsed.value.spec,
  };
}

function textsIn(metadata: { annotations?: Record<string, string>; labels?: Record<string, string> }) {
  return { annotations: metadata.annotations ?? {}, labels: metadata.labels ?? {} };
}

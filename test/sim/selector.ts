// Label and field selectors as the API server reads them: the part that Muster uses.
import type { KubeObject, Selection } from "../../controller/kube/api/client.ts";
import { KubeError } from "../../controller/kube/api/client.ts";
import { isRecord } from "../../controller/kube/api/wire.ts";

type Test = (object: KubeObject) => boolean;

const FIELDS: Record<string, (object: KubeObject) => string> = {
  "metadata.name": (object) => object.metadata.name,
  "metadata.namespace": (object) => object.metadata.namespace ?? "",
  "spec.signerName": (object) => textAt(object.spec, "signerName"),
  "spec.nodeName": (object) => textAt(object.spec, "nodeName"),
  "status.phase": (object) => textAt(object.status, "phase"),
};

/** Throws 400 where a selector cannot be read. */
export function selectorOf(selection: Selection): Test {
  const tests = [
    ...termsOf(selection.labelSelector).map(labelTest),
    ...termsOf(selection.fieldSelector).map(fieldTest),
    ...(selection.namespace ? [(object: KubeObject) => object.metadata.namespace === selection.namespace] : []),
  ];
  return (object) => tests.every((test) => test(object));
}

function textAt(holder: unknown, field: string): string {
  const value = isRecord(holder) ? holder[field] : undefined;
  return typeof value === "string" ? value : "";
}

/** Commas part terms, except within "in (a,b)". */
function termsOf(text: string | undefined): string[] {
  return (text ?? "")
    .split(/,(?![^(]*\))/)
    .map((term) => term.trim())
    .filter((term) => term !== "");
}

function labelTest(term: string): Test {
  const set = /^(\S+)\s+(in|notin)\s+\(([^)]*)\)$/.exec(term);
  if (set) {
    const [, key = "", word, list = ""] = set;
    const values = list.split(",").map((value) => value.trim());
    return (object) => {
      const value = object.metadata.labels?.[key];
      const isIn = value !== undefined && values.includes(value);
      return word === "in" ? isIn : !isIn;
    };
  }
  const compare = /^([^!=\s]+)\s*(==|=|!=)\s*(\S*)$/.exec(term);
  if (compare) {
    const [, key = "", operator, wanted = ""] = compare;
    return (object) => (object.metadata.labels?.[key] === wanted) === (operator !== "!=");
  }
  const exists = /^(!?)([^!=\s()]+)$/.exec(term);
  if (exists) {
    const [, not, key = ""] = exists;
    return (object) => (object.metadata.labels?.[key] !== undefined) === (not === "");
  }
  throw new KubeError(400, "BadRequest", `unable to parse label requirement: ${term}`);
}

function fieldTest(term: string): Test {
  const [, key = "", operator, wanted = ""] = /^([^!=\s]+)\s*(==|=|!=)\s*(.*)$/.exec(term) ?? [];
  const read = FIELDS[key];
  if (read === undefined) throw new KubeError(400, "BadRequest", `field label not supported: ${term}`);
  return (object) => (read(object) === wanted) === (operator !== "!=");
}

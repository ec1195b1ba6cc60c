// Claims that models lie on: whether a group of a plan can mount one, and on which nodes. Owns the reading of
// PersistentVolumeClaims and PersistentVolumes; they are asked for when somebody needs them and never watched.
//
//   U1  what is not known yet (a claim that waits for its first pod) constrains nothing.
import { parsePvc } from "../../model/sources/pvc.ts";
import type { KubeApi, KubeObject } from "../api/client.ts";
import { fieldsOf, listOf, textOf } from "../api/fields.ts";
import { persistentVolumeClaims, persistentVolumes } from "../api/resources.ts";

export type Requirement = { key: string; operator: string; values: readonly string[] };
/** All of its requirements; `fields` are about the node's name. */
export type NodeTerm = { labels: readonly Requirement[]; fields: readonly Requirement[] };

export type ClaimFacts =
  | { kind: "missing" }
  /** Not bound to a volume: where it can be mounted shows when it is. */
  | { kind: "unbound"; modes: readonly string[] }
  | { kind: "bound"; volume: string; modes: readonly string[]; terms: readonly NodeTerm[] };

/** The claim of a source; undefined where it lies on none. Throws FaultError. */
export function claimOf(source: string): string | undefined {
  return source.startsWith("pvc://") ? parsePvc(source).claim : undefined;
}

/** Throws KubeError. */
export async function readClaim(
  api: KubeApi,
  { namespace, claim }: { namespace: string; claim: string },
  signal: AbortSignal,
): Promise<ClaimFacts> {
  const object = await api.get(persistentVolumeClaims, claim, namespace, signal);
  if (object === undefined) return { kind: "missing" };
  const spec = fieldsOf(object.spec);
  const modes = listOf(spec.accessModes).map((mode) => textOf(mode) ?? "");
  const volume = textOf(spec.volumeName) ?? "";
  if (volume === "") return { kind: "unbound", modes };
  const found = await api.get(persistentVolumes, volume, undefined, signal);
  return { kind: "bound", volume, modes, terms: found === undefined ? [] : termsOf(found) };
}

function termsOf({ spec }: KubeObject): NodeTerm[] {
  const required = fieldsOf(fieldsOf(fieldsOf(spec).nodeAffinity).required);
  const requirement = (value: unknown): Requirement => {
    const { key, operator, values } = fieldsOf(value);
    const texts = listOf(values).map((each) => textOf(each) ?? "");
    return { key: textOf(key) ?? "", operator: textOf(operator) ?? "", values: texts };
  };
  return listOf(required.nodeSelectorTerms).map((term) => {
    const { matchExpressions, matchFields } = fieldsOf(term);
    return { labels: listOf(matchExpressions).map(requirement), fields: listOf(matchFields).map(requirement) };
  });
}

/** As the scheduler has it: one term is enough, a term without requirements is none. No terms at all: everywhere. */
export function isReachable(
  terms: readonly NodeTerm[],
  node: { name: string; labels: Readonly<Record<string, string>> },
): boolean {
  if (terms.length === 0) return true;
  return terms.some(
    ({ labels, fields }) =>
      labels.length + fields.length > 0 &&
      labels.every((each) => holds(each, node.labels[each.key])) &&
      fields.every((each) => each.key === "metadata.name" && holds(each, node.name)),
  );
}

function holds({ operator, values }: Requirement, value: string | undefined): boolean {
  const number = (text: string | undefined): number => (/^-?\d+$/.test(text ?? "") ? Number(text) : Number.NaN);
  switch (operator) {
    case "In":
      return value !== undefined && values.includes(value);
    case "NotIn":
      return value === undefined || !values.includes(value);
    case "Exists":
      return value !== undefined;
    case "DoesNotExist":
      return value === undefined;
    case "Gt":
      return number(value) > number(values[0]);
    case "Lt":
      return number(value) < number(values[0]);
    default:
      return false;
  }
}

/** `kubernetes.io/hostname in [a, b]`, for people. */
export function termsText(terms: readonly NodeTerm[]): string {
  const one = ({ key, operator, values }: Requirement): string =>
    values.length === 0 ? `${key} ${operator}` : `${key} ${operator} [${values.join(", ")}]`;
  return terms.map(({ labels, fields }) => [...labels, ...fields].map(one).join(" and ")).join(", or ");
}

/** Why groups of so many nodes cannot mount it; undefined where they can. */
export function modeFault(
  facts: ClaimFacts,
  claim: string,
  use: { workers: number; replicas: number },
): string | undefined {
  if (facts.kind === "missing") return `claim ${claim} is not there: create it in this namespace, or name another`;
  const pods = use.workers * use.replicas;
  if (pods <= 1 || facts.modes.length === 0) return undefined;
  if (facts.modes.some((mode) => mode === "ReadOnlyMany" || mode === "ReadWriteMany")) return undefined;
  const [mode = ""] = facts.modes;
  const who = mode === "ReadWriteOncePod" ? "one pod" : "one node";
  const wanted = `${use.replicas} ${use.replicas === 1 ? "replica has" : "replicas have"} ${pods} workers on nodes of their own`;
  return `claim ${claim} is ${mode}: ${who} at a time may mount it, and ${wanted}; give it ReadOnlyMany or ReadWriteMany`;
}

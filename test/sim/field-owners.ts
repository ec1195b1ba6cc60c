// Who owns which field: the part of server-side apply that Muster relies on. Owns paths and conflicts, not storage.
//
//   F1  a field that an applier has set and leaves out now is removed, unless somebody else owns it as well.
//   F2  a value that differs from the live one of another owner is a conflict; with force the other loses the field.
//   F3  applying the same again changes nothing.
//   F4  a plain write that changes a field takes it from everybody else.
//
// Lists are one value each, except those of LIST_KEYS (by the key of their items) and SETS (by value). The real server
// takes that from each kind's schema; here the name of the field decides.
import { KubeError } from "../../controller/kube/api/client.ts";
import { isRecord } from "../../controller/kube/api/wire.ts";
import { isEqual } from "./patches.ts";

const LIST_KEYS: Readonly<Record<string, string>> = {
  conditions: "type",
  ownerReferences: "uid",
  containers: "name",
  initContainers: "name",
  volumes: "name",
  env: "name",
  schedulingGates: "name",
};
const SETS: ReadonlySet<string> = new Set(["finalizers"]);

/** Identity and what the server itself writes: nobody owns these. */
const UNOWNED: ReadonlySet<string> = new Set(
  ["name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "generateName"].map(
    (field) => `metadata/${field}`,
  ),
);

type Segment = string | { key: string; value: string } | { item: string };
type Path = readonly Segment[];

/** Manager to the paths it owns. */
export type FieldOwners = ReadonlyMap<string, ReadonlySet<string>>;

const isNameOfList = (segment: Segment | undefined): segment is string => typeof segment === "string";

/** Every value that can be owned on its own, by its path. */
function leavesOf(value: unknown, path: Path = [], leaves = new Map<string, unknown>()): Map<string, unknown> {
  const last = path[path.length - 1];
  if (Array.isArray(value) && isNameOfList(last) && value.length > 0) {
    const key = LIST_KEYS[last];
    if (key !== undefined && value.every((item) => isRecord(item) && typeof item[key] === "string")) {
      for (const item of value) leavesOf(item, [...path, { key, value: String(item[key]) }], leaves);
      return leaves;
    }
    if (SETS.has(last)) {
      for (const item of value) leaves.set(JSON.stringify([...path, { item: String(item) }]), item);
      return leaves;
    }
  }
  if (isRecord(value) && Object.keys(value).length > 0) {
    for (const [field, inner] of Object.entries(value))
      if (inner !== undefined) leavesOf(inner, [...path, field], leaves);
    return leaves;
  }
  leaves.set(JSON.stringify(path), value);
  return leaves;
}

/** The fields of a whole object that can be owned. */
export function fieldsOf(object: unknown): Map<string, unknown> {
  if (!isRecord(object)) return leavesOf(object);
  const { apiVersion: _, kind: __, ...rest } = object;
  const owned = Object.entries(rest).flatMap(([field, value]): [string, unknown][] => {
    if (!isRecord(value)) return [[field, value]];
    const inner = Object.entries(value).filter(([name]) => !UNOWNED.has(`${field}/${name}`));
    const isNothing = inner.length === 0 && Object.keys(value).length > 0;
    return isNothing ? [] : [[field, Object.fromEntries(inner)]];
  });
  return owned.length === 0 ? new Map() : leavesOf(Object.fromEntries(owned));
}

const parse = (path: string): Segment[] => JSON.parse(path);

function valueAt(root: unknown, path: Path): unknown {
  let value = root;
  for (const segment of path) {
    if (typeof segment === "string") value = isRecord(value) ? value[segment] : undefined;
    else value = Array.isArray(value) ? value.find((item) => isAt(item, segment)) : undefined;
  }
  return value;
}

function isAt(item: unknown, segment: Exclude<Segment, string>): boolean {
  return "item" in segment ? item === segment.item : isRecord(item) && item[segment.key] === segment.value;
}

/** Answers a copy in which the path has the value; undefined takes it away, with what becomes empty by that. */
function withValue(root: unknown, path: Path, value: unknown): unknown {
  const [segment, ...rest] = path;
  if (segment === undefined) return value;
  if (typeof segment === "string") {
    const holder: Record<string, unknown> = isRecord(root) ? { ...root } : {};
    const inner = withValue(holder[segment], rest, value);
    if (inner === undefined) delete holder[segment];
    else holder[segment] = inner;
    return Object.keys(holder).length === 0 && value === undefined ? undefined : holder;
  }
  const list: unknown[] = Array.isArray(root) ? [...root] : [];
  const at = list.findIndex((item) => isAt(item, segment));
  const inner = withValue(at < 0 ? undefined : list[at], rest, value);
  if (inner === undefined) {
    if (at >= 0) list.splice(at, 1);
  } else if (at >= 0) list[at] = inner;
  else list.push(inner);
  return list.length === 0 && value === undefined ? undefined : list;
}

export type Applied = { object: unknown; owners: FieldOwners };

/** What the live object becomes when `manager` applies `wanted`; throws 409 where fields of others differ. */
export function applyFields(
  live: unknown,
  wanted: unknown,
  owners: FieldOwners,
  options: { manager: string; force: boolean },
): Applied {
  const fields = fieldsOf(wanted);
  const next = new Map([...owners].map(([manager, paths]) => [manager, new Set(paths)]));
  const conflicts: string[] = [];
  for (const [text, value] of fields) {
    const path = parse(text);
    if (isThere(live, path, value)) continue;
    for (const [manager, paths] of next) {
      if (manager === options.manager) continue;
      for (const taken of overlapping(paths, text, path)) {
        if (options.force) paths.delete(taken);
        else conflicts.push(`conflict with "${manager}": .${path.map(segmentText).join(".")}`);
      }
    }
  }
  if (conflicts.length > 0) {
    const count = `Apply failed with ${conflicts.length} conflict${conflicts.length > 1 ? "s" : ""}`;
    throw new KubeError(409, "Conflict", `${count}: ${conflicts.join(", ")}`);
  }
  let object = live;
  for (const text of owners.get(options.manager) ?? []) {
    const isOwnedElsewhere = [...next].some(([manager, paths]) => manager !== options.manager && paths.has(text));
    if (!fields.has(text) && !isOwnedElsewhere) object = withValue(object, parse(text), undefined) ?? {};
  }
  for (const [text, value] of fields) {
    const path = parse(text);
    if (!isThere(object, path, value)) object = withValue(object, path, value);
  }
  next.set(options.manager, new Set(fields.keys()));
  return { object, owners: next };
}

/** An empty map asks that there is a map, whatever others have in it. */
function isThere(root: unknown, path: Path, value: unknown): boolean {
  const live = valueAt(root, path);
  const isEmptyMap = isRecord(value) && Object.keys(value).length === 0;
  return isEmptyMap ? isRecord(live) : isEqual(live, value);
}

/** Owned paths that are the same as, above or below this one. */
function overlapping(paths: ReadonlySet<string>, text: string, path: Path): string[] {
  if (paths.has(text)) return [text];
  const inside = `${text.slice(0, -1)},`;
  const above = path.map((_, end) => JSON.stringify(path.slice(0, end)));
  return [...paths].filter((owned) => owned.startsWith(inside) || above.includes(owned));
}

const segmentText = (segment: Segment): string =>
  typeof segment === "string" ? segment : "item" in segment ? `[${segment.item}]` : `[${segment.key}=${segment.value}]`;

/** Both without what is equal in them: most writes change little, and paths are dear. */
function differing(one: unknown, other: unknown): [unknown, unknown] {
  if (!isRecord(one) || !isRecord(other)) return [one, other];
  const left = { ...one };
  const right = { ...other };
  for (const field of Object.keys(one)) {
    const [here, there] = [one[field], other[field]];
    if (there === undefined) continue;
    const [less, more] = isEqual(here, there) ? [{}, {}] : differing(here, there);
    // What is empty now and was not before was equal; a map that is empty by itself is a value.
    if (isEmptied(here, less)) delete left[field];
    else left[field] = less;
    if (isEmptied(there, more)) delete right[field];
    else right[field] = more;
  }
  return [left, right];
}

function isEmptied(before: unknown, pruned: unknown): boolean {
  const isNow = isRecord(pruned) && Object.keys(pruned).length === 0;
  return isNow && !(isRecord(before) && Object.keys(before).length === 0);
}

/** F4. */
export function ownersAfterWrite(before: unknown, after: unknown, owners: FieldOwners, manager: string): FieldOwners {
  const [oldPart, newPart] = differing(before, after);
  const old = fieldsOf(oldPart);
  const now = fieldsOf(newPart);
  const next = new Map([...owners].map(([name, paths]) => [name, new Set(paths)]));
  const own = next.get(manager) ?? new Set<string>();
  next.set(manager, own);
  for (const path of old.keys()) if (!now.has(path)) for (const paths of next.values()) paths.delete(path);
  for (const [path, value] of now) {
    if (old.has(path) && isEqual(old.get(path), value)) continue;
    for (const paths of next.values()) paths.delete(path);
    own.add(path);
  }
  return next;
}

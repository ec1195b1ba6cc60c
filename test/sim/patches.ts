// JSON patch (RFC 6902) and JSON merge patch (RFC 7386) on plain values. Both answer a new value and leave the old alone.
import { KubeError } from "../../controller/kube/api/client.ts";
import { isRecord } from "../../controller/kube/api/wire.ts";

type Holder = Record<string, unknown> | unknown[];

const refuse = (detail: string): KubeError => new KubeError(422, "Invalid", detail);

export function mergePatch(target: unknown, patch: unknown): unknown {
  if (!isRecord(patch)) return patch;
  const merged: Record<string, unknown> = isRecord(target) ? { ...target } : {};
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete merged[key];
    else merged[key] = mergePatch(merged[key], value);
  }
  return merged;
}

/** All or nothing; a `test` that fails is 422, as the API server has it. */
export function jsonPatch(target: unknown, patch: unknown): unknown {
  if (!Array.isArray(patch)) throw new KubeError(400, "BadRequest", "a JSON patch is a list of operations");
  const root: Record<string, unknown> = { root: structuredClone(target) };
  for (const operation of patch) applyOperation(root, operation);
  return root.root;
}

function applyOperation(root: Record<string, unknown>, operation: unknown): void {
  if (!isRecord(operation) || typeof operation.path !== "string") throw refuse("a JSON patch operation has no path");
  const path = ["root", ...segmentsOf(operation.path)];
  switch (operation.op) {
    case "add":
      put(root, path, structuredClone(operation.value), true);
      return;
    case "replace":
      if (read(root, path) === undefined) throw refuse(`replace: ${operation.path} is missing`);
      put(root, path, structuredClone(operation.value), false);
      return;
    case "remove":
      remove(root, path);
      return;
    case "test":
      if (!isEqual(read(root, path), operation.value)) {
        throw refuse("the server rejected our request due to an error in our request");
      }
      return;
    case "copy":
    case "move": {
      const from = ["root", ...segmentsOf(String(operation.from))];
      const value = structuredClone(read(root, from));
      if (operation.op === "move") remove(root, from);
      put(root, path, value, true);
      return;
    }
    default:
      throw refuse(`unknown JSON patch operation ${String(operation.op)}`);
  }
}

function segmentsOf(pointer: string): string[] {
  if (pointer === "") return [];
  if (!pointer.startsWith("/")) throw refuse(`not a JSON pointer: ${pointer}`);
  return pointer
    .slice(1)
    .split("/")
    .map((segment) => segment.replaceAll("~1", "/").replaceAll("~0", "~"));
}

function isHolder(value: unknown): value is Holder {
  return typeof value === "object" && value !== null;
}

function read(root: unknown, path: readonly string[]): unknown {
  let value = root;
  for (const segment of path) {
    if (Array.isArray(value)) value = value[Number(segment)];
    else if (isRecord(value)) value = value[segment];
    else return undefined;
  }
  return value;
}

function holderOf(root: Record<string, unknown>, path: readonly string[]): Holder {
  const holder = read(root, path.slice(0, -1));
  if (!isHolder(holder)) throw refuse(`no parent at /${path.slice(1, -1).join("/")}`);
  return holder;
}

function put(root: Record<string, unknown>, path: readonly string[], value: unknown, isInsert: boolean): void {
  const holder = holderOf(root, path);
  const last = path[path.length - 1] ?? "";
  if (!Array.isArray(holder)) {
    holder[last] = value;
    return;
  }
  const at = last === "-" ? holder.length : Number(last);
  if (!Number.isInteger(at) || at < 0 || at > holder.length)
    throw refuse(`no index ${last} at /${path.slice(1).join("/")}`);
  holder.splice(at, isInsert ? 0 : 1, value);
}

function remove(root: Record<string, unknown>, path: readonly string[]): void {
  if (read(root, path) === undefined) throw refuse(`remove: /${path.slice(1).join("/")} is missing`);
  const holder = holderOf(root, path);
  const last = path[path.length - 1] ?? "";
  if (Array.isArray(holder)) holder.splice(Number(last), 1);
  else delete holder[last];
}

/** A copy that its owner may go on changing; what is frozen, as stored objects are, is shared. */
export function copyOf<T>(value: T): T;
export function copyOf(value: unknown): unknown {
  if (typeof value !== "object" || value === null || Object.isFrozen(value)) return value;
  if (Array.isArray(value)) return value.map((item: unknown) => copyOf(item));
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, copyOf(inner)]));
}

/** As JSON has it: the order of keys says nothing, undefined is absence. */
export function isEqual(one: unknown, other: unknown): boolean {
  if (one === other) return true;
  if (Array.isArray(one)) {
    return Array.isArray(other) && one.length === other.length && one.every((value, at) => isEqual(value, other[at]));
  }
  if (!isRecord(one) || !isRecord(other)) return false;
  const keys = new Set([...Object.keys(one), ...Object.keys(other)]);
  return [...keys].every((key) => isEqual(one[key], other[key]));
}

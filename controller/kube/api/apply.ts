// How the controller writes what it owns: whole by server-side apply under one name, or single fields by a patch that names
// the version it was made for. Owns the manager's name and owner references; what is wanted is the caller's.
//
//   Y1  applying the same twice is one change; what is left out of the second is taken away, what others have added stays.
//       Empty maps are left out by whoever builds the object: the core's kinds drop them, so that each apply of one would be a
//       change, and a conflict between two who do.
//   Y2  fields that the controller applies are its own: it takes them from others (force) and never asks for more than it needs.
import type { KubeApi, KubeObject, OwnerReference, Resource } from "./client.ts";

/** For ever: another name would leave the fields of the old one behind. */
export const FIELD_MANAGER = "muster-controller";

export async function applyOwned(
  api: KubeApi,
  resource: Resource,
  object: KubeObject,
  options: { signal: AbortSignal; dryRun?: boolean },
): Promise<KubeObject> {
  const { name, namespace } = object.metadata;
  const patch = { type: "apply", fieldManager: FIELD_MANAGER, force: true, dryRun: options.dryRun ?? false } as const;
  return api.patch(resource, name, namespace, object, patch, options.signal);
}

/** As in RFC 6902. */
export type JsonOperation =
  | { op: "add" | "replace" | "test"; path: string; value: unknown }
  | { op: "remove"; path: string };

/**
 * Operations that happen together, and only to the object as it was looked at: 409 where it is another version by now. A
 * `test` of the version would be 422, which is also what a refused object is, and so would not say which of the two it was.
 */
export async function patchSeen(
  api: KubeApi,
  resource: Resource,
  seen: KubeObject,
  options: { operations: readonly JsonOperation[]; signal: AbortSignal; dryRun?: boolean },
): Promise<KubeObject> {
  const { name, namespace, resourceVersion } = seen.metadata;
  if (!resourceVersion)
    throw new Error(`${resource.plural}/${name}: only an object that was read can be patched as seen`);
  const guard: JsonOperation = { op: "replace", path: "/metadata/resourceVersion", value: resourceVersion };
  const patch = { type: "json", fieldManager: FIELD_MANAGER, dryRun: options.dryRun ?? false } as const;
  return api.patch(resource, name, namespace, [guard, ...options.operations], patch, options.signal);
}

/** A segment of a JSON pointer ("muster.dev/gang" has a slash). */
export function pointerSegment(text: string): string {
  return text.replaceAll("~", "~0").replaceAll("/", "~1");
}

/**
 * Ties the life of an object to its owner's. `isController`: the one that manages it. Deleting the owner does not wait for it:
 * that would need the right to set finalizers, and hang where the collector is down.
 */
export function ownerReferenceTo(owner: KubeObject, isController = true): OwnerReference {
  const { name, uid } = owner.metadata;
  if (!uid)
    throw new Error(`${owner.kind} ${name} has no uid: only an object that the server has stored can be an owner`);
  return {
    apiVersion: owner.apiVersion,
    kind: owner.kind,
    name,
    uid,
    controller: isController,
    blockOwnerDeletion: false,
  };
}

// The line to a Kubernetes API server: what every other file of controller/kube works over. Owns the shapes and the meaning
// of failures; http-api.ts speaks it over HTTP, the simulator of the tests keeps it in memory.
//
//   A1  objects are JSON as the server has it: nothing is renamed, dropped or given a default on the way.
//   A2  objects may be shared: nobody changes one in place.
//   A3  every call ends: with its answer, with a KubeError, or with the reason of its signal when that aborts.
//   A4  a write that fails with code 0 (no answer) or 5xx may have happened: look before doing it again.

export type Resource = { group: string; version: string; plural: string; kind: string; namespaced: boolean };

export type OwnerReference = {
  readonly apiVersion: string;
  readonly kind: string;
  readonly name: string;
  readonly uid: string;
  readonly controller?: boolean;
  readonly blockOwnerDeletion?: boolean;
};

export type ObjectMeta = {
  readonly name: string;
  readonly generateName?: string;
  readonly namespace?: string;
  readonly uid?: string;
  readonly resourceVersion?: string;
  readonly generation?: number;
  readonly labels?: Readonly<Record<string, string>>;
  readonly annotations?: Readonly<Record<string, string>>;
  readonly ownerReferences?: readonly OwnerReference[];
  readonly finalizers?: readonly string[];
  readonly creationTimestamp?: string;
  readonly deletionTimestamp?: string;
  readonly deletionGracePeriodSeconds?: number;
};

/** Fields besides spec and status (data of a Secret, subsets of an older kind) are there as the server has them. */
export type KubeObject = {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: ObjectMeta;
  readonly spec?: unknown;
  readonly status?: unknown;
  readonly [field: string]: unknown;
};

export type Selection = { namespace?: string; labelSelector?: string; fieldSelector?: string };

/** `resourceVersion` is for a list that may be as old as that; left out the answer is the newest there is. */
export type ListOptions = Selection & { limit?: number; continue?: string; resourceVersion?: string };

/** `continue` is empty on the last page. */
export type KubeList = { readonly items: readonly KubeObject[]; readonly resourceVersion: string; continue: string };

/** Without a version it begins with an ADDED line for each object there is. */
export type WatchOptions = Selection & { resourceVersion: string; timeoutSeconds: number };

export type WatchLine =
  | { type: "ADDED" | "MODIFIED" | "DELETED"; object: KubeObject }
  /** Nothing of this selection has changed up to this version. */
  | { type: "BOOKMARK"; resourceVersion: string }
  /** The server ends the watch; 410 says that the version is too old to go on from. */
  | { type: "ERROR"; error: KubeError };

export type WriteOptions = { dryRun?: boolean; fieldManager?: string };

export type PatchOptions = WriteOptions & {
  type: "json" | "merge" | "apply";
  /** Of "apply": take fields that another manager owns. */
  force?: boolean;
  subresource?: string;
};

export type DeleteOptions = {
  preconditions?: { uid?: string; resourceVersion?: string };
  gracePeriodSeconds?: number;
  propagationPolicy?: "Background" | "Foreground" | "Orphan";
};

export interface KubeApi {
  /** Undefined where there is no such object; a kind that is not served is a KubeError 404. */
  get(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    signal: AbortSignal,
  ): Promise<KubeObject | undefined>;
  /** One page. */
  list(resource: Resource, options: ListOptions, signal: AbortSignal): Promise<KubeList>;
  /** Ends by itself at about `timeoutSeconds`; throws where the connection is lost. */
  watch(resource: Resource, options: WatchOptions, signal: AbortSignal): AsyncIterable<WatchLine>;
  create(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions): Promise<KubeObject>;
  /** Everything but the status; refused with 409 where metadata.resourceVersion is given and is not the newest. */
  replace(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions): Promise<KubeObject>;
  /** The status alone; metadata.resourceVersion as in replace. */
  replaceStatus(
    resource: Resource,
    object: KubeObject,
    signal: AbortSignal,
    options?: WriteOptions,
  ): Promise<KubeObject>;
  patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ): Promise<KubeObject>;
  /** Resolves to whether there was one to delete; it may be there for a while (grace, finalizers). */
  delete(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    options: DeleteOptions,
    signal: AbortSignal,
  ): Promise<boolean>;
  /** Whether the server has this kind at this version. */
  serves(resource: Resource, signal: AbortSignal): Promise<boolean>;
}

/** `code` is the HTTP status, 0 where there was no answer; `reason` is the server's word ("Conflict"), or one of our own. */
export class KubeError extends Error {
  readonly code: number;
  readonly reason: string;
  /** The server's wish: not before. */
  readonly retryAfterMs: number | undefined;

  constructor(code: number, reason: string, message: string, options: { retryAfterMs?: number; cause?: unknown } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = "KubeError";
    this.code = code;
    this.reason = reason;
    this.retryAfterMs = options.retryAfterMs;
  }
}

/** Narrower than KubeError, so that "not this one" still leaves the others. */
type KubeErrorOf<Code extends number> = KubeError & { readonly code: Code };

const hasCode = <Code extends number>(error: unknown, code: Code): error is KubeErrorOf<Code> =>
  error instanceof KubeError && error.code === code;

/** Somebody else has written meanwhile, or (apply) owns the field. */
export const isConflict = (error: unknown): error is KubeErrorOf<409> =>
  hasCode(error, 409) && error.reason !== "AlreadyExists";
export const isAlreadyThere = (error: unknown): error is KubeErrorOf<409> =>
  hasCode(error, 409) && error.reason === "AlreadyExists";
export const isNotFound = (error: unknown): error is KubeErrorOf<404> => hasCode(error, 404);
/** The version asked for has been compacted away: list again. */
export const isGone = (error: unknown): error is KubeErrorOf<410> => hasCode(error, 410);
/** The object itself is refused: a person must change something, trying again cannot help. */
export const isRefused = (error: unknown): error is KubeErrorOf<400 | 403 | 405 | 413 | 415 | 422> =>
  error instanceof KubeError && [400, 403, 405, 413, 415, 422].includes(error.code);

/** Later it may go well; a write may have happened all the same (A4) unless the code is 429. */
export const isTransient = (error: unknown): error is KubeErrorOf<0 | 429 | 500 | 502 | 503 | 504> =>
  error instanceof KubeError && (error.code === 0 || error.code === 429 || error.code >= 500);

/** "pods/default/web-1", "nodes/gpu-3": how messages and keys name an object. */
export function titleOf(resource: Resource, name: string, namespace?: string): string {
  return namespace ? `${resource.plural}/${namespace}/${name}` : `${resource.plural}/${name}`;
}

/** The key of an object among those of its kind. */
export function keyOf(object: KubeObject): string {
  const { name, namespace } = object.metadata;
  return namespace ? `${namespace}/${name}` : name;
}

export function apiVersionOf(resource: Resource): string {
  return resource.group ? `${resource.group}/${resource.version}` : resource.version;
}

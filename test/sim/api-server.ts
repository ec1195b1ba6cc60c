// A Kubernetes API server in memory: KubeApi with the behaviour that the controller depends on, in virtual time.
//
// Owns: versions, optimistic concurrency, consistent pages, watches with bookmarks and compaction, status subresources,
// generations, JSON/merge/apply patches, deletion with grace and finalizers, garbage collection by owner.
// Not here: schemas and CEL (give `admit`), authorization, namespaces that must exist, quotas, defaults of the core's kinds,
// a scheduler, a kubelet (tests bind pods and write their status). managedFields are kept but not shown.
//
//   S1  an operation happens in one moment: no other comes between its look and its write.
//   S2  a write that changes nothing makes no version.
import {
  type DeleteOptions,
  type KubeApi,
  KubeError,
  type KubeList,
  type KubeObject,
  keyOf,
  type ListOptions,
  type PatchOptions,
  type Resource,
  type WatchLine,
  type WatchOptions,
  type WriteOptions,
} from "../../controller/kube/api/client.ts";
import { objectOf } from "../../controller/kube/api/wire.ts";
import type { FieldOwners } from "./field-owners.ts";
import { defaultKinds, type KindRules } from "./kinds.ts";
import { type Change, ObjectLog } from "./object-log.ts";
import { type Admit, conflict, ObjectWriter, type Target, writeOf } from "./object-writer.ts";
import { copyOf, jsonPatch, mergePatch } from "./patches.ts";
import { selectorOf } from "./selector.ts";
import type { VirtualTime } from "./virtual-time.ts";
import { Watchers } from "./watchers.ts";

export type SimApiOptions = {
  kinds?: readonly KindRules[];
  /** Changes that watches can be resumed over and old pages read from. */
  historyMax?: number;
  bookmarkEveryMs?: number;
  /** How long the garbage collector takes. */
  garbageDelayMs?: number;
  /** Throws a KubeError where an object may not be written; after the server's own checks. */
  admit?: Admit;
};

export class SimApiServer implements KubeApi {
  readonly #log: ObjectLog;
  readonly #watchers: Watchers;
  readonly #writer: ObjectWriter;
  readonly #kinds = new Map<string, KindRules>();
  readonly #listeners: ((change: Change) => void)[] = [];

  constructor(time: VirtualTime, options: SimApiOptions = {}) {
    this.#log = new ObjectLog(options.historyMax ?? 100_000);
    this.#watchers = new Watchers(time, this.#log, options.bookmarkEveryMs ?? 60_000);
    for (const kind of options.kinds ?? defaultKinds()) this.#kinds.set(kindKey(kind.resource), kind);
    this.#writer = new ObjectWriter(time, this.#log, {
      rulesOf: (resource) => this.#rules(resource),
      admit: options.admit ?? (() => {}),
      garbageDelayMs: options.garbageDelayMs ?? 100,
      tell: (change) => {
        for (const listener of this.#listeners) listener(change);
        this.#watchers.tell(change);
      },
    });
  }

  // --- what tests see and do beyond the API ---

  /** By key; frozen. */
  objects(resource: Resource): readonly KubeObject[] {
    return this.#log.snapshot(resource, this.#log.version);
  }

  get version(): string {
    return String(this.#log.version);
  }

  get watchCount(): number {
    return this.#watchers.openCount;
  }

  /** Called within each change, before anybody is told: the place for invariants. */
  onChange(listener: (change: Change) => void): void {
    this.#listeners.push(listener);
  }

  /** Forgets all history: watches that resume and pages that go on from before are 410. */
  compact(): void {
    this.#log.compact();
  }

  /** Breaks every open watch. */
  dropWatches(): void {
    this.#watchers.drop();
  }

  /** Which paths each manager owns. */
  ownersOf(object: KubeObject): FieldOwners {
    return this.#writer.ownersOf(object);
  }

  // --- KubeApi ---

  async get(resource: Resource, name: string, namespace: string | undefined, signal: AbortSignal) {
    signal.throwIfAborted();
    const { key } = this.#target(resource, name, namespace);
    return this.#log.read(resource, key);
  }

  async list(resource: Resource, options: ListOptions, signal: AbortSignal): Promise<KubeList> {
    signal.throwIfAborted();
    this.#rules(resource);
    const page = pageOf(options.continue, this.#log.version);
    if (page.version < this.#log.compacted) {
      throw new KubeError(
        410,
        "Expired",
        "The provided continue parameter is too old to display a consistent list result",
      );
    }
    const isSelected = selectorOf(options);
    const all = this.#log.snapshot(resource, page.version);
    const limit = options.limit || Number.POSITIVE_INFINITY;
    const items: KubeObject[] = [];
    let last: string | undefined;
    for (let at = firstAfter(all, page.after); at < all.length; at += 1) {
      const object = all[at];
      if (object === undefined || !isSelected(object)) continue;
      if (items.length === limit) {
        return { items, resourceVersion: String(page.version), continue: JSON.stringify({ ...page, after: last }) };
      }
      items.push(object);
      last = keyOf(object);
    }
    return { items, resourceVersion: String(page.version), continue: "" };
  }

  async *watch(resource: Resource, options: WatchOptions, signal: AbortSignal): AsyncGenerator<WatchLine> {
    signal.throwIfAborted();
    this.#rules(resource);
    yield* this.#watchers.stream(resource, options, signal);
  }

  async create(resource: Resource, object: KubeObject, signal: AbortSignal, options: WriteOptions = {}) {
    signal.throwIfAborted();
    return this.#writer.create(this.#rules(resource), copyOf(object), writeOf(options));
  }

  async replace(resource: Resource, object: KubeObject, signal: AbortSignal, options: WriteOptions = {}) {
    signal.throwIfAborted();
    const target = this.#target(resource, object.metadata.name, object.metadata.namespace);
    return this.#writer.update(target, copyOf(object), writeOf(options));
  }

  async replaceStatus(resource: Resource, object: KubeObject, signal: AbortSignal, options: WriteOptions = {}) {
    signal.throwIfAborted();
    const target = this.#target(resource, object.metadata.name, object.metadata.namespace);
    return this.#writer.update(target, copyOf(object), writeOf(options, "status"));
  }

  async patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ): Promise<KubeObject> {
    signal.throwIfAborted();
    const target = this.#target(resource, name, namespace);
    const write = writeOf(options, options.subresource);
    const change = copyOf(body);
    if (options.type === "apply") {
      const manager = options.fieldManager ?? "";
      if (manager === "")
        throw new KubeError(422, "Invalid", "fieldManager: Required value: is required for apply patch");
      return this.#writer.apply(target, objectOf(change, resource), { ...write, manager }, options.force ?? false);
    }
    const live = this.#writer.live(target);
    const patched = options.type === "json" ? jsonPatch(live, change) : mergePatch(live, change);
    return this.#writer.update(target, objectOf(patched, resource), write);
  }

  async delete(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    options: DeleteOptions,
    signal: AbortSignal,
  ): Promise<boolean> {
    signal.throwIfAborted();
    const target = this.#target(resource, name, namespace);
    const live = this.#log.read(resource, target.key);
    if (live === undefined) return false;
    const { uid, resourceVersion } = options.preconditions ?? {};
    if (uid !== undefined && uid !== live.metadata.uid)
      throw conflict(target, `the UID in the precondition (${uid}) is another`);
    if (resourceVersion !== undefined && resourceVersion !== live.metadata.resourceVersion) {
      throw conflict(target, `the version in the precondition (${resourceVersion}) is not the newest`);
    }
    this.#writer.remove(target, live, options);
    return true;
  }

  async serves(resource: Resource, signal: AbortSignal): Promise<boolean> {
    signal.throwIfAborted();
    return this.#kinds.has(kindKey(resource));
  }

  #rules(resource: Resource): KindRules {
    const rules = this.#kinds.get(kindKey(resource));
    if (rules === undefined)
      throw new KubeError(404, "NotFound", `the server could not find the requested resource ${resource.plural}`);
    return rules;
  }

  #target(resource: Resource, name: string, namespace: string | undefined): Target {
    const rules = this.#rules(resource);
    return { rules, key: resource.namespaced && namespace ? `${namespace}/${name}` : name };
  }
}

const kindKey = ({ group, version, plural }: Resource): string => `${group}/${version}/${plural}`;

/** A page goes on after a key, at the version of its first page. */
function pageOf(token: string | undefined, version: number): { version: number; after: string } {
  if (!token) return { version, after: "" };
  try {
    const page: { version: number; after: string } = JSON.parse(token);
    return page;
  } catch {
    throw new KubeError(400, "BadRequest", "continue key is not valid");
  }
}

function firstAfter(objects: readonly KubeObject[], key: string): number {
  let low = 0;
  let high = objects.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    const object = objects[middle];
    if (object !== undefined && keyOf(object) <= key && key !== "") low = middle + 1;
    else high = middle;
  }
  return low;
}

// What is known of the objects of one kind, indexed by namespace, owner and chosen labels. Owns the copy and the news about
// it; where it comes from is the reflector's (and, for one's own writes, whoever made them).
//
//   K1  an object is never replaced by an older version of itself, nor brought back after its deletion has been seen; but a
//       whole list that is older than what was watched before is a server that went back (a restored backup), and is believed.
//   K2  each change is told once, after the store has it: the listeners see the new state.
//   K3  what vanished unseen (between two lists) is told as deleted with its last known state, and marked so.
//   K4  an object of an old name and a new uid is another: told as deleted, then added.
import { type KubeObject, keyOf } from "../api/client.ts";

export type Delta =
  | { kind: "added"; object: KubeObject }
  | { kind: "updated"; object: KubeObject; before: KubeObject }
  /** `isFinal`: the object as it was when it went; else as it was last seen. */
  | { kind: "deleted"; object: KubeObject; isFinal: boolean };

export type Listener = (delta: Delta) => void;

export type StoreOptions = {
  /** Keys of labels to look up by. */
  labels?: readonly string[];
  /** What is kept of an object; smaller is better where there are 100,000. Keep metadata. */
  keep?: (object: KubeObject) => KubeObject;
};

/** Deletions that are remembered against late news (K1): more than can be under way at once. */
const TOMBSTONES_MAX = 10_000;

type Index = Map<string, Set<KubeObject>>;

export class Store {
  readonly #objects = new Map<string, KubeObject>();
  readonly #namespaces: Index = new Map();
  readonly #owners: Index = new Map();
  readonly #labels: ReadonlyMap<string, Index>;
  readonly #listeners = new Set<Listener>();
  /** Uid -> version at which it was gone: an object that left a selection may come back, newer. */
  readonly #tombstones = new Map<string, string>();
  readonly #keep: (object: KubeObject) => KubeObject;
  readonly #synced = Promise.withResolvers<void>();
  #isSynced = false;
  /** The newest version that the server itself has told of. */
  #watched: string | undefined;
  #heardMs: number | undefined;

  constructor(options: StoreOptions = {}) {
    this.#labels = new Map((options.labels ?? []).map((label) => [label, new Map()]));
    this.#keep = options.keep ?? withoutManagedFields;
  }

  get size(): number {
    return this.#objects.size;
  }

  /** Whether it has been whole once. Before that, absence says nothing. */
  get isSynced(): boolean {
    return this.#isSynced;
  }

  /** When the server was last heard of; undefined before the first list. */
  get heardMs(): number | undefined {
    return this.#heardMs;
  }

  /** Resolves when it has been whole once; rejects with the signal's reason. */
  async synced(signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (this.#isSynced) return;
    const aborted = Promise.withResolvers<never>();
    const onAbort = () => aborted.reject(signal.reason);
    signal.addEventListener("abort", onAbort, { once: true });
    await Promise.race([this.#synced.promise, aborted.promise]).finally(() =>
      signal.removeEventListener("abort", onAbort),
    );
  }

  /** "namespace/name", or the name of what has no namespace. */
  get(key: string): KubeObject | undefined {
    return this.#objects.get(key);
  }

  all(): Iterable<KubeObject> {
    return this.#objects.values();
  }

  inNamespace(namespace: string): readonly KubeObject[] {
    return [...(this.#namespaces.get(namespace) ?? [])];
  }

  ownedBy(uid: string): readonly KubeObject[] {
    return [...(this.#owners.get(uid) ?? [])];
  }

  /** Throws where the label is not one of those the store was made with. */
  labelled(label: string, value: string): readonly KubeObject[] {
    const index = this.#labels.get(label);
    if (index === undefined) throw new Error(`the store has no index for label ${label}`);
    return [...(index.get(value) ?? [])];
  }

  /** Answers how to stop. What is there already is not told. */
  subscribe(listener: Listener): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** One's own write, ahead of the watch: so that the next look shows it. */
  learn(object: KubeObject): void {
    this.#put(object, "learned");
  }

  // --- the reflector's side ---

  /** What would be kept of it; of what is kept already: the same again. */
  kept(object: KubeObject): KubeObject {
    return this.#keep(object);
  }

  /** The whole of it, as of that version. */
  replace(objects: readonly KubeObject[], version: string): void {
    const wentBack = isNewer(this.#watched, version);
    const listed = new Map(objects.map((object) => [keyOf(object), object]));
    for (const [key, known] of [...this.#objects]) {
      // Learned from an answer newer than this list: the list cannot know it.
      const isAhead = !wentBack && isNewer(known.metadata.resourceVersion, version);
      if (!listed.has(key) && !isAhead) this.#remove(key, { last: known, isFinal: false, version });
    }
    if (wentBack) this.#tombstones.clear();
    for (const object of listed.values()) this.#put(object, wentBack ? "restored" : "watched");
    this.#watched = version;
    this.#isSynced = true;
    this.#synced.resolve();
  }

  put(object: KubeObject): void {
    this.#put(object, "watched");
    this.#watched = object.metadata.resourceVersion;
  }

  remove(object: KubeObject): void {
    const { uid, resourceVersion: version } = object.metadata;
    const known = this.#objects.get(keyOf(object));
    this.#watched = version;
    if (known?.metadata.uid !== uid) this.#bury(uid, version);
    else if (!isNewer(known?.metadata.resourceVersion, version)) {
      this.#remove(keyOf(object), { last: this.#keep(object), isFinal: true, version });
    }
  }

  heard(nowMs: number): void {
    this.#heardMs = nowMs;
  }

  #put(object: KubeObject, from: "watched" | "learned" | "restored"): void {
    const key = keyOf(object);
    const known = this.#objects.get(key);
    const { uid, resourceVersion } = object.metadata;
    const goneAt = uid === undefined ? undefined : this.#tombstones.get(uid);
    if (goneAt !== undefined && !isNewer(resourceVersion, goneAt)) return;
    if (known !== undefined && known.metadata.uid === uid && from !== "restored") {
      const isSame = known.metadata.resourceVersion === resourceVersion;
      if (isSame || isNewer(known.metadata.resourceVersion, resourceVersion)) return;
      if (from === "learned" && !isNewer(resourceVersion, known.metadata.resourceVersion)) return;
    }
    const kept = this.#keep(object);
    if (known !== undefined && known.metadata.uid !== uid) {
      this.#remove(key, { last: known, isFinal: false, version: resourceVersion });
    }
    const before = known?.metadata.uid === uid ? known : undefined;
    if (before !== undefined) this.#unindex(before);
    this.#objects.set(key, kept);
    this.#index(kept);
    this.#tell(before === undefined ? { kind: "added", object: kept } : { kind: "updated", object: kept, before });
  }

  /** `last` is told; what is stored may be older. */
  #remove(key: string, gone: { last: KubeObject; isFinal: boolean; version: string | undefined }): void {
    const known = this.#objects.get(key);
    if (known === undefined) return;
    this.#objects.delete(key);
    this.#unindex(known);
    this.#bury(known.metadata.uid, gone.version);
    this.#tell({ kind: "deleted", object: gone.last, isFinal: gone.isFinal });
  }

  #bury(uid: string | undefined, version: string | undefined): void {
    if (uid === undefined || !isVersion(version)) return;
    this.#tombstones.set(uid, version);
    if (this.#tombstones.size <= TOMBSTONES_MAX) return;
    const [oldest] = this.#tombstones.keys();
    if (oldest !== undefined) this.#tombstones.delete(oldest);
  }

  #tell(delta: Delta): void {
    for (const listener of this.#listeners) listener(delta);
  }

  #index(object: KubeObject): void {
    for (const [index, value] of this.#placesOf(object)) {
      const there = index.get(value) ?? new Set();
      index.set(value, there.add(object));
    }
  }

  #unindex(object: KubeObject): void {
    for (const [index, value] of this.#placesOf(object)) {
      const there = index.get(value);
      there?.delete(object);
      if (there?.size === 0) index.delete(value);
    }
  }

  *#placesOf({ metadata }: KubeObject): Generator<[Index, string]> {
    if (metadata.namespace !== undefined) yield [this.#namespaces, metadata.namespace];
    for (const owner of metadata.ownerReferences ?? []) yield [this.#owners, owner.uid];
    for (const [label, index] of this.#labels) {
      const value = metadata.labels?.[label];
      if (value !== undefined) yield [index, value];
    }
  }
}

/** Versions are numbers since Kubernetes 1.35 says so, and have always been in etcd; of anything else nothing is concluded. */
function isNewer(one: string | undefined, other: string | undefined): boolean {
  return isVersion(one) && isVersion(other) && (one.length === other.length ? one > other : one.length > other.length);
}

const isVersion = (version: string | undefined): version is string =>
  version !== undefined && /^[1-9]\d*$/.test(version);

/** Often half of an object, and nobody here reads it. */
function withoutManagedFields(object: KubeObject): KubeObject {
  if (!("managedFields" in object.metadata)) return object;
  const { managedFields: _, ...metadata } = object.metadata;
  return { ...object, metadata };
}

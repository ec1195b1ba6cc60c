// Every object of the simulated API server and every change to one: a table for each kind under one counter, as in etcd.
//
//   O1  versions grow by one with each change, over all kinds.
//   O2  an object is frozen when it is stored: who is handed it cannot change what others see.
//   O3  what is older than the compacted version cannot be read or watched from any more.
import { type KubeObject, keyOf, type Resource } from "../../controller/kube/api/client.ts";

export type Change = {
  version: number;
  resource: Resource;
  key: string;
  before: KubeObject | undefined;
  /** Undefined where the object has gone. */
  after: KubeObject | undefined;
  /** `after`, or what was deleted at the version of its deletion. */
  object: KubeObject;
};

type Table = { objects: Map<string, KubeObject>; sorted: readonly KubeObject[] | undefined; changes: Change[] };

export class ObjectLog {
  #version = 1000;
  #compacted = 1000;
  readonly #tables = new Map<string, Table>();
  readonly #historyMax: number;

  constructor(historyMax: number) {
    this.#historyMax = historyMax;
  }

  get version(): number {
    return this.#version;
  }

  /** Watches may begin here or later. */
  get compacted(): number {
    return Math.max(this.#compacted, this.#version - this.#historyMax);
  }

  compact(): void {
    this.#compacted = this.#version;
    for (const table of this.#tables.values()) table.changes = [];
  }

  read(resource: Resource, key: string): KubeObject | undefined {
    return this.#table(resource).objects.get(key);
  }

  /** Stores it at the next version; `object` undefined takes it away. */
  write(resource: Resource, key: string, object: KubeObject | undefined): Change {
    const table = this.#table(resource);
    const before = table.objects.get(key);
    const basis = object ?? before;
    if (basis === undefined) throw new Error(`${resource.plural}/${key} is not there to be removed`);
    this.#version += 1;
    const metadata = { ...basis.metadata, resourceVersion: String(this.#version) };
    const stored = freeze({ ...basis, metadata });
    const after = object === undefined ? undefined : stored;
    if (after === undefined) table.objects.delete(key);
    else table.objects.set(key, after);
    table.sorted = undefined;
    const change: Change = { version: this.#version, resource, key, before, after, object: stored };
    table.changes.push(change);
    if (table.changes.length > 2 * this.#historyMax) table.changes.splice(0, table.changes.length - this.#historyMax);
    return change;
  }

  /** By key, as of that version (not older than the compacted one). */
  snapshot(resource: Resource, version: number): readonly KubeObject[] {
    const table = this.#table(resource);
    const later = table.changes.filter((change) => change.version > version);
    if (later.length === 0) {
      table.sorted ??= sorted(table.objects);
      return table.sorted;
    }
    const objects = new Map(table.objects);
    for (const change of later.reverse()) {
      if (change.before === undefined) objects.delete(change.key);
      else objects.set(change.key, change.before);
    }
    return sorted(objects);
  }

  since(resource: Resource, version: number): readonly Change[] {
    return this.#table(resource).changes.filter((change) => change.version > version);
  }

  #table(resource: Resource): Table {
    const name = `${resource.group}/${resource.plural}`;
    let table = this.#tables.get(name);
    if (table === undefined) this.#tables.set(name, (table = { objects: new Map(), sorted: undefined, changes: [] }));
    return table;
  }
}

function sorted(objects: ReadonlyMap<string, KubeObject>): KubeObject[] {
  return [...objects.values()].sort((one, other) => (keyOf(one) < keyOf(other) ? -1 : 1));
}

function freeze<T>(value: T): T {
  if (typeof value === "object" && value !== null && !Object.isFrozen(value)) {
    Object.freeze(value);
    for (const inner of Object.values(value)) freeze(inner);
  }
  return value;
}

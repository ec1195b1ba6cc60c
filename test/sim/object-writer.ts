// How the simulated API server changes objects: what each kind of write may touch, who owns the fields after it, when an
// object really goes. Owns field owners and the garbage collector; versions are the log's, who may ask what is api-server.ts.
import {
  type DeleteOptions,
  KubeError,
  type KubeObject,
  keyOf,
  type Resource,
  titleOf,
  type WriteOptions,
} from "../../controller/kube/api/client.ts";
import { objectOf } from "../../controller/kube/api/wire.ts";
import { applyFields, type FieldOwners, fieldsOf, ownersAfterWrite } from "./field-owners.ts";
import { FOREGROUND, Garbage, ORPHAN, type Reference } from "./garbage.ts";
import { checkShape, type KindRules } from "./kinds.ts";
import type { Change, ObjectLog } from "./object-log.ts";
import { isEqual } from "./patches.ts";
import type { VirtualTime } from "./virtual-time.ts";

export type Target = { rules: KindRules; key: string };
export type Write = { manager: string; subresource: string; dryRun: boolean };
export type Admit = (object: KubeObject, before: KubeObject | undefined, resource: Resource) => void;

export type WriterOptions = {
  rulesOf: (resource: Resource) => KindRules;
  admit: Admit;
  tell: (change: Change) => void;
  garbageDelayMs: number;
};

const MANAGER = "unknown";

function isSame(one: FieldOwners, other: FieldOwners): boolean {
  const listed = (owners: FieldOwners) =>
    [...owners].map(([manager, paths]) => [manager, [...paths].toSorted()]).toSorted();
  return isEqual(listed(one), listed(other));
}

/** Plain writes and applies of one name are two owners, as on the real server. */
const updaterOf = (manager: string): string => `${manager} (update)`;

export class ObjectWriter {
  readonly #time: VirtualTime;
  readonly #log: ObjectLog;
  readonly #garbage: Garbage;
  readonly #rulesOf: WriterOptions["rulesOf"];
  readonly #admit: Admit;
  readonly #tell: WriterOptions["tell"];
  /** By uid; missing: everything is its creator's. */
  readonly #owners = new Map<string, FieldOwners>();
  readonly #creators = new Map<string, string>();
  #uids = 0;

  constructor(time: VirtualTime, log: ObjectLog, options: WriterOptions) {
    this.#time = time;
    this.#log = log;
    this.#rulesOf = options.rulesOf;
    this.#admit = options.admit;
    this.#tell = options.tell;
    this.#garbage = new Garbage(time, this.#garbageHands(), options.garbageDelayMs);
  }

  /** Which paths each manager owns. */
  ownersOf(object: KubeObject): FieldOwners {
    const uid = object.metadata.uid ?? "";
    const known = this.#owners.get(uid);
    return known ?? new Map([[this.#creators.get(uid) ?? MANAGER, new Set(fieldsOf(object).keys())]]);
  }

  live(target: Target): KubeObject {
    const live = this.#log.read(target.rules.resource, target.key);
    if (live === undefined) throw notFound(target);
    return live;
  }

  create(rules: KindRules, object: KubeObject, write: Write): KubeObject {
    const { resource } = rules;
    const { resourceVersion, ...given } = object.metadata;
    // A plain error on the real server too, hence the code.
    if (resourceVersion)
      throw new KubeError(500, "HTTP500", "resourceVersion should not be set on objects to be created");
    const uid = uidOf((this.#uids += 1));
    const name = given.name || `${given.generateName ?? ""}${uid.slice(-5)}`;
    const metadata = {
      ...given,
      name,
      uid,
      creationTimestamp: new Date(this.#time.nowMs()).toISOString().replace(/\.\d+Z$/, "Z"),
      ...(rules.hasGeneration ? { generation: 1 } : {}),
    };
    const { status, ...rest } = object;
    const begun = rules.hasStatus ? rules.initialStatus : status;
    const whole = { ...rest, metadata, ...(begun === undefined ? {} : { status: begun }) };
    checkShape(whole, resource);
    const key = keyOf(whole);
    if (this.#log.read(resource, key) !== undefined) {
      throw new KubeError(409, "AlreadyExists", `${resource.plural} "${key}" already exists`);
    }
    this.#admit(whole, undefined, resource);
    if (write.dryRun) return whole;
    this.#creators.set(uid, write.manager);
    return this.#store({ rules, key }, whole);
  }

  update(target: Target, object: KubeObject, write: Write): KubeObject {
    const live = this.live(target);
    const { resourceVersion, uid } = object.metadata;
    if ((resourceVersion && resourceVersion !== live.metadata.resourceVersion) || (uid && uid !== live.metadata.uid)) {
      throw conflict(
        target,
        "the object has been modified; please apply your changes to the latest version and try again",
      );
    }
    const next = this.#merged(target, live, object, write.subresource);
    if (write.dryRun || isEqual(next, live)) return write.dryRun ? next : live;
    this.#trackWrite(live, next, write);
    return this.#store(target, next);
  }

  apply(target: Target, wanted: KubeObject, write: Write, isForced: boolean): KubeObject {
    const { rules, key } = target;
    const live = this.#log.read(rules.resource, key);
    if (live === undefined) {
      if (write.subresource) throw notFound(target);
      const created = this.create(rules, wanted, write);
      if (!write.dryRun)
        this.#owners.set(created.metadata.uid ?? "", new Map([[write.manager, new Set(fieldsOf(wanted).keys())]]));
      return created;
    }
    const manager = write.subresource ? `${write.manager}/${write.subresource}` : write.manager;
    const { apiVersion, kind, metadata, status } = wanted;
    const part =
      write.subresource === "status" ? { apiVersion, kind, metadata: { name: metadata.name }, status } : wanted;
    const applied = applyFields(live, part, this.ownersOf(live), { manager, force: isForced });
    const { resourceVersion } = metadata;
    const object = objectOf(applied.object, rules.resource);
    const versioned = { ...object, metadata: { ...object.metadata, resourceVersion: resourceVersion ?? "" } };
    const updated = this.update(target, versioned, { ...write, manager });
    if (write.dryRun) return updated;
    const isShared = updated === live && !isSame(this.ownersOf(live), applied.owners);
    this.#owners.set(live.metadata.uid ?? "", applied.owners);
    // Who owns what is a part of the object on the real server (managedFields): another owner of equal fields is a new version.
    return isShared ? this.#store(target, { ...live }) : updated;
  }

  /** What the live object becomes: only the part that this write may change, identity and generation as the server has them. */
  #merged(target: Target, live: KubeObject, object: KubeObject, subresource: string): KubeObject {
    const { rules } = target;
    const isStatus = subresource === "status";
    if (subresource && !(isStatus && rules.hasStatus)) throw notFound(target);
    const { status: _, ...rest } = isStatus ? live : object;
    const status = isStatus || !rules.hasStatus ? object.status : live.status;
    const { uid, creationTimestamp, deletionTimestamp, deletionGracePeriodSeconds, generation, resourceVersion } =
      live.metadata;
    const metadata = {
      ...(isStatus ? live.metadata : object.metadata),
      ...defined({
        uid,
        creationTimestamp,
        generation,
        resourceVersion,
        deletionTimestamp,
        deletionGracePeriodSeconds,
      }),
    };
    const next: KubeObject = { ...rest, metadata, ...(status === undefined ? {} : { status }) };
    checkShape(next, rules.resource);
    const refusal = isStatus ? undefined : rules.refuseUpdate?.(live, next);
    if (refusal !== undefined)
      throw new KubeError(422, "Invalid", `${titleOf(rules.resource, target.key)}: ${refusal}`);
    const isNewSpec = !isStatus && !isEqual({ ...next, metadata: 0, status: 0 }, { ...live, metadata: 0, status: 0 });
    const counted = { ...next, metadata: { ...metadata, ...defined({ generation: (generation ?? 0) + 1 }) } };
    const whole = rules.hasGeneration && isNewSpec ? counted : next;
    this.#admit(whole, live, rules.resource);
    return whole;
  }

  remove(target: Target, live: KubeObject, options: DeleteOptions): void {
    const { propagationPolicy: policy } = options;
    const held = live.metadata.finalizers ?? [];
    const hold = policy === "Foreground" ? FOREGROUND : policy === "Orphan" ? ORPHAN : undefined;
    const finalizers = hold === undefined || held.includes(hold) ? held : [...held, hold];
    const already = live.metadata.deletionGracePeriodSeconds;
    const kindGrace = target.rules.graceSeconds(live);
    const wish = kindGrace === 0 ? 0 : (options.gracePeriodSeconds ?? kindGrace);
    const grace = already === undefined ? wish : Math.min(already, wish);
    if (finalizers.length === 0 && grace === 0) {
      this.#drop(target);
      return;
    }
    const deletionTimestamp =
      live.metadata.deletionTimestamp ??
      new Date(this.#time.nowMs() + grace * 1000).toISOString().replace(/\.\d+Z$/, "Z");
    const marks = {
      deletionTimestamp,
      deletionGracePeriodSeconds: grace,
      ...(finalizers.length > 0 ? { finalizers } : {}),
    };
    const next = { ...live, metadata: { ...live.metadata, ...marks } };
    if (!isEqual(next, live)) this.#store(target, next);
  }

  /** Stores it, or takes it away where it was only waiting for its last finalizer. */
  #store(target: Target, object: KubeObject): KubeObject {
    const { deletionTimestamp, deletionGracePeriodSeconds, finalizers } = object.metadata;
    const change = this.#log.write(target.rules.resource, target.key, object);
    this.#announce(change);
    if (deletionTimestamp !== undefined && (finalizers ?? []).length === 0 && (deletionGracePeriodSeconds ?? 0) === 0) {
      this.#drop(target);
    }
    return change.object;
  }

  #drop(target: Target): void {
    const change = this.#log.write(target.rules.resource, target.key, undefined);
    this.#owners.delete(change.object.metadata.uid ?? "");
    this.#creators.delete(change.object.metadata.uid ?? "");
    this.#announce(change);
  }

  #announce(change: Change): void {
    this.#garbage.see(change);
    this.#tell(change);
  }

  /** Owners are told apart only once two managers have written: most objects have one for life. */
  #trackWrite(live: KubeObject, next: KubeObject, write: Write): void {
    const uid = live.metadata.uid ?? "";
    const isAlone = !this.#owners.has(uid) && (write.manager === this.#creators.get(uid) || write.subresource !== "");
    if (isAlone) return;
    // A write of the status leaves everything else as it was.
    const part = (object: KubeObject) => (write.subresource === "status" ? { status: object.status } : object);
    this.#owners.set(uid, ownersAfterWrite(part(live), part(next), this.ownersOf(live), write.manager));
  }

  #garbageHands() {
    const targetOf = ({ resource, key }: Reference): Target => ({ rules: this.#rulesOf(resource), key });
    const read = (reference: Reference): KubeObject | undefined => {
      const object = this.#log.read(reference.resource, reference.key);
      return object?.metadata.uid === reference.uid ? object : undefined;
    };
    const change = (
      reference: Reference,
      part: (metadata: KubeObject["metadata"]) => Partial<KubeObject["metadata"]>,
    ) => {
      const object = read(reference);
      if (object === undefined) return;
      this.#store(targetOf(reference), { ...object, metadata: { ...object.metadata, ...part(object.metadata) } });
    };
    return {
      read,
      remove: (reference: Reference, isForeground: boolean) => {
        const object = read(reference);
        const policy = isForeground ? "Foreground" : "Background";
        if (object !== undefined) this.remove(targetOf(reference), object, { propagationPolicy: policy });
      },
      disown: (reference: Reference, uid: string) =>
        change(reference, ({ ownerReferences = [] }) => ({
          ownerReferences: ownerReferences.filter((owner) => owner.uid !== uid),
        })),
      dropFinalizer: (reference: Reference, finalizer: string) =>
        change(reference, ({ finalizers = [] }) => ({ finalizers: finalizers.filter((name) => name !== finalizer) })),
    };
  }
}

export const writeOf = (options: WriteOptions, subresource = ""): Write => ({
  manager: updaterOf(options.fieldManager ?? MANAGER),
  dryRun: options.dryRun ?? false,
  subresource,
});

const uidOf = (count: number): string => `00000000-0000-4000-8000-${count.toString(16).padStart(12, "0")}`;

const notFound = ({ rules, key }: Target): KubeError =>
  new KubeError(404, "NotFound", `${rules.resource.plural} "${key}" not found`);

export const conflict = ({ rules, key }: Target, detail: string): KubeError =>
  new KubeError(409, "Conflict", `Operation cannot be fulfilled on ${rules.resource.plural} "${key}": ${detail}`);

function defined<T extends Record<string, unknown>>(fields: T): Partial<T> {
  const kept: Partial<T> = { ...fields };
  for (const key in kept) if (kept[key] === undefined) delete kept[key];
  return kept;
}

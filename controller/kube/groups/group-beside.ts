// Keeps what stands beside the pods of one group: names, protection from drains, and a PodGroup for its incarnation where the
// server has them. Owns when each is written and taken away; what they are is group-objects.ts.
//
//   B1  all of it is written before the first pod of an incarnation is.
//   B2  what others have changed or deleted is written again; what is as it was written, by this process or one before it,
//       costs no call.
//   B3  the PodGroup of an incarnation that is over is deleted; everything goes with the group by owner references.
import { isDeepStrictEqual } from "node:util";
import { LABELS } from "../../api/meta.ts";
import { applyOwned } from "../api/apply.ts";
import { isNotFound, type KubeApi, KubeError, type KubeObject, keyOf, type Resource } from "../api/client.ts";
import { fieldsOf, listOf, millisOf, textOf } from "../api/fields.ts";
import { podDisruptionBudgets, podGroups, services } from "../api/resources.ts";
import type { Store } from "../watch/store.ts";

export type Beside = { resource: Resource; object: KubeObject };

/** Selected by BESIDE_LABELS. `podGroups` is undefined where the server has none. */
export type BesideStores = { services: Store; budgets: Store; podGroups: Store | undefined };

/** Of all that is watched of these kinds: ours alone. */
export const BESIDE_LABELS = `app.kubernetes.io/managed-by=muster,${LABELS.group}`;

export type BesideTrouble = { text: string; sinceMs: number };

export type BesideOptions = { api: KubeApi; stores: BesideStores; nowMs: () => number };

type Written = { wanted: KubeObject; answer: KubeObject };

export class GroupBeside {
  readonly #options: BesideOptions;
  /** By plural and name: as it was written by this process. */
  readonly #written = new Map<string, Written>();
  #trouble: BesideTrouble | undefined;

  constructor(options: BesideOptions) {
    this.#options = options;
  }

  /** Why something is missing, as of the last `keep`. */
  get trouble(): BesideTrouble | undefined {
    return this.#trouble;
  }

  /** Writes what is missing or not as wanted; answers whether all of it is there. */
  async keep(wanted: readonly Beside[], signal: AbortSignal): Promise<boolean> {
    const names = new Set(wanted.map(nameOf));
    for (const name of this.#written.keys()) if (!names.has(name)) this.#written.delete(name);
    for (const each of wanted) {
      try {
        await this.#write(each, signal);
      } catch (error) {
        if (!(error instanceof KubeError)) throw error;
        const { kind, metadata } = each.object;
        const text = `${kind} ${metadata.name} is not written: ${error.message}`;
        this.#trouble = { text, sinceMs: this.#trouble?.sinceMs ?? this.#options.nowMs() };
        return false;
      }
    }
    this.#trouble = undefined;
    return true;
  }

  async #write(each: Beside, signal: AbortSignal): Promise<void> {
    const { resource, object } = each;
    const store = this.#storeOf(resource);
    const seen = store.get(keyOf(object));
    const before = this.#written.get(nameOf(each));
    if (seen !== undefined && isAsWritten(seen, object, before)) {
      if (before === undefined) this.#written.set(nameOf(each), { wanted: object, answer: seen });
      return;
    }
    const answer = await applyOwned(this.#options.api, resource, object, { signal });
    store.learn(answer);
    this.#written.set(nameOf(each), { wanted: object, answer });
  }

  /** B3. `uid`: of the group; `incarnation`: of its record. Answers whether all went well. */
  async sweep(uid: string, incarnation: bigint, signal: AbortSignal): Promise<boolean> {
    const { api, stores } = this.#options;
    for (const { metadata } of stores.podGroups?.ownedBy(uid) ?? []) {
      if (metadata.deletionTimestamp !== undefined || !isOlder(metadata.labels, incarnation)) continue;
      const preconditions = metadata.uid === undefined ? {} : { uid: metadata.uid };
      try {
        await api.delete(podGroups, metadata.name, metadata.namespace, { preconditions }, signal);
      } catch (error) {
        if (!(error instanceof KubeError)) throw error;
        if (!isNotFound(error)) return false;
      }
    }
    return true;
  }

  /** What the scheduler says of the incarnation's PodGroup; undefined where it has bound it, or says nothing. */
  unscheduled(uid: string, incarnation: bigint): BesideTrouble | undefined {
    for (const { metadata, status } of this.#options.stores.podGroups?.ownedBy(uid) ?? []) {
      if (metadata.labels?.[LABELS.incarnation] !== String(incarnation)) continue;
      const said = listOf(fieldsOf(status).conditions)
        .map(fieldsOf)
        .find((condition) => condition.type === "PodGroupInitiallyScheduled");
      if (said?.status !== "False") continue;
      const sinceMs = millisOf(said.lastTransitionTime) ?? this.#options.nowMs();
      return { text: `PodGroup ${metadata.name} is not scheduled: ${textOf(said.message) ?? ""}`, sinceMs };
    }
    return undefined;
  }

  #storeOf({ plural }: Resource): Store {
    const { stores } = this.#options;
    const byPlural = new Map<string, Store | undefined>([
      [services.plural, stores.services],
      [podDisruptionBudgets.plural, stores.budgets],
      [podGroups.plural, stores.podGroups],
    ]);
    const store = byPlural.get(plural);
    if (store === undefined) throw new Error(`${plural} are not kept beside a group here`);
    return store;
  }
}

const nameOf = ({ resource, object }: Beside): string => `${resource.plural}/${object.metadata.name}`;

/** What we write: the rest is the server's, and its controllers'. */
function essence({ metadata, spec }: KubeObject) {
  const { uid, labels, ownerReferences } = metadata;
  return { uid, labels, ownerReferences, spec };
}

function isAsWritten(seen: KubeObject, wanted: KubeObject, before: Written | undefined): boolean {
  if (before === undefined) return covers(seen.spec, wanted.spec) && covers(seen.metadata, wanted.metadata);
  return isDeepStrictEqual(before.wanted, wanted) && isDeepStrictEqual(essence(seen), essence(before.answer));
}

/** Whether all that is wanted is there; the server adds its defaults. */
function covers(seen: unknown, wanted: unknown): boolean {
  if (Array.isArray(wanted)) {
    const items = listOf(seen);
    return items.length === wanted.length && wanted.every((item, index) => covers(items[index], item));
  }
  if (typeof wanted !== "object" || wanted === null) return seen === wanted;
  const fields = fieldsOf(seen);
  return typeof seen === "object" && Object.entries(wanted).every(([key, value]) => covers(fields[key], value));
}

function isOlder(labels: Readonly<Record<string, string>> | undefined, incarnation: bigint): boolean {
  const text = labels?.[LABELS.incarnation] ?? "";
  return /^\d{1,20}$/.test(text) && BigInt(text) < incarnation;
}

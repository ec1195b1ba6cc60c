// Deletes what nobody owns any more, as the garbage collector of the controller manager does: later, by itself, by uid.
//
//   G1  an object goes when it names owners and none of them is there (in its namespace, or cluster-wide).
//   G2  an owner deleted in the foreground stays until its blocking dependents have gone.
import { type KubeObject, keyOf, type Resource } from "../../controller/kube/api/client.ts";
import type { Change } from "./object-log.ts";
import type { VirtualTime } from "./virtual-time.ts";

export const FOREGROUND = "foregroundDeletion";
export const ORPHAN = "orphan";

export type Reference = { resource: Resource; key: string; uid: string };

export type GarbageHands = {
  read(reference: Reference): KubeObject | undefined;
  /** In the foreground where `isForeground`, else in the background. */
  remove(reference: Reference, isForeground: boolean): void;
  /** Lets go of the owner. */
  disown(reference: Reference, ownerUid: string): void;
  dropFinalizer(reference: Reference, finalizer: string): void;
};

export class Garbage {
  /** uid -> where it lives. */
  readonly #alive = new Map<string, Reference & { namespace: string | undefined }>();
  /** Owner's uid -> who names it. */
  readonly #dependents = new Map<string, Map<string, Reference>>();
  readonly #time: VirtualTime;
  readonly #hands: GarbageHands;
  readonly #delayMs: number;

  constructor(time: VirtualTime, hands: GarbageHands, delayMs: number) {
    this.#time = time;
    this.#hands = hands;
    this.#delayMs = delayMs;
  }

  see(change: Change): void {
    const { object, after, before, resource } = change;
    const uid = object.metadata.uid ?? "";
    const reference = { resource, key: keyOf(object), uid };
    for (const owner of before?.metadata.ownerReferences ?? []) this.#dependents.get(owner.uid)?.delete(uid);
    if (after === undefined) {
      this.#alive.delete(uid);
      for (const dependent of this.#dependents.get(uid)?.values() ?? []) this.#later(() => this.#check(dependent));
      for (const owner of object.metadata.ownerReferences ?? []) this.#later(() => this.#finishForeground(owner.uid));
      return;
    }
    this.#alive.set(uid, { ...reference, namespace: object.metadata.namespace });
    for (const owner of after.metadata.ownerReferences ?? []) {
      const known = this.#dependents.get(owner.uid) ?? new Map<string, Reference>();
      this.#dependents.set(owner.uid, known.set(uid, reference));
    }
    if (before === undefined && (after.metadata.ownerReferences ?? []).length > 0)
      this.#later(() => this.#check(reference));
    if (after.metadata.deletionTimestamp !== undefined) this.#later(() => this.#beginEnd(reference));
  }

  #later(run: () => void): void {
    this.#time.at(this.#time.nowMs() + this.#delayMs, run);
  }

  #check(dependent: Reference): void {
    const object = this.#hands.read(dependent);
    const owners = object?.metadata.ownerReferences ?? [];
    if (object === undefined || owners.length === 0 || object.metadata.deletionTimestamp !== undefined) return;
    if (!owners.some((owner) => this.#isOwnerThere(owner.uid, object.metadata.namespace))) {
      this.#hands.remove(dependent, false);
    }
  }

  #isOwnerThere(uid: string, namespace: string | undefined): boolean {
    const owner = this.#alive.get(uid);
    return owner !== undefined && (owner.namespace === undefined || owner.namespace === namespace);
  }

  #beginEnd(owner: Reference): void {
    const finalizers = this.#hands.read(owner)?.metadata.finalizers ?? [];
    const dependents = [...(this.#dependents.get(owner.uid)?.values() ?? [])];
    if (finalizers.includes(ORPHAN)) {
      for (const dependent of dependents) this.#hands.disown(dependent, owner.uid);
      this.#hands.dropFinalizer(owner, ORPHAN);
    }
    if (!finalizers.includes(FOREGROUND)) return;
    for (const dependent of dependents) this.#hands.remove(dependent, true);
    this.#finishForeground(owner.uid);
  }

  #finishForeground(ownerUid: string): void {
    const owner = this.#alive.get(ownerUid);
    if (owner === undefined || !this.#hands.read(owner)?.metadata.finalizers?.includes(FOREGROUND)) return;
    const isBlocked = [...(this.#dependents.get(ownerUid)?.values() ?? [])].some((dependent) =>
      this.#hands
        .read(dependent)
        ?.metadata.ownerReferences?.some((reference) => reference.uid === ownerUid && reference.blockOwnerDeletion),
    );
    if (!isBlocked) this.#hands.dropFinalizer(owner, FOREGROUND);
  }
}

// Brings the pods of a begun incarnation into being and opens their gates; ends those of older ones that nobody else ends.
// Idempotent: every call looks at the stores and does what is missing. What the server does not do now is said and tried again.

import type { WorkerName, WorkerSeen } from "../../reconcile/cluster.ts";
import { patchSeen } from "../api/apply.ts";
import {
  isAlreadyThere,
  isConflict,
  isNotFound,
  isRefused,
  type KubeApi,
  KubeError,
  type KubeObject,
} from "../api/client.ts";
import { millisOf } from "../api/fields.ts";
import { pods as podResource } from "../api/resources.ts";
import type { GroupWish } from "../gangs/gang.ts";
import type { GangPod, Reservation } from "../gangs/gang-pods.ts";
import { nodeFacts } from "../inventory/node-facts.ts";
import type { Store } from "../watch/store.ts";
import { END_SECONDS, openingOf } from "./pods.ts";

/** `isFinal`: the server will not have it, now or later. */
export type StartTrouble = { text: string; isFinal: boolean; sinceMs: number };

export type OwnPod = { object: KubeObject; pod: GangPod };

export type StarterOptions = {
  api: KubeApi;
  pods: Store;
  nodes: Store;
  nowMs: () => number;
  /** Before a gate's patch is sent. */
  onOpening: (pod: KubeObject, reservation: Reservation) => void;
};

/** After a pod's grace on a node that does not report: its kubelet would have ended it by now, if it could. */
const LOST_SLACK_MS = 5_000;
/** Less is no drain: its streams are lost already, or there are none. */
const DRAIN_MS_MIN = 2_000;

export class PodStarter {
  readonly #options: StarterOptions;
  /** Worker -> why its pod is not there yet. */
  readonly #troubles = new Map<number, StartTrouble>();
  /** Since when probes have been refused. */
  #refusedSinceMs: number | undefined;

  constructor(options: StarterOptions) {
    this.#options = options;
  }

  troubleOf(worker: number): StartTrouble | undefined {
    return this.#troubles.get(worker);
  }

  refuse(worker: number, text: string): void {
    this.#fail(worker, text, true);
  }

  reset(): void {
    this.#troubles.clear();
  }

  /**
   * Whether the server would take the first pod of the incarnation now: pod security, quota, classes and limits of the
   * namespace. Undefined where it would, or where it does not say: then creating will tell.
   */
  async probe(
    group: KubeObject,
    wish: GroupWish,
    incarnation: bigint,
    signal: AbortSignal,
  ): Promise<StartTrouble | undefined> {
    const { api, nowMs } = this.#options;
    try {
      await api.create(podResource, wish.podOf(group, incarnation, 0), signal, { dryRun: true });
    } catch (error) {
      if (!(error instanceof KubeError)) throw error;
      if (isRefused(error)) {
        this.#refusedSinceMs ??= nowMs();
        return { text: error.message, isFinal: false, sinceMs: this.#refusedSinceMs };
      }
    }
    this.#refusedSinceMs = undefined;
    return undefined;
  }

  /** Creates the pod closed; answers whether it is there. A failure is kept for `troubleOf`. */
  async create(
    group: KubeObject,
    wish: GroupWish,
    name: { incarnation: bigint; worker: number },
    signal: AbortSignal,
  ): Promise<boolean> {
    const { api, pods } = this.#options;
    const { incarnation, worker } = name;
    const object = wish.podOf(group, incarnation, worker);
    try {
      pods.learn(await api.create(podResource, object, signal));
      this.#troubles.delete(worker);
      return true;
    } catch (error) {
      if (isAlreadyThere(error)) return this.#adopt(group, object, worker, signal);
      if (!(error instanceof KubeError)) throw error;
      return this.#fail(worker, error.message, isRefused(error) && !isQuota(error));
    }
  }

  /** A reply that was lost, or a pod of a group of the same name that is being collected. */
  async #adopt(group: KubeObject, wanted: KubeObject, worker: number, signal: AbortSignal): Promise<boolean> {
    const { name, namespace } = wanted.metadata;
    try {
      const there = await this.#options.api.get(podResource, name, namespace, signal);
      const isOurs = there?.metadata.ownerReferences?.some(({ uid }) => uid === group.metadata.uid) ?? false;
      if (there === undefined) return this.#fail(worker, `pod ${name} was just there and has gone`, false);
      if (!isOurs) return this.#fail(worker, `a pod ${name} of another owner is in its place`, false);
      this.#options.pods.learn(there);
      this.#troubles.delete(worker);
      return true;
    } catch (error) {
      if (!(error instanceof KubeError)) throw error;
      return this.#fail(worker, error.message, false);
    }
  }

  #fail(worker: number, text: string, isFinal: boolean): false {
    const sinceMs = this.#troubles.get(worker)?.sinceMs ?? this.#options.nowMs();
    this.#troubles.set(worker, { text, isFinal, sinceMs });
    return false;
  }

  /** Opens what is still closed; the first patch makes the reservation outlive this process. Answers whether all went well. */
  async open(own: readonly OwnPod[], reservation: Reservation, signal: AbortSignal): Promise<boolean> {
    const { api, pods } = this.#options;
    for (const { object, pod } of own) {
      if (pod.state !== "waiting") continue;
      try {
        this.#options.onOpening(object, reservation);
        const operations = openingOf(object, pod.worker, reservation);
        pods.learn(await patchSeen(api, podResource, object, { operations, signal }));
      } catch (error) {
        if (!(error instanceof KubeError)) throw error;
        await this.#relearn(object, signal);
        return false;
      }
    }
    return true;
  }

  /** The next look shall be at what is. Where even that fails the watch will tell. */
  async #relearn({ metadata }: KubeObject, signal: AbortSignal): Promise<void> {
    try {
      const live = await this.#options.api.get(podResource, metadata.name, metadata.namespace, signal);
      if (live !== undefined) this.#options.pods.learn(live);
    } catch (error) {
      if (!(error instanceof KubeError)) throw error;
    }
  }

  /**
   * Asks the server to end it; one that has gone already is no failure. `graceMs` is for its streams: the worker ends what is
   * left then with its reason, and tidies up after that.
   */
  async end({ metadata }: KubeObject, graceMs: number, signal: AbortSignal): Promise<void> {
    const tidySeconds = graceMs >= DRAIN_MS_MIN ? END_SECONDS : 0;
    const gracePeriodSeconds = Math.ceil(graceMs / 1000) + tidySeconds;
    const preconditions = metadata.uid === undefined ? {} : { uid: metadata.uid };
    try {
      await this.#options.api.delete(
        podResource,
        metadata.name,
        metadata.namespace,
        { preconditions, gracePeriodSeconds },
        signal,
      );
    } catch (error) {
      if (!isNotFound(error) && !isConflict(error)) throw error; // a conflict: another pod of this name, and so this one has gone
    }
  }

  /** Of older incarnations: pods that have ended, and those that no kubelet is there to end. Answers whether all went well. */
  async sweep(older: readonly OwnPod[], signal: AbortSignal): Promise<boolean> {
    for (const { object, pod } of older) {
      if (pod.state !== "over" && !this.#isLost(object, pod)) continue;
      try {
        await this.end(object, 0, signal);
      } catch (error) {
        if (!(error instanceof KubeError)) throw error;
        return false;
      }
    }
    return true;
  }

  /** Its incarnation has ended, its grace is over, its node does not report: whatever may still run there is fenced off. */
  #isLost(object: KubeObject, pod: GangPod): boolean {
    const goneMs = millisOf(object.metadata.deletionTimestamp);
    if (goneMs === undefined || pod.state !== "bound" || this.#options.nowMs() < goneMs + LOST_SLACK_MS) return false;
    const node = this.#options.nodes.get(pod.node);
    return node === undefined || nodeFacts(node).notReady !== undefined;
  }
}

/** A worker without a pod, as the reconciler sees it. `released`: why its incarnation has lost its places. */
export function unbornWorker(
  name: WorkerName,
  released: string | undefined,
  { trouble, nowMs }: { trouble: StartTrouble | undefined; nowMs: number },
): WorkerSeen {
  const detail = released ?? `its pod is not created: ${trouble?.text ?? "not tried yet"}`;
  if (released !== undefined || trouble?.isFinal)
    return { name, address: "", state: { kind: "exited", code: null, signal: null, detail } };
  const view = { kind: "silent", sinceMs: nowMs, detail, last: undefined } as const;
  return { name, address: "", state: { kind: "running", view } };
}

/** A namespace's quota may have room later. */
function isQuota(error: KubeError): boolean {
  return error.code === 403 && error.message.includes("exceeded quota");
}

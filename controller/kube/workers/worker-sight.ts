// What a worker's pod is to the reconciler: running (and what it says), or ended. Owns what was said last and since when
// nobody answers; that is lost with this process, and begins anew with the next.
import type { WorkerDescription } from "../../../proto/gen/muster/v1/worker.ts";
import type { WorkerName, WorkerSeen, WorkerView } from "../../reconcile/cluster.ts";
import type { KubeObject } from "../api/client.ts";
import type { Place } from "../gangs/gang.ts";
import { podState } from "../groups/pod-state.ts";
import { podFacts } from "../inventory/pod-facts.ts";
import { identify } from "./worker-identity.ts";
import type { WorkerLinks, WorkerTarget } from "./worker-link.ts";

/** Hundreds of gigabytes of image layers and a slow registry; beyond it somebody has to look. */
export const PULL_MS = 1_800_000;
/** For an answer of a worker that may be the one that holds up its group: the verdict must not wait for it. */
const SUSPECT_TIMEOUT_MS = 1_000;

type Memory = { sinceMs: number; last: WorkerDescription | undefined };

export type Look = {
  name: WorkerName;
  pod: KubeObject;
  port: number;
  /** Whether it is of the record's incarnation: nobody else is asked. */
  isCurrent: boolean;
  /** Of its incarnation. */
  place: Place | undefined;
  nowMs: number;
  /** Why the pod's node does not report; undefined where it does. */
  nodeLost: string | undefined;
  /** Whether the group stands still or its leader's reports have broken off: whoever does not answer soon is not waited for. */
  isSuspect: boolean;
};

export class WorkerSight {
  readonly #links: WorkerLinks;
  /** By the pod's UID. */
  readonly #memories = new Map<string, Memory>();
  readonly #nowMs: () => number;

  constructor(links: WorkerLinks, nowMs: () => number) {
    this.#links = links;
    this.#nowMs = nowMs;
  }

  async see(look: Look, signal: AbortSignal): Promise<WorkerSeen> {
    const { name, pod, port, isCurrent, nowMs } = look;
    const state = podState(pod);
    const node = podFacts(pod).node || undefined;
    if (state.kind === "ended") {
      const { code, signal: by, detail } = state;
      return { name, node, address: "", state: { kind: "exited", code, signal: by, detail } };
    }
    if (state.kind === "running") {
      const target: WorkerTarget = { name, uid: podFacts(pod).uid, address: addressOf(state.address, port) };
      const view = isCurrent ? await this.#ask(target, look, signal) : silent(nowMs, "it is of another incarnation");
      const gone = isCurrent ? whyGone(look, view) : undefined;
      if (gone !== undefined) return { name, node, address: target.address, state: exited(gone) };
      return { name, node, address: target.address, state: { kind: "running", view } };
    }
    const over = isCurrent ? whyOver(look) : undefined;
    if (over !== undefined) return { name, node, address: "", state: exited(over) };
    // Not a worker's silence: it is bounded by T and PULL_MS, not by the reconciler.
    return { name, node, address: "", state: { kind: "running", view: silent(nowMs, state.cause.text) } };
  }

  /** Whether it has ever answered this process. */
  hasSpoken(uid: string): boolean {
    return this.#memories.get(uid)?.last !== undefined;
  }

  /** Forgets whoever is not among them. */
  keep(uids: ReadonlySet<string>): void {
    for (const uid of [...this.#memories.keys()]) {
      if (uids.has(uid)) continue;
      this.#memories.delete(uid);
      this.#links.forget(uid);
    }
  }

  async #ask(target: WorkerTarget, { isSuspect }: Look, signal: AbortSignal): Promise<WorkerView> {
    const before = this.#memories.get(target.uid) ?? { sinceMs: this.#nowMs(), last: undefined };
    this.#memories.set(target.uid, before);
    const boundMs = isSuspect ? SUSPECT_TIMEOUT_MS : undefined;
    const answer = identify(target, await this.#links.describe(target, signal, boundMs));
    if (answer.kind === "refused")
      return { kind: "silent", sinceMs: before.sinceMs, detail: answer.detail, last: before.last };
    const { description } = answer;
    this.#memories.set(target.uid, { sinceMs: this.#nowMs(), last: description });
    return { kind: "described", description };
  }
}

const silent = (sinceMs: number, detail: string): WorkerView => ({ kind: "silent", sinceMs, detail, last: undefined });

const exited = (detail: string): WorkerSeen["state"] => ({ kind: "exited", code: null, signal: null, detail });

/** P7. */
function whyGone({ pod, nodeLost }: Look, view: WorkerView): string | undefined {
  if (nodeLost === undefined || view.kind !== "silent") return undefined;
  return `node ${podFacts(pod).node} does not report (${nodeLost}) and neither does the worker on it (${view.detail})`;
}

/** Why a pod that has never run counts as ended (P5). */
function whyOver({ pod, place, nowMs }: Look): string | undefined {
  const state = podState(pod);
  if (state.kind !== "pending") return undefined;
  if (place?.kind === "released") return `${place.text} (${state.cause.text})`;
  if (state.isPlaced && nowMs - state.cause.sinceMs >= PULL_MS)
    return `it has not started in ${PULL_MS / 60_000} minutes: ${state.cause.text}`;
  return undefined;
}

/** Undefined where it cannot be asked. */
export function targetOf({ name, pod, port }: Pick<Look, "name" | "pod" | "port">): WorkerTarget | undefined {
  const state = podState(pod);
  if (state.kind !== "running") return undefined;
  return { name, uid: podFacts(pod).uid, address: addressOf(state.address, port) };
}

function addressOf(address: string, port: number): string {
  return address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`;
}

// What a worker's pod is doing, and how long that may be nobody's fault. Pure reading of a Pod; owns no wait and no verdict.
import { Phase } from "../../../proto/gen/muster/v1/control.ts";
import type { GroupStatus } from "../../reconcile/status.ts";
import type { KubeObject } from "../api/client.ts";
import { type Fields, fieldsOf, listOf, millisOf, textOf } from "../api/fields.ts";
import { GANG_GATE } from "../gangs/gang-pods.ts";
import { podFacts } from "../inventory/pod-facts.ts";

/** `code` is stable and kebab-case, `text` is for a person; `sinceMs` is as the API server says, or the pod's creation. */
export type PodCause = { phase: Phase; code: string; text: string; sinceMs: number };

export type PodState =
  /** No container has run yet. `isPlaced`: it has a node. */
  | { kind: "pending"; isPlaced: boolean; cause: PodCause }
  /** The container runs; `address` is the pod's IP. */
  | { kind: "running"; address: string; startedMs: number }
  | { kind: "ended"; code: number | null; signal: string | null; detail: string };

const known = new WeakMap<KubeObject, PodState>();

/** Objects are never changed in place (A2 of client.ts). */
export function podState(pod: KubeObject): PodState {
  const found = known.get(pod) ?? read(pod);
  known.set(pod, found);
  return found;
}

function read(pod: KubeObject): PodState {
  const status = fieldsOf(pod.status);
  const [container = {}] = listOf(status.containerStatuses).map(fieldsOf);
  const state = fieldsOf(container.state);
  const isOver = podFacts(pod).isOver;
  if (isOver || state.terminated !== undefined) return ended(status, fieldsOf(state.terminated));
  const address = textOf(status.podIP) ?? "";
  if (state.running !== undefined && address !== "") {
    return { kind: "running", address, startedMs: millisOf(fieldsOf(state.running).startedAt) ?? createdMs(pod) };
  }
  return pending(pod, fieldsOf(state.waiting));
}

const createdMs = (pod: KubeObject): number => podFacts(pod).createdMs ?? 0;

/** What Linux adds to a signal's number to make an exit code. */
const SIGNAL_BASE = 128;
const SIGNALS: ReadonlyMap<number, string> = new Map([
  [6, "SIGABRT"],
  [9, "SIGKILL"],
  [11, "SIGSEGV"],
  [15, "SIGTERM"],
]);

function ended(status: Fields, terminated: Fields): PodState {
  const exit = typeof terminated.exitCode === "number" ? terminated.exitCode : null;
  const number = typeof terminated.signal === "number" && terminated.signal > 0 ? terminated.signal : undefined;
  const signal = SIGNALS.get(number ?? (exit ?? 0) - SIGNAL_BASE) ?? null;
  // Of the pod: why it was ended from outside (Evicted, Preempted, NodeLost). Of the container: OOMKilled, or its last words.
  const words = [status.reason, status.message, terminated.reason, terminated.message]
    .map((word) => textOf(word)?.trim() ?? "")
    .filter((word, index, all) => word !== "" && word !== "Error" && all.indexOf(word) === index);
  return { kind: "ended", code: exit, signal, detail: words.join(": ") };
}

function pending(pod: KubeObject, waiting: Fields): PodState {
  const facts = podFacts(pod);
  const since = (sinceMs: number | undefined): number => sinceMs ?? createdMs(pod);
  const status = fieldsOf(pod.status);
  const scheduled = listOf(status.conditions)
    .map(fieldsOf)
    .find((condition) => condition.type === "PodScheduled");
  const atMs = since(millisOf(scheduled?.lastTransitionTime));
  const scheduling = (code: string, text: string): PodState => ({
    kind: "pending",
    isPlaced: false,
    cause: { phase: Phase.SCHEDULING, code, text: `pod ${facts.name} ${text}`, sinceMs: atMs },
  });
  const foreign = facts.gates.filter((gate) => gate !== GANG_GATE);
  if (foreign.length > 0) return scheduling("gated", `waits for ${foreign.join(", ")} to open its gate`);
  if (facts.gates.length > 0) return scheduling("gang", "waits until all pods of its group have a place");
  if (facts.node === "") {
    const message = textOf(scheduled?.message) ?? "";
    if (scheduled?.reason === "Unschedulable") return scheduling("unschedulable", `finds no node: ${message}`);
    return scheduling("scheduling", "waits for the scheduler");
  }
  return { kind: "pending", isPlaced: true, cause: pulling(facts.name, facts.node, { waiting, atMs }) };
}

function pulling(name: string, node: string, { waiting, atMs }: { waiting: Fields; atMs: number }): PodCause {
  const reason = textOf(waiting.reason) ?? "";
  const message = textOf(waiting.message) ?? "";
  const at = { phase: Phase.PULLING, sinceMs: atMs };
  if (reason === "" || reason === "ContainerCreating" || reason === "PodInitializing") {
    return {
      ...at,
      code: "creating",
      text: `pod ${name} is being made on ${node}: its image comes, its volumes are mounted`,
    };
  }
  const said = message === "" ? reason : `${reason}: ${message}`;
  return { ...at, code: kebabOf(reason), text: `pod ${name} cannot start on ${node}: ${said}` };
}

/** ImagePullBackOff -> image-pull-back-off. */
function kebabOf(reason: string): string {
  return reason.replaceAll(/([a-z0-9])([A-Z])/g, "$1-$2").toLowerCase();
}

/** Codes of the reconciler behind which a pod's cause stands: it has nobody to ask yet. */
const REFINED = ["starting", "start-missing", "not-answering", "action-failed", "capacity-short"];

/** The status with what the pods say, where they say more than the reconciler can see. */
export function refineStatus(status: GroupStatus, cause: PodCause | undefined): GroupStatus {
  const isEarly = status.phase === Phase.SCHEDULING || status.phase === Phase.CAPACITY_SHORT;
  if (cause === undefined || !isEarly || !REFINED.includes(status.code)) return status;
  return { ...status, phase: cause.phase, code: cause.code, cause: cause.text, sinceMs: cause.sinceMs };
}

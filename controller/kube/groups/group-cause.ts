// Why a begun incarnation is not further, from its place, its pods and what stands beside them: the first cause in the order
// of the phases. Pure; what one pod says is pod-state.ts.
import { Phase } from "../../../proto/gen/muster/v1/control.ts";
import type { Place } from "../gangs/gang.ts";
import type { BesideTrouble } from "./group-beside.ts";
import type { OwnPod, StartTrouble } from "./pod-starter.ts";
import { type PodCause, podState } from "./pod-state.ts";

const CAPACITY_CODES = ["capacity-short", "never-fits", "behind"];

type WorkerTrouble = { worker: number; trouble: StartTrouble };

export type Seen = {
  own: readonly OwnPod[];
  place: Place | undefined;
  /** Why an object beside the pods is not there. */
  beside: BesideTrouble | undefined;
  /** By worker, of those that have no pod. */
  troubles: readonly WorkerTrouble[];
  /** What a scheduler that knows gangs says. */
  unscheduled: BesideTrouble | undefined;
  /** Whether the pod's program has ever answered. */
  hasSpoken: (uid: string) => boolean;
};

export function causeOfPods(seen: Seen): PodCause | undefined {
  const { own, place, beside, troubles, unscheduled } = seen;
  const [first] = troubles;
  const early = causeOfBeside(beside) ?? (first && causeOfTrouble(first));
  if (early !== undefined) return early;
  const pending = own.map(({ object }) => podState(object)).filter((state) => state.kind === "pending");
  const unplaced = pending.find(({ isPlaced }) => !isPlaced);
  if (unplaced !== undefined && place?.kind === "waiting" && place.code !== "binding")
    return causeOfPlace(place, unplaced.cause.sinceMs);
  if (unplaced !== undefined && unscheduled !== undefined)
    return { phase: Phase.SCHEDULING, code: "pod-group-unschedulable", ...unscheduled };
  return (unplaced ?? pending[0])?.cause ?? muteOf(seen);
}

export function causeOfBeside(trouble: BesideTrouble | undefined): PodCause | undefined {
  return trouble && { phase: Phase.SCHEDULING, code: "object-refused", ...trouble };
}

export function causeOfTrouble({ worker, trouble }: WorkerTrouble): PodCause {
  const text = `the pod of worker ${worker} cannot be created: ${trouble.text}`;
  return { phase: Phase.SCHEDULING, code: "pod-refused", text, sinceMs: trouble.sinceMs };
}

/** Its container runs, its program does not answer yet. */
function muteOf({ own, hasSpoken }: Seen): PodCause | undefined {
  for (const { object, pod } of own) {
    const state = podState(object);
    if (state.kind !== "running" || hasSpoken(object.metadata.uid ?? "")) continue;
    const text = `pod ${pod.name} runs on ${pod.node} and does not answer yet`;
    return { phase: Phase.PULLING, code: "mute", text, sinceMs: state.startedMs };
  }
  return undefined;
}

export function causeOfPlace(place: Exclude<Place, { kind: "reserved" }>, sinceMs: number): PodCause {
  const phase = CAPACITY_CODES.includes(place.code) ? Phase.CAPACITY_SHORT : Phase.SCHEDULING;
  return { phase, code: place.code, text: place.text, sinceMs };
}

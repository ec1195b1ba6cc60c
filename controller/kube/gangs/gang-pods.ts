// Pods of a gang as the reservation ledger sees them, and how a reservation is written on them. Owns the names of gate and
// annotations; what a reservation is, is reservations.ts.
//
//   W1  a reservation is written with the patch that opens the gate: a pod carries all seats of its gang or none of it.
//   W2  every pod carries the whole of it, so that any single one is enough to go on from after a failover.
import { GROUP, LABELS } from "../../api/meta.ts";
import type { KubeObject } from "../api/client.ts";
import { countOf, millisOf } from "../api/fields.ts";
import { podFacts } from "../inventory/pod-facts.ts";

/** Closed from creation until the whole gang has its places. */
export const GANG_GATE = `${GROUP}/gang`;
/** `gpu-1=8,gpu-2=8`: node and GPUs of each worker, by index. */
export const SEATS = `${GROUP}/seats`;
export const RESERVED_AT = `${GROUP}/reserved-at`;

export type Seat = { worker: number; node: string; devices: number };

export type Reservation = { group: string; incarnation: bigint; sinceMs: number; seats: readonly Seat[] };

export type GangPod = {
  name: string;
  namespace: string;
  /** `namespace/name` of its ReplicaGroup. */
  group: string;
  incarnation: bigint;
  worker: number;
  devices: number;
  /** "waiting": our gate is closed. "released": it is open, the scheduler has not bound it yet. */
  state: "waiting" | "released" | "bound" | "over";
  /** Where it is bound, else empty. */
  node: string;
  isLeaving: boolean;
  /** Gates of others, such as a queue's. */
  foreignGates: readonly string[];
  written: { seats: readonly Seat[]; sinceMs: number } | undefined;
};

/** Names one incarnation of one group. */
export function gangKey({ group, incarnation }: { group: string; incarnation: bigint }): string {
  return `${group}#${incarnation}`;
}

/** Undefined for a pod that is no worker of a group. */
export function gangPod(object: KubeObject): GangPod | undefined {
  const pod = podFacts(object);
  const { labels, annotations } = pod;
  const group = labels[LABELS.group];
  const incarnation = labels[LABELS.incarnation] ?? "";
  const worker = labels[LABELS.worker] ?? "";
  if (group === undefined || !/^\d{1,20}$/.test(incarnation) || !/^\d{1,6}$/.test(worker)) return undefined;
  const seats = parseSeats(annotations[SEATS]);
  const sinceMs = millisOf(annotations[RESERVED_AT]);
  const isWaiting = pod.gates.includes(GANG_GATE);
  return {
    name: pod.name,
    namespace: pod.namespace,
    group: `${pod.namespace}/${group}`,
    incarnation: BigInt(incarnation),
    worker: Number(worker),
    devices: pod.gpus,
    state: pod.isOver ? "over" : pod.node !== "" ? "bound" : isWaiting ? "waiting" : "released",
    node: pod.node,
    isLeaving: pod.isLeaving,
    foreignGates: pod.gates.filter((gate) => gate !== GANG_GATE),
    written: seats === undefined || sinceMs === undefined || isWaiting ? undefined : { seats, sinceMs },
  };
}

export function seatsText(seats: readonly Seat[]): string {
  const byWorker = seats.toSorted((one, other) => one.worker - other.worker);
  return byWorker.map(({ node, devices }) => `${node}=${devices}`).join(",");
}

/** Undefined for text that is no list of seats: whoever wrote it, it reserves nothing. */
export function parseSeats(text: string | undefined): Seat[] | undefined {
  if (text === undefined) return undefined;
  const seats = text.split(",").map((part, worker): Seat | undefined => {
    const match = /^([a-z0-9][-a-z0-9.]{0,252})=(\d{1,4})$/.exec(part);
    return match?.[1] === undefined ? undefined : { worker, node: match[1], devices: countOf(match[2]) };
  });
  const whole = seats.filter((seat) => seat !== undefined);
  return whole.length === seats.length ? whole : undefined;
}

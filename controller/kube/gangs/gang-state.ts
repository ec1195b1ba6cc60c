// What one gang is, judged by its pods alone: to be kept, to be released, or still without a place.

import type { GpuNode } from "../inventory/inventory.ts";
import type { GangPod, Reservation, Seat } from "./gang-pods.ts";
import type { GangLimits, GangWish, ReleaseCode, WaitCode } from "./reservations.ts";

export type Verdict =
  /** It has its places; `wait` says what is not bound yet. */
  | { kind: "keep"; wait: { code: WaitCode; text: string } | undefined }
  | { kind: "release"; code: ReleaseCode; text: string; blamed: readonly string[] }
  /** Nothing is reserved for it. */
  | { kind: "open" };

export type Gang = {
  key: string;
  /** By worker; at least one. */
  pods: readonly GangPod[];
  reservation: Reservation | undefined;
  /** Of its group, whatever the incarnation. */
  wish: GangWish | undefined;
};

export type Finding = Gang & { verdict: Verdict };

const UNSEEN = "the group has not been seen at this incarnation yet";

export type Look = { nodes: ReadonlyMap<string, GpuNode>; nowMs: number; limits: GangLimits };

export function verdictOn({ pods, reservation, wish }: Gang, look: Look): Verdict {
  const release = (code: ReleaseCode, text: string, blamed: readonly string[] = []): Verdict => ({
    kind: "release",
    code,
    text,
    blamed,
  });
  const incarnation = pods[0]?.incarnation ?? 0n;
  if (wish === undefined || wish.incarnation > incarnation) {
    return release(
      "not-wanted",
      wish === undefined ? "the group has gone" : `the group is at incarnation ${wish.incarnation}`,
    );
  }
  // The view of the group is older than that of its pods: what it will say is not known yet.
  if (wish.incarnation < incarnation) return { kind: "keep", wait: { code: "newer-incarnation", text: UNSEEN } };
  const ended = pods.filter((pod) => pod.state === "over" || pod.isLeaving);
  if (ended.length > 0) {
    const nodes = ended.flatMap(({ node, state }) => (node !== "" && state === "over" ? [node] : []));
    return release("pod-ended", `${namesOf(ended)} ended; no half of a gang goes on`, nodes);
  }
  const opened = pods.filter(({ state }) => state !== "waiting");
  if (reservation === undefined) {
    if (opened.length === 0) return { kind: "open" };
    const isTorn = opened.some(({ written }) => written !== undefined);
    if (isTorn) return release("torn", "its pods carry two different reservations: two controllers have decided");
    return release("opened-by-another", `the gate of ${namesOf(opened)} was opened without a reservation`);
  }
  return reserved(pods, reservation, wish, { ...look, release });
}

type Release = (code: ReleaseCode, text: string, blamed?: readonly string[]) => Verdict;

function reserved(
  pods: readonly GangPod[],
  reservation: Reservation,
  wish: GangWish,
  { nodes, nowMs, limits, release }: Look & { release: Release },
): Verdict {
  const { seats, sinceMs } = reservation;
  const byWorker = new Map(pods.map((pod) => [pod.worker, pod]));
  const isAsWished =
    seats.length === wish.devices.length && seats.every(({ devices, worker }) => devices === wish.devices[worker]);
  if (!isAsWished || byWorker.size !== pods.length)
    return release("torn", "its reservation is not for the gang that is wished for");
  const missing = seats.filter(({ worker }) => !byWorker.has(worker));
  if (missing.length > 0) {
    return release(
      "pod-gone",
      `worker ${missing.map(({ worker }) => worker).join(", ")} has gone; no half of a gang goes on`,
    );
  }
  const astray = pods.filter((pod) => pod.state === "bound" && pod.node !== seats[pod.worker]?.node);
  if (astray.length > 0) return release("misplaced", `${namesOf(astray)} was bound to another node than its seat`);
  const lost = pods.flatMap((pod) => {
    const seat = seats[pod.worker];
    const why = seat === undefined ? undefined : whyLost(nodes.get(seat.node), pod);
    return seat === undefined || why === undefined ? [] : [{ node: seat.node, why }];
  });
  const [first] = lost;
  if (first !== undefined) {
    return release(
      "node-lost",
      `node ${first.node}: ${first.why}`,
      lost.map(({ node }) => node),
    );
  }
  const unbound = pods.filter(({ state }) => state !== "bound");
  if (unbound.length === 0) return { kind: "keep", wait: undefined };
  const bound = pods.length - unbound.length;
  const ageMs = nowMs - sinceMs;
  if (ageMs >= limits.wholeMs) {
    const text = `${bound} of ${pods.length} pods are bound ${Math.round(ageMs / 1000)} s after the reservation; all of it is given back`;
    return release(
      "not-whole",
      text,
      unbound.flatMap((pod) => seats[pod.worker]?.node ?? []),
    );
  }
  return { kind: "keep", wait: { code: "binding", text: `${bound} of ${pods.length} pods are bound` } };
}

/** A node that is closed binds nothing more; what is bound there goes on unless the node has gone. */
function whyLost(node: GpuNode | undefined, pod: GangPod): string | undefined {
  if (node === undefined) return "it has gone, or its GPUs have";
  return pod.state === "bound" ? undefined : node.closed?.text;
}

function namesOf(pods: readonly GangPod[]): string {
  return pods.map(({ name }) => name).join(", ");
}

/**
 * Seats whose GPUs no bound pod holds: counted by the ledger. Of a gang that is released only pods whose gate is open can
 * still be bound.
 */
export function unboundSeats({ pods, reservation, verdict }: Finding): Seat[] {
  if (reservation === undefined) return [];
  const isGoing = verdict.kind === "release";
  return reservation.seats.filter(({ worker }) => {
    const pod = pods.find((each) => each.worker === worker);
    if (pod === undefined || pod.state === "bound" || pod.state === "over") return false;
    return pod.state === "released" || !isGoing;
  });
}

// Which replicas come and go: from how many are wanted, of which plan, and what is there. Pure; owns the order of rollout and
// scaling, not names and not text for status.
//
//   O1  groups of all revisions together, those that still hold devices included, are never more than wanted + surge (surge),
//       or wanted (inPlace; one more by O5), except where more were there before the wish became smaller.
//   O2  surge: a serving group of an old revision is drained only while at least `wanted` others serve.
//       inPlace: at most `outMax` replicas are missing because of it.
//   O3  scaling plans nothing. It drains the newest first; what does not serve goes before what does.
//   O4  a group is deleted only after it has drained, or has nothing to drain, and its ordinal is written down as used.
//   O5  a group on a node that is to be left is replaced as by a surge, whatever the kind: first another serves, then it
//       drains; one at a time, and where no place is free it stays.
import type { Inventory } from "../../plan/hardware.ts";
import type { GroupView } from "./world.ts";

export type Fleet = {
  wanted: number;
  planName: string | undefined;
  groups: readonly GroupView[];
  kind: "surge" | "inPlace";
  /** More groups of the plan that could be placed now; undefined: not known. */
  room: number | undefined;
  /** Nodes that are to be left. */
  leaving: ReadonlyMap<string, string>;
  /** Ordinals below it are written down in the status as used. */
  usedBelow: number;
  nowMs: number;
};

export type Steps = {
  create: number;
  drain: readonly GroupView[];
  remove: readonly GroupView[];
  /** Old ones that are left; 0: no rollout is under way. */
  old: number;
  /** Of the wanted plan, on nodes that are to be left. */
  leaving: readonly GroupView[];
  /** A surge that finds no devices. */
  isShort: boolean;
};

/** A quarter at a time: a rollout of four replicas takes four turns whatever their number, and one replica is always allowed. */
const SHARE = 4;
/** After drain-until the streams have been ended; this is for pods to go. */
const DRAIN_MARGIN_MS = 30_000;
/** Of one pass: a thousand replicas are a hundred passes, not one of a minute. */
const CREATE_MAX = 10;

export const surgeMax = (wanted: number): number => Math.max(1, Math.floor(wanted / SHARE));

export function isServing({ status, spec, isLeaving }: GroupView): boolean {
  if (isLeaving || spec.state === "Draining") return false;
  return status.phase === "Serving" || (status.phase === "Degraded" && status.leader !== undefined);
}

export function isPlaced({ status }: GroupView): boolean {
  return (status.placement?.length ?? 0) > 0;
}

const hasStayed = ({ spec, isLeaving }: GroupView): boolean => !isLeaving && spec.state === "Serving";
const byOrdinal = (one: GroupView, other: GroupView): number => one.spec.ordinal - other.spec.ordinal;

export function nextSteps(fleet: Fleet): Steps {
  const { wanted, planName, groups } = fleet;
  const staying = groups.filter(hasStayed).toSorted(byOrdinal);
  const remove = groups.filter((group) => mayGo(group, fleet));
  // Without a plan there is nothing to change to; a wish for fewer is heard all the same.
  if (planName === undefined || wanted === 0) {
    return { create: 0, drain: excessOf(staying, wanted), remove, old: 0, leaving: [], isShort: false };
  }
  const current = staying.filter(({ spec }) => spec.plan === planName);
  const old = staying.filter(({ spec }) => spec.plan !== planName);
  const leaving = current.filter((group) => isLeft(group, fleet));
  const isInPlace = fleet.kind === "inPlace" && groups.some(({ spec }) => spec.plan !== planName);
  // In place nobody surges: what is to be left waits until the rollout is over.
  const lasting = isInPlace ? current : current.filter((group) => !leaving.includes(group));
  const excess = excessOf(lasting, wanted);
  const kept = lasting.filter((group) => !excess.includes(group));
  const change = isInPlace ? inPlace(fleet, kept, old) : surge(fleet, kept, { old, leaving });
  return { ...change, drain: [...excess, ...change.drain], remove, old: old.length, leaving };
}

/** Whether it holds devices of a node that is to be left. */
export function isLeft({ status }: GroupView, { leaving }: Pick<Fleet, "leaving">): boolean {
  return status.placement?.some(({ node }) => leaving.has(node)) ?? false;
}

/** O3. */
function excessOf(groups: readonly GroupView[], wanted: number): GroupView[] {
  const last = (group: GroupView): number => (isServing(group) ? 1 : 0);
  return groups
    .toSorted((one, other) => last(one) - last(other) || byOrdinal(other, one))
    .slice(0, Math.max(0, groups.length - wanted));
}

type Change = Pick<Steps, "create" | "drain" | "isShort">;

type Going = { old: readonly GroupView[]; leaving: readonly GroupView[] };

function surge(fleet: Fleet, current: readonly GroupView[], { old, leaving }: Going): Change {
  const { wanted, groups, room } = fleet;
  const serving = leftFirst([...leaving, ...old].filter(isServing), fleet);
  const spare = Math.max(0, current.filter(isServing).length + serving.length - wanted);
  // Of an old revision: what does not serve has nothing to lose, and its devices are of use to what comes. On a node that is
  // to be left it may still come to serve, where there is no other place for it.
  const isReplaced = current.length >= wanted;
  const idle = [...old, ...(isReplaced ? leaving : [])].filter((group) => !isServing(group));
  const more = old.length === 0 && leaving.length > 0 ? 1 : surgeMax(wanted);
  const allowed = Math.min(wanted - current.length, wanted + more - groups.length);
  const waiting = current.filter((group) => !isPlaced(group)).length;
  // Room is asked for a surge alone: a replica that is simply wanted is made, and says itself what it waits for.
  const plain = old.length === 0 ? wanted - groups.length : 0;
  const isSurge = old.length > 0 || leaving.length > 0;
  const placeable = room === undefined || !isSurge ? allowed : Math.max(plain, room - waiting);
  const create = Math.max(0, Math.min(CREATE_MAX, allowed, placeable));
  const isShort = allowed > 0 && create === 0 && current.every(isServing) && groups.every(hasStayed);
  return { create, drain: [...idle, ...serving.slice(0, spare)], isShort };
}

function leftFirst(groups: readonly GroupView[], fleet: Fleet): GroupView[] {
  return groups.toSorted((one, other) => Number(isLeft(other, fleet)) - Number(isLeft(one, fleet)));
}

function inPlace(fleet: Fleet, current: readonly GroupView[], old: readonly GroupView[]): Change {
  const { wanted, groups } = fleet;
  const idle = old.filter((group) => !isServing(group));
  const serving = leftFirst(old.filter(isServing), fleet);
  const missing = wanted - current.filter(isServing).length - serving.length;
  const give = Math.max(0, surgeMax(wanted) - missing);
  const create = Math.max(0, Math.min(CREATE_MAX, wanted - current.length, wanted - groups.length));
  return { create, drain: [...idle, ...serving.slice(0, give)], isShort: false };
}

/** O4. */
function mayGo(group: GroupView, { nowMs, usedBelow }: Fleet): boolean {
  const { spec, status, isLeaving, drainUntilMs, generation } = group;
  if (isLeaving || spec.state !== "Draining" || spec.ordinal >= usedBelow) return false;
  if (status.record?.begun !== true && status.phase === undefined) return true;
  if (status.phase === "Stopped" && (status.observedGeneration ?? 0) >= generation) return true;
  return nowMs >= (drainUntilMs ?? 0) + DRAIN_MARGIN_MS;
}

/** When a draining group goes at the latest. */
export function goneByMs({ drainUntilMs }: GroupView): number {
  return (drainUntilMs ?? 0) + DRAIN_MARGIN_MS;
}

/** How many groups of `workers` nodes with `world / workers` devices each find a place. */
export function groupsThatFit(free: Inventory, world: number, workers: number): number {
  const each = world / workers;
  const seats = free.nodes.map((node) => (node.kind === "gpu" ? Math.floor(node.devices.length / each) : 0));
  // A group takes at most one seat of each node: k groups find their places iff the seats, capped at k, are k * workers.
  let fits = Math.floor(seats.reduce((sum, count) => sum + count, 0) / workers);
  const capped = (k: number): number => seats.reduce((sum, count) => sum + Math.min(count, k), 0);
  while (fits > 0 && capped(fits) < fits * workers) fits -= 1;
  return fits;
}

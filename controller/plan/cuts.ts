// Which cuts are looked at, and why the others are not. In this version: pp 1, dp 1, attention tp = world, experts
// ep x etp = world in every factorisation.
import type { Cut, ModelSpec, Reason } from "../../proto/gen/muster/v1/plan.ts";
import { Reason_Kind } from "../../proto/gen/muster/v1/plan.ts";
import { cutFaults } from "../model/shards.ts";
import { CPU_RANKS_MAX, DEVICES_MAX, deviceCount, type Inventory } from "./hardware.ts";
import { isRefusal, largestFirst, type Placement, place } from "./place.ts";
import { moeOf } from "./shape.ts";
import { inventoryKind, type Pins, type Wishes } from "./wishes.ts";

type Placed = { cut: Cut; placement: Placement };
export type Refused = { cut: Cut; reasons: Reason[] };
type Cuts = { placed: Placed[]; refused: Refused[] };

export const refusedFor = (code: string, text: string): Reason => ({ kind: Reason_Kind.REFUSED, code, text });

/** The world that the pins fix; undefined where they leave it open. */
export function pinnedWorld(pins: Pins): number | undefined {
  if (pins.ranks !== undefined) return pins.ranks;
  if (pins.tp !== undefined) return pins.tp * (pins.dp ?? 1);
  if (pins.ep !== undefined && pins.etp !== undefined) return pins.ep * pins.etp;
  return undefined;
}

/** Worlds to look at. A CPU node takes any number of ranks when asked, and one where nobody asks. */
function worlds(inventory: Inventory, pins: Pins): number[] {
  const pinned = pinnedWorld(pins);
  if (pinned !== undefined) return [pinned];
  const most =
    inventoryKind(inventory) === "gpu"
      ? Math.min(DEVICES_MAX, deviceCount(inventory))
      : Math.min(CPU_RANKS_MAX, cpuWorld(inventory, pins));
  return Array.from({ length: most }, (_, index) => index + 1);
}

function cpuWorld(inventory: Inventory, pins: Pins): number {
  return Math.max(inventory.nodes.length, pins.workers ?? 1, pins.ep ?? 1, pins.etp ?? 1);
}

/** Cuts of one world that agree with the pins. A dense model has no experts to place: ep 1. */
function cutsOf(spec: ModelSpec, world: number, pins: Pins): Cut[] {
  const { dp = 1, pp = 1 } = pins;
  const tp = pins.tp ?? world;
  const cut = (ep: number): Cut => ({ world, tp, dp, ep, etp: world / ep, pp });
  if (pins.ep !== undefined || pins.etp !== undefined) {
    // As pinned, even where it does not come out: cutFaults says why.
    const ep = pins.ep ?? Math.max(1, Math.floor(world / (pins.etp ?? 1)));
    const etp = pins.etp ?? Math.max(1, Math.floor(world / ep));
    return [{ ...cut(1), ep, etp }];
  }
  if (moeOf(spec) === undefined) return [cut(1)];
  return Array.from({ length: world }, (_, index) => index + 1)
    .filter((ep) => world % ep === 0)
    .map(cut);
}

/** Every slot has as many places, and holds no expert twice. */
function copyFaults(spec: ModelSpec, { ep }: Cut, copies: number): Reason[] {
  if (copies === 0) return [];
  const experts = moeOf(spec)?.experts;
  if (experts === undefined)
    return [refusedFor("copies-without-experts", `${copies} copies of experts: the model has none.`)];
  if (copies > experts * (ep - 1)) {
    const text = `${copies} copies of ${experts} experts on ${ep} slots: over ${experts * (ep - 1)} a slot would hold one twice.`;
    return [refusedFor("copies-many", text)];
  }
  if ((experts + copies) % ep === 0) return [];
  const text = `${experts} experts and ${copies} copies do not divide over ${ep} slots.`;
  return [refusedFor("copies-uneven", text)];
}

/** Every cut that pins and inventory leave, with its place or with what refuses it. */
export function enumerateCuts(
  spec: ModelSpec,
  inventory: Inventory,
  { pins, expertCopies }: Pick<Wishes, "pins" | "expertCopies">,
): Cuts {
  const cuts: Cuts = { placed: [], refused: [] };
  const nodes = largestFirst(inventory);
  for (const world of worlds(inventory, pins)) {
    const placement = place(nodes, world, pins.workers);
    for (const cut of cutsOf(spec, world, pins)) {
      const reasons = [...cutFaults(spec, cut), ...copyFaults(spec, cut, expertCopies)];
      if (isRefusal(placement)) reasons.push(refusedFor(placement.code, `${placement.text}.`));
      else if (reasons.length === 0) cuts.placed.push({ cut, placement });
      if (reasons.length > 0) cuts.refused.push({ cut, reasons });
    }
  }
  return cuts;
}

// Which slot holds which expert: placement by measured load, with copies of the heavy ones (EPLB). Pure: load and a version
// in, a map out. Owns the shape and the balance of a map; owns no measurement (whoever counts tokens hands them in) and no
// bytes (workers move weights between steps).
//
//   E1  every expert has at least one slot, and every slot of every rank holds one expert.
//   E2  no rank holds two copies of one expert.
//   E3  same load, shape and current map: same map. Ties go to the lower expert, then the lower rank.
//   E4  the version grows by one with every map that differs from the one before, and not otherwise.
//
// Method: DeepSeek's EPLB. Copies: the expert with the most load on one copy gets the next, until the slots are full (or a few
// slots before, where that packs more evenly). Packing: the heaviest copy first into the
// lightest rank with a free slot, then swaps between the heaviest rank and another while they help (experts-pack.ts). Where
// groups divide over nodes, groups go to nodes first, so that a token whose routing is limited to a few groups visits few
// nodes; copies then stay within their node. In the small domain that the tests enumerate the packing of given copies is always
// the best one; the whole answer is the best of all in 94 % of the cases and never more than 4/3 of it.

import { alignToCurrent } from "./experts-align.ts";
import { type Item, packEvenly } from "./experts-pack.ts";
import type { Refusal } from "./place.ts";

/** Tokens (or any other measure) that each expert of each layer has served: `load[layer][expert]`. */
export type ExpertLoad = readonly (readonly number[])[];

export type ExpertShape = {
  /** Of one layer, over all ranks; experts + redundant copies. */
  slots: number;
  /** Expert-parallel slots of the cut (ep). Slot s lies on rank floor(s / (slots / ranks)). */
  ranks: number;
  /** Nodes that the ranks are spread over; default 1. */
  nodes?: number;
  /** Groups of neighbouring experts that routing chooses between; default 1. */
  groups?: number;
};

export type ExpertMap = {
  version: number;
  ranks: number;
  /** `"groups-to-nodes"` only where groups divide over nodes. */
  policy: "flat" | "groups-to-nodes";
  /** `layers[layer][slot]` is the expert in it. */
  layers: readonly (readonly number[])[];
};

/** Bounds of what is computed in one call: the largest published models have 512 experts, 1,024 slots, 128 layers. */
export const SLOTS_MAX = 4096;
export const LAYERS_MAX = 1024;
/** Ranks that differ by less are even: loads are measured, not known. */
const EVEN_WITHIN = 1e-3;

/** A better map, or why the question cannot be answered. `current` gives the version, and the slots that may stay as they are. */
export function rebalance(load: ExpertLoad, shape: ExpertShape, current?: ExpertMap): ExpertMap | Refusal {
  const refusal = refuse(load, shape);
  if (refusal !== undefined) return refusal;
  const { ranks, slots, nodes = 1, groups = 1 } = shape;
  const isGrouped = groups > 1 && groups % nodes === 0;
  const parts = isGrouped ? { nodes, groups } : { nodes: 1, groups: 1 };
  const packed = load.map((layer) => placeLayer(layer, { slots, ranks, ...parts }));
  const isComparable = current !== undefined && isSameShape(current, ranks, packed);
  const layers = isComparable
    ? alignToCurrent(packed, current.layers, ranks / parts.nodes)
    : packed.map((perRank) => perRank.flat());
  const isEqual = isComparable && layers.every((layer, index) => isSameList(layer, current.layers[index] ?? []));
  const version = (current?.version ?? 0) + (isEqual ? 0 : 1);
  return { version, ranks, policy: isGrouped ? "groups-to-nodes" : "flat", layers };
}

export function isMap(answer: ExpertMap | Refusal): answer is ExpertMap {
  return "layers" in answer;
}

function refuse(load: ExpertLoad, { slots, ranks, nodes = 1, groups = 1 }: ExpertShape): Refusal | undefined {
  const experts = load[0]?.length ?? 0;
  const no = (code: string, text: string): Refusal => ({ code, text });
  for (const [name, value] of Object.entries({ slots, ranks, nodes, groups })) {
    if (!Number.isInteger(value) || value < 1)
      return no("size-not-positive", `${name} is ${value}; it must be at least 1`);
  }
  if (experts === 0) return no("no-experts", "the load names no experts");
  if (slots > SLOTS_MAX) return no("slots-many", `${slots} slots; at most ${SLOTS_MAX} are placed`);
  if (load.length > LAYERS_MAX) return no("layers-many", `${load.length} layers; at most ${LAYERS_MAX} are placed`);
  if (load.some((layer) => layer.length !== experts)) return no("load-uneven", "not every layer has the same experts");
  const bad = load.findIndex((layer) => layer.some((value) => !Number.isFinite(value) || value < 0));
  if (bad >= 0) return no("load-invalid", `layer ${bad} has a load that is not a finite number of at least 0`);
  if (slots % ranks !== 0) return no("slots-uneven", `${slots} slots do not divide over ${ranks} ranks`);
  if (ranks % nodes !== 0) return no("ranks-uneven", `${ranks} ranks do not divide over ${nodes} nodes`);
  if (experts % groups !== 0) return no("groups-uneven", `${experts} experts do not divide into ${groups} groups`);
  if (slots < experts)
    return no("slots-few", `${slots} slots cannot hold ${experts} experts; ${experts - slots} are missing`);
  if (slots > experts * ranks) {
    const most = experts * ranks;
    return no("slots-spare", `${slots} slots: over ${most} a rank would hold an expert twice, which helps nobody`);
  }
  return undefined;
}

type Parts = { slots: number; ranks: number; nodes: number; groups: number };

/** `[rank][slot]`, ranks of one node side by side. */
function placeLayer(load: readonly number[], { slots, ranks, nodes, groups }: Parts): number[][] {
  const perGroup = load.length / groups;
  const members = Array.from({ length: groups }, (_, group) =>
    Array.from({ length: perGroup }, (_, index) => group * perGroup + index),
  );
  const items = members.map(
    (experts, id): Item => ({ id, weight: experts.reduce((sum, e) => sum + (load[e] ?? 0), 0) }),
  );
  return packEvenly(items, nodes, groups / nodes).flatMap(({ ids }) => {
    const experts = ids.flatMap((group) => members[group] ?? []).toSorted((one, other) => one - other);
    return placeNode(experts, load, slots / nodes, ranks / nodes);
  });
}

/**
 * Copies and packing of what one set of ranks holds. Splitting the heaviest to the last slot can be too much of it: its many
 * small copies then leave the next one no rank of its own. Where the result is not even, fewer splits are tried as well.
 */
function placeNode(experts: readonly number[], load: readonly number[], slots: number, ranks: number): number[][] {
  const spare = slots - experts.length;
  const mean = experts.reduce((sum, expert) => sum + (load[expert] ?? 0), 0) / ranks;
  let best: { peak: number; packs: number[][] } | undefined;
  for (const splits of new Set([0, 1, 2, 4, 8, spare].map((fewer) => Math.max(0, spare - fewer)))) {
    const packs = packEvenly(copiesOf(experts, load, { slots, ranks, splits }), ranks, slots / ranks);
    const peak = Math.max(...packs.map(({ weight }) => weight));
    if (best === undefined || peak < best.peak * (1 - EVEN_WITHIN)) best = { peak, packs: packs.map(({ ids }) => ids) };
    if (best.peak <= mean * (1 + EVEN_WITHIN)) break;
  }
  return best?.packs ?? [];
}

/**
 * One item for each slot: `splits` copies for whoever has the largest share, the rest for the lightest, where they weigh
 * least. No expert has more copies than ranks: that keeps E2 possible.
 */
function copiesOf(
  experts: readonly number[],
  load: readonly number[],
  { slots, ranks, splits }: { slots: number; ranks: number; splits: number },
): Item[] {
  const count = new Map(experts.map((expert) => [expert, 1]));
  const share = (expert: number): number => (load[expert] ?? 0) / (count.get(expert) ?? 1);
  for (let filled = experts.length; filled < slots; filled++) {
    const sign = filled - experts.length < splits ? 1 : -1;
    let chosen: number | undefined;
    for (const expert of experts) {
      if ((count.get(expert) ?? 0) >= ranks) continue;
      if (chosen === undefined || sign * share(expert) > sign * share(chosen)) chosen = expert;
    }
    if (chosen === undefined)
      throw new Error(`${slots} slots for ${experts.length} experts on ${ranks} ranks: refused before`);
    count.set(chosen, (count.get(chosen) ?? 0) + 1);
  }
  return experts.flatMap((id) => Array.from({ length: count.get(id) ?? 1 }, (): Item => ({ id, weight: share(id) })));
}

// ---- what a map is worth ----

/** Load of each rank of one layer, each expert's load shared evenly by its copies. */
export function rankLoads(load: readonly number[], layer: readonly number[], ranks: number): number[] {
  const copies = new Map<number, number>();
  for (const expert of layer) copies.set(expert, (copies.get(expert) ?? 0) + 1);
  const sums = new Array<number>(ranks).fill(0);
  for (const [slot, expert] of layer.entries()) {
    const rank = Math.floor((slot * ranks) / layer.length);
    sums[rank] = (sums[rank] ?? 0) + (load[expert] ?? 0) / (copies.get(expert) ?? 1);
  }
  return sums;
}

/**
 * How much longer the experts' part of a step takes than with even ranks: layers run one after the other and each waits for
 * its fullest rank. At least 1; 1 where there is no load.
 */
export function imbalanceOf(load: ExpertLoad, map: ExpertMap): number {
  let busiest = 0;
  let mean = 0;
  for (const [index, layer] of map.layers.entries()) {
    const loads = rankLoads(load[index] ?? [], layer, map.ranks);
    busiest += Math.max(...loads);
    mean += loads.reduce((sum, value) => sum + value, 0) / map.ranks;
  }
  return mean > 0 ? Math.max(1, busiest / mean) : 1;
}

function isSameShape(current: ExpertMap, ranks: number, packed: readonly (readonly number[][])[]): boolean {
  const slots = packed[0]?.flat().length;
  return (
    current.ranks === ranks &&
    current.layers.length === packed.length &&
    current.layers.every((l) => l.length === slots)
  );
}

function isSameList(one: readonly number[], other: readonly number[]): boolean {
  return one.length === other.length && one.every((value, index) => value === other[index]);
}

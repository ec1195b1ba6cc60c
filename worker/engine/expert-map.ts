// A map of experts as the ranks of one worker see it: which copies they hold, and the name of it in the numerics id. Pure.
import { createHash } from "node:crypto";
import { ExpertMap, type ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { EngineError } from "./engine.ts";

/** native/include/muster/engine.h, ExpertShare. */
export type ExpertShare = { rank: number; block: number; expert: number; copy: number; copies: number };

const refusal = (field: string, detail: string): EngineError =>
  new EngineError({ code: "invalid", field, detail, rank: -1 });

/** Of all ranks of the worker. Throws EngineError where the map is not one of this plan. */
export function sharesOf(map: ExpertMap, plan: ShardPlan, worker: number): ExpertShare[] {
  const cut = plan.cut;
  const blocks = plan.model?.blocks ?? [];
  if (cut === undefined || map.slots !== cut.ep)
    throw refusal("map.slots", `${map.slots} slots, the cut has ${cut?.ep ?? 0}`);
  const withExperts = blocks.flatMap(({ mlp }, block) => (mlp?.$case === "moe" ? [block] : []));
  if (map.layers.length !== withExperts.length)
    throw refusal("map.layers", `${map.layers.length} layers, the model has ${withExperts.length} with experts`);
  const ranks = plan.ranks.filter((rank) => rank.worker === worker).map(({ rank }) => rank);
  return map.layers.flatMap(({ block, places }, index) => {
    const at = `map.layers[${index}]`;
    const mlp = blocks[block]?.mlp;
    if (block !== withExperts[index] || mlp?.$case !== "moe")
      throw refusal(`${at}.block`, `is ${block}, not ${withExperts[index]}`);
    const slotsOf = placedIn(places, { slots: map.slots, experts: mlp.value.experts, at });
    return ranks.flatMap((rank) => {
      const slot = Math.floor(rank / cut.etp);
      return slotsOf.flatMap((slots, expert): ExpertShare[] => {
        const copy = slots.indexOf(slot);
        return copy < 0 ? [] : [{ rank, block, expert, copy, copies: slots.length }];
      });
    });
  });
}

/** By expert: the slots that hold it, ascending. */
function placedIn(
  places: readonly number[],
  { slots, experts, at }: { slots: number; experts: number; at: string },
): number[][] {
  if (places.length % slots !== 0)
    throw refusal(`${at}.places`, `${places.length} places do not divide over ${slots} slots`);
  const perSlot = places.length / slots;
  const found: number[][] = Array.from({ length: experts }, () => []);
  for (const [place, expert] of places.entries()) {
    const slot = Math.floor(place / perSlot);
    const holders = found[expert];
    if (holders === undefined) throw refusal(`${at}.places[${place}]`, `expert ${expert} of ${experts}`);
    if (holders.includes(slot)) throw refusal(`${at}.places[${place}]`, `slot ${slot} holds expert ${expert} twice`);
    holders.push(slot);
  }
  const missing = found.findIndex((holders) => holders.length === 0);
  if (missing >= 0) throw refusal(`${at}.places`, `expert ${missing} has no place`);
  return found;
}

const DIGEST_CHARS = 12;

/** The numerics id of ranks that have switched to the map, from what it was with the plan's own. */
export function numericsWith(base: string, map: ExpertMap): string {
  const digest = createHash("sha256")
    .update(ExpertMap.encode({ ...map, version: 0 }).finish())
    .digest("hex");
  return `${base}-x${digest.slice(0, DIGEST_CHARS)}`;
}

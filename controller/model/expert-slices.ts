// What a map of experts asks of one worker: the planes of experts that its ranks do not hold yet. Pure.
import { FaultError, invalid } from "../../proto/fault.ts";
import { ExpertMap, type RankShard, type ShardPlan, ShardRule } from "../../proto/gen/muster/v1/plan.ts";
import type { TensorSlice } from "../../proto/gen/muster/v1/worker.ts";
import { isLoaded, keptBy } from "./shards.ts";

/** The map that the plan's own ranks are; version 0. */
export function planMap({ model, cut, ranks }: ShardPlan): ExpertMap {
  const slots = cut?.ep ?? 1;
  const etp = cut?.etp ?? 1;
  const places = Array.from(
    { length: slots },
    (_, slot) => ranks.find(({ rank }) => rank === slot * etp)?.experts ?? [],
  );
  const layers = (model?.blocks ?? []).flatMap(({ mlp }, block) =>
    mlp?.$case === "moe" ? [{ block, places: places.flat() }] : [],
  );
  return ExpertMap.create({ version: 0, slots, layers });
}

/** In order of rank, then tensor. `current` is what the worker's ranks hold. Throws FaultError where the plan is not whole. */
export function expertSlices(
  plan: ShardPlan,
  { current, next }: { current: ExpertMap; next: ExpertMap },
  worker: number,
): TensorSlice[] {
  const { model } = plan;
  if (!model) throw new FaultError(invalid("plan.model", "is missing"));
  const etp = plan.cut?.etp ?? 1;
  return plan.ranks
    .filter((shard) => shard.worker === worker)
    .flatMap((shard) => {
      const added = addedTo(Math.floor(shard.rank / etp), current, next);
      return model.tensors.flatMap((tensor, index): TensorSlice[] => {
        if (tensor.rule !== ShardRule.EXPERT || !isLoaded(tensor)) return [];
        if (!added.get(tensor.block)?.has(tensor.expert)) return [];
        const holder: RankShard = { ...shard, experts: [tensor.expert] };
        const part = keptBy(tensor, holder, model);
        return part ? [{ rank: shard.rank, tensor: index, rows: part.rows, cols: part.cols }] : [];
      });
    });
}

/** Block -> experts that the slot gets. */
function addedTo(slot: number, current: ExpertMap, next: ExpertMap): Map<number, Set<number>> {
  const held = new Map(current.layers.map(({ block, places }) => [block, heldBy(slot, places, current.slots)]));
  return new Map(
    next.layers.map(({ block, places }) => {
      const before = held.get(block);
      return [block, new Set(heldBy(slot, places, next.slots).filter((expert) => !before?.includes(expert)))];
    }),
  );
}

function heldBy(slot: number, places: readonly number[], slots: number): number[] {
  const perSlot = places.length / slots;
  return places.slice(slot * perSlot, (slot + 1) * perSlot);
}

// Packs weighted items into packs of equal room so that the heaviest pack is light: heaviest first into the lightest pack
// with room, then swaps with the heaviest pack while they help. Deterministic; no two items of one id in a pack as long as no
// id has more items than there are packs.

export type Item = { id: number; weight: number };

/** A swap has to gain more than this share of the heavier pack: below it sums of doubles differ by rounding alone. */
const GAIN_MIN = 1e-9;

type Pack = { items: Item[]; ids: Set<number>; weight: number };

export type Packed = { ids: number[]; weight: number };

/** Ids of each pack, ascending; `items.length` is `packs * room`. */
export function packEvenly(items: readonly Item[], packs: number, room: number): Packed[] {
  const filled = Array.from({ length: packs }, (): Pack => ({ items: [], ids: new Set(), weight: 0 }));
  for (const item of items.toSorted((one, other) => other.weight - one.weight || one.id - other.id)) {
    const open = filled.filter((pack) => pack.items.length < room);
    const free = open.filter((pack) => !pack.ids.has(item.id));
    const target = lightest(free);
    if (target !== undefined) put(target, item);
    else makeRoom(filled, open, item);
  }
  improve(filled, items.length);
  return filled.map(({ items: held, weight }) => ({
    ids: held.map(({ id }) => id).toSorted((one, other) => one - other),
    weight,
  }));
}

function put(pack: Pack, item: Item): void {
  pack.items.push(item);
  pack.ids.add(item.id);
  pack.weight += item.weight;
}

function take(pack: Pack, item: Item): void {
  pack.items.splice(pack.items.indexOf(item), 1);
  pack.ids.delete(item.id);
  pack.weight = pack.items.reduce((sum, { weight }) => sum + weight, 0);
}

function lightest(packs: readonly Pack[]): Pack | undefined {
  let best: Pack | undefined;
  for (const pack of packs) {
    if (best === undefined || pack.weight < best.weight) best = pack;
    else if (pack.weight === best.weight && pack.items.length < best.items.length) best = pack;
  }
  return best;
}

/**
 * Every pack with room holds this id already. Some full pack does not (an id has at most as many items as there are packs),
 * and of its `room` different ids one is missing in a pack that has fewer: that one moves over, the item takes its place.
 */
function makeRoom(packs: readonly Pack[], open: readonly Pack[], item: Item): void {
  let best: { from: Pack; to: Pack; moved: Item; peak: number } | undefined;
  for (const from of packs) {
    if (open.includes(from) || from.ids.has(item.id)) continue;
    for (const to of open) {
      for (const moved of from.items) {
        if (to.ids.has(moved.id)) continue;
        const peak = Math.max(from.weight - moved.weight + item.weight, to.weight + moved.weight);
        if (best === undefined || peak < best.peak) best = { from, to, moved, peak };
      }
    }
  }
  if (best === undefined) throw new Error(`item ${item.id} has more copies than there are packs`);
  take(best.from, best.moved);
  put(best.to, best.moved);
  put(best.from, item);
}

/** Swaps one item of the heaviest pack for a lighter one elsewhere while that lowers the heavier of the two. */
function improve(packs: readonly Pack[], roundsMax: number): void {
  for (let round = 0; round < roundsMax; round++) {
    const top = packs.reduce<Pack | undefined>(
      (best, pack) => (best && best.weight >= pack.weight ? best : pack),
      undefined,
    );
    const swap = top === undefined ? undefined : bestSwap(packs, top);
    if (top === undefined || swap === undefined) return;
    take(top, swap.mine);
    take(swap.pack, swap.theirs);
    put(top, swap.theirs);
    put(swap.pack, swap.mine);
  }
}

type Swap = { pack: Pack; mine: Item; theirs: Item; peak: number };

function bestSwap(packs: readonly Pack[], top: Pack): Swap | undefined {
  let best: Swap | undefined;
  const enough = top.weight * (1 - GAIN_MIN);
  for (const pack of packs) {
    if (pack === top || pack.weight >= top.weight) continue;
    for (const mine of top.items) {
      if (pack.ids.has(mine.id)) continue;
      for (const theirs of pack.items) {
        if (theirs.weight >= mine.weight || top.ids.has(theirs.id)) continue;
        const shift = mine.weight - theirs.weight;
        const peak = Math.max(top.weight - shift, pack.weight + shift);
        if (peak < (best?.peak ?? enough)) best = { pack, mine, theirs, peak };
      }
    }
  }
  return best;
}

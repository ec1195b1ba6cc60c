// A packing says which experts lie together, not on which rank or in which slot: both are chosen here so that as little as
// possible moves. Balance is not touched.

/**
 * Flat layers whose ranks hold the packed sets. Packs are interchangeable within a node (`perNode` ranks side by side): the
 * pack that shares most with what a rank holds goes there, ties to the lower rank. In a rank what stays keeps its slot.
 */
export function alignToCurrent(
  packed: readonly number[][][],
  current: readonly (readonly number[])[],
  perNode: number,
): number[][] {
  return packed.map((packs, layer) => {
    const room = packs[0]?.length ?? 0;
    const held = packs.map((_, rank) => (current[layer] ?? []).slice(rank * room, (rank + 1) * room));
    const ranks: number[][] = [];
    for (let first = 0; first < packs.length; first += perNode) {
      ranks.push(...matchPacks(packs.slice(first, first + perNode), held.slice(first, first + perNode)));
    }
    return ranks.flatMap((pack, rank) => keepSlots(pack, held[rank] ?? []));
  });
}

/** Greedy by overlap: not always the most that could stay, but within half of it, and in O(ranks^2). */
function matchPacks(packs: readonly number[][], held: readonly (readonly number[])[]): number[][] {
  const pairs = packs.flatMap((pack, index) =>
    held.map((experts, rank) => ({ index, rank, shared: experts.filter((expert) => pack.includes(expert)).length })),
  );
  pairs.sort((one, other) => other.shared - one.shared || one.rank - other.rank || one.index - other.index);
  const byRank: (number[] | undefined)[] = held.map(() => undefined);
  const used = new Set<number>();
  for (const { index, rank } of pairs) {
    if (byRank[rank] !== undefined || used.has(index)) continue;
    byRank[rank] = packs[index];
    used.add(index);
  }
  return byRank.map((pack) => pack ?? []);
}

function keepSlots(pack: readonly number[], held: readonly number[]): number[] {
  const coming = pack.filter((expert) => !held.includes(expert));
  const wanted = new Set(pack);
  return pack.map((_, slot) => {
    const expert = held[slot];
    if (expert !== undefined && wanted.delete(expert)) return expert;
    return coming.shift() ?? -1;
  });
}

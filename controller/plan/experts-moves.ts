// From one expert map to the next: which slots change, and whether that is worth the copying. Owns the decision, not the copying.
import { type ExpertLoad, type ExpertMap, imbalanceOf } from "./experts.ts";

export type ExpertMove = { layer: number; slot: number; from: number; to: number };

/** Slots whose expert differs, in order of layer and slot: a layer can be switched as soon as its own have arrived. */
export function movesBetween(current: ExpertMap, next: ExpertMap): ExpertMove[] {
  return next.layers.flatMap((layer, index) =>
    layer.flatMap((to, slot): ExpertMove[] => {
      const from = current.layers[index]?.[slot] ?? -1;
      return from === to ? [] : [{ layer: index, slot, from, to }];
    }),
  );
}

export type MoveTerms = {
  /** Share of the experts' time that must be saved: below it the measurement's own noise decides. */
  gainMin: number;
  /** Weights of one expert of one layer on one rank. */
  slotBytes: number;
  /** At which they may be copied without slowing the steps. */
  moveBytesPerSecond: number;
  /** What the experts' part of a step takes now, all layers. */
  expertSecondsPerStep: number;
  /** Steps until the next look. */
  stepsAhead: number;
};

export type MoveVerdict = {
  isWorth: boolean;
  code: "moves" | "same-map" | "shape-differs" | "gain-small" | "cost-large";
  text: string;
  /** Share of the experts' time that the next map would save; negative where it is worse. */
  gain: number;
  moves: number;
};

/** Both maps are judged by the same load. */
export function worthMoving(
  load: ExpertLoad,
  maps: { current: ExpertMap; next: ExpertMap },
  terms: MoveTerms,
): MoveVerdict {
  const { current, next } = maps;
  const say = (code: MoveVerdict["code"], text: string, figures = { gain: 0, moves: 0 }): MoveVerdict => ({
    isWorth: code === "moves",
    code,
    text,
    ...figures,
  });
  const isSameShape = current.ranks === next.ranks && current.layers.length === next.layers.length;
  if (!isSameShape || current.layers.some((layer, index) => layer.length !== next.layers[index]?.length)) {
    return say("shape-differs", "the maps have different ranks, layers or slots: that takes another plan, not a move");
  }
  const moves = movesBetween(current, next).length;
  if (moves === 0) return say("same-map", "every slot holds what it shall hold");
  const before = imbalanceOf(load, current);
  const after = imbalanceOf(load, next);
  const gain = 1 - after / before;
  const figures = { gain, moves };
  const change = `imbalance ${before.toFixed(3)} -> ${after.toFixed(3)}`;
  if (gain < terms.gainMin) {
    const need = (terms.gainMin * 100).toFixed(1);
    return say("gain-small", `${change} saves ${(gain * 100).toFixed(1)} %, less than ${need} %`, figures);
  }
  const cost = (moves * terms.slotBytes) / terms.moveBytesPerSecond;
  const saved = gain * terms.expertSecondsPerStep * terms.stepsAhead;
  if (saved < cost) {
    const text = `${change}: ${moves} moves take ${cost.toFixed(1)} s, ${saved.toFixed(1)} s are saved until the next look`;
    return say("cost-large", text, figures);
  }
  return say(
    "moves",
    `${change}: ${moves} slots change, ${saved.toFixed(1)} s are saved for ${cost.toFixed(1)} s of copying`,
    figures,
  );
}

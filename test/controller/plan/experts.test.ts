// Expert placement: the whole small domain against brute force, then properties of any load and shape.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  type ExpertLoad,
  type ExpertMap,
  type ExpertShape,
  imbalanceOf,
  isMap,
  LAYERS_MAX,
  rankLoads,
  rebalance,
  SLOTS_MAX,
} from "../../../controller/plan/experts.ts";
import { type MoveTerms, movesBetween, worthMoving } from "../../../controller/plan/experts-moves.ts";

function mapOf(load: ExpertLoad, shape: ExpertShape, current?: ExpertMap): ExpertMap {
  const answer = rebalance(load, shape, current);
  if (!isMap(answer)) throw new Error(`${answer.code}: ${answer.text}`);
  return answer;
}

function refusalOf(load: ExpertLoad, shape: ExpertShape): string {
  const answer = rebalance(load, shape);
  return isMap(answer) ? "a map" : answer.code;
}

// ---- brute force ----

function subsets(count: number, size: number, from = 0): number[][] {
  if (size === 0) return [[]];
  const all: number[][] = [];
  for (let first = from; first <= count - size; first++)
    for (const rest of subsets(count, size - 1, first + 1)) all.push([first, ...rest]);
  return all;
}

/** Every placement without a duplicate on a rank in which each expert has a slot. */
function placements(experts: number, ranks: number, perRank: number): number[][] {
  const sets = subsets(experts, perRank);
  let partial: number[][] = [[]];
  for (let rank = 0; rank < ranks; rank++) partial = partial.flatMap((held) => sets.map((set) => [...held, ...set]));
  return partial.filter((layer) => new Set(layer).size === experts);
}

/** Loads up to order: experts are interchangeable. */
function descending(experts: number, max: number): number[][] {
  if (experts === 0) return [[]];
  return descending(experts - 1, max).flatMap((rest) =>
    Array.from({ length: (rest.at(-1) ?? max) + 1 }, (_, value) => [...rest, value]),
  );
}

const SMALL: { experts: number; ranks: number; perRank: number; max: number }[] = [];
for (const [experts, max] of [
  [2, 12],
  [3, 12],
  [4, 9],
  [5, 6],
] as const)
  for (const ranks of [2, 3])
    for (const perRank of [1, 2, 3])
      if (perRank <= experts && ranks * perRank >= experts && ranks * perRank <= 6)
        SMALL.push({ experts, ranks, perRank, max });
SMALL.push({ experts: 6, ranks: 2, perRank: 3, max: 6 }, { experts: 6, ranks: 2, perRank: 4, max: 4 });
SMALL.push({ experts: 4, ranks: 4, perRank: 2, max: 5 }, { experts: 5, ranks: 4, perRank: 2, max: 4 });

type Tally = { cases: number; equal: number; worst: number; what: string };

function count(tally: Tally, ratio: number, what: string): void {
  tally.cases++;
  if (ratio < 1 + 1e-9) tally.equal++;
  if (ratio > tally.worst) Object.assign(tally, { worst: ratio, what });
}

const copiesOf = (layer: readonly number[]): string => layer.toSorted((one, other) => one - other).join();

describe("against brute force", () => {
  test("every small load: packing and the whole answer, bounds and shares of optimal ones as stated", () => {
    const packing: Tally = { cases: 0, equal: 0, worst: 1, what: "" };
    const whole: Tally = { cases: 0, equal: 0, worst: 1, what: "" };
    for (const { experts, ranks, perRank, max } of SMALL) {
      const all = placements(experts, ranks, perRank);
      const byCopies = Map.groupBy(all, copiesOf);
      for (const load of descending(experts, max)) {
        if (load[0] === 0) continue;
        const peak = (layer: readonly number[]) => Math.max(...rankLoads(load, layer, ranks));
        const layer = mapOf([load], { slots: ranks * perRank, ranks }).layers[0] ?? [];
        const what = `${load} on ${ranks} x ${perRank}`;
        const sameCopies = byCopies.get(copiesOf(layer)) ?? [];
        const packed = peak(layer) / Math.min(...sameCopies.map(peak));
        expect(packed, what).toBeLessThanOrEqual(4 / 3 - 1 / (3 * ranks) + 1e-9);
        count(packing, packed, what);
        count(whole, peak(layer) / Math.min(...all.map(peak)), what);
      }
    }
    for (const [name, { cases, equal, worst, what }] of Object.entries({ packing, whole }))
      console.log(
        `experts, ${name}: ${equal} of ${cases} small cases are optimal, the worst is ${worst.toFixed(3)}x: ${what}`,
      );
    expect(whole.cases).toBeGreaterThan(3000);
    expect(packing.equal / packing.cases).toBe(1);
    expect(whole.equal / whole.cases).toBeGreaterThanOrEqual(0.94);
    expect(whole.worst).toBeLessThanOrEqual(4 / 3 + 1e-9);
  });
});

// ---- properties ----

type Question = { load: ExpertLoad; shape: ExpertShape };

/** Zipf-like, flat, or all nothing: what routers do, and what breaks packers. */
const questions: fc.Arbitrary<Question> = fc
  .record({
    nodes: fc.constantFrom(1, 1, 2, 3),
    ranksPerNode: fc.integer({ min: 1, max: 4 }),
    groupsPerNode: fc.constantFrom(1, 1, 2),
    perGroup: fc.integer({ min: 1, max: 6 }),
    spare: fc.integer({ min: 0, max: 12 }),
    layers: fc.integer({ min: 1, max: 3 }),
    steep: fc.constantFrom(0, 0.5, 1.2, 3),
    seed: fc.array(fc.nat({ max: 1000 }), { minLength: 40, maxLength: 40 }),
  })
  .chain(({ nodes, ranksPerNode, groupsPerNode, perGroup, spare, layers, steep, seed }) => {
    const groups = nodes * groupsPerNode;
    const experts = groups * perGroup;
    const ranks = nodes * ranksPerNode;
    const least = Math.ceil(experts / ranks);
    const most = experts / nodes; // per node and rank: an expert at most once
    const perRank = Math.min(most, least + (spare % 5));
    const load = Array.from({ length: layers }, (_, layer) =>
      Array.from({ length: experts }, (_, e) => Math.round((seed[(e + layer * 7) % 40] ?? 0) / (1 + e) ** steep)),
    );
    return fc.constant({ load, shape: { slots: perRank * ranks, ranks, nodes, groups } });
  });

describe("any load and shape", () => {
  test("E1, E2: every expert has a slot, every slot an expert, no rank two copies", () => {
    fc.assert(
      fc.property(questions, ({ load, shape }) => {
        const map = mapOf(load, shape);
        const experts = load[0]?.length ?? 0;
        expect(map.layers.length).toBe(load.length);
        for (const layer of map.layers) {
          expect(layer.length).toBe(shape.slots);
          expect([...new Set(layer)].toSorted((a, b) => a - b)).toEqual(Array.from({ length: experts }, (_, e) => e));
          const perRank = shape.slots / shape.ranks;
          for (let rank = 0; rank < shape.ranks; rank++) {
            const held = layer.slice(rank * perRank, (rank + 1) * perRank);
            expect(new Set(held).size, `rank ${rank} holds ${held}`).toBe(perRank);
          }
        }
      }),
      { numRuns: 1000 },
    );
  });

  test("groups stay on one node, copies included, and each node has as many of them", () => {
    fc.assert(
      fc.property(questions, ({ load, shape: { nodes = 1, groups = 1, ...shape } }) => {
        const map = mapOf(load, { ...shape, nodes, groups });
        expect(map.policy).toBe(groups > 1 ? "groups-to-nodes" : "flat");
        const perGroup = (load[0]?.length ?? 0) / groups;
        for (const layer of map.layers) {
          const homes = Array.from({ length: groups }, () => new Set<number>());
          for (const [slot, expert] of layer.entries())
            homes[Math.floor(expert / perGroup)]?.add(Math.floor((slot * nodes) / layer.length));
          expect(homes.every((home) => home.size === 1)).toBe(true);
          const each = Array.from({ length: nodes }, (_, node) => homes.filter((home) => home.has(node)).length);
          expect(new Set(each)).toEqual(new Set([groups / nodes]));
        }
      }),
      { numRuns: 500 },
    );
  });

  test("E3, E4: same question, same map; the version grows only where the map differs", () => {
    fc.assert(
      fc.property(questions, questions, ({ load, shape }, other) => {
        const first = mapOf(load, shape);
        expect(first.version).toBe(1);
        expect(mapOf(structuredClone(load), { ...shape })).toEqual(first);
        expect(mapOf(load, shape, first)).toEqual(first);
        const shifted = load.map((layer, index) =>
          layer.map((v, e) => v + ((other.load[0] ?? [])[(e + index) % 3] ?? 0)),
        );
        const second = mapOf(shifted, shape, first);
        expect(second.version).toBe(movesBetween(first, second).length === 0 ? 1 : 2);
      }),
      { numRuns: 300 },
    );
  });

  test("aligning to the map before changes no balance and moves no more than a map from nothing", () => {
    fc.assert(
      fc.property(questions, fc.integer({ min: 1, max: 9 }), ({ load, shape }, stride) => {
        const first = mapOf(load, shape);
        const later = load.map((layer) => layer.map((value, e) => (value * (1 + ((e * stride) % 4))) / 2));
        const aligned = mapOf(later, shape, first);
        const anew = mapOf(later, shape);
        expect(imbalanceOf(later, aligned)).toBeCloseTo(imbalanceOf(later, anew), 9);
        expect(movesBetween(first, aligned).length).toBeLessThanOrEqual(movesBetween(first, anew).length);
      }),
      { numRuns: 300 },
    );
  });

  test("one more slot on every rank never makes the fullest rank fuller than twice the mean or the largest share", () => {
    fc.assert(
      fc.property(questions, ({ load, shape: { ranks, slots } }) => {
        const map = mapOf(load, { ranks, slots });
        for (const [index, layer] of map.layers.entries()) {
          const own = load[index] ?? [];
          const copies = (expert: number) => layer.filter((held) => held === expert).length;
          const share = Math.max(...own.map((value, expert) => value / copies(expert)));
          const mean = own.reduce((sum, value) => sum + value, 0) / ranks;
          expect(Math.max(...rankLoads(own, layer, ranks))).toBeLessThanOrEqual(mean + share + 1e-6);
        }
      }),
      { numRuns: 500 },
    );
  });
});

test("256 experts of 58 layers on 32 ranks under Zipf load: 2.87x, moved 2.47x, with 32 copies 1.00x, within groups 1.10x", () => {
  const load = Array.from({ length: 58 }, (_, layer) =>
    Array.from({ length: 256 }, (_, e) => 1e6 / (1 + ((e * 37 + layer * 11) % 256)) ** 0.7),
  );
  const even: ExpertMap = {
    version: 0,
    ranks: 32,
    policy: "flat",
    layers: load.map((layer) => layer.map((_, expert) => expert)),
  };
  const before = imbalanceOf(load, even);
  const moved = mapOf(load, { slots: 256, ranks: 32 }, even);
  const copied = mapOf(load, { slots: 288, ranks: 32 });
  const grouped = mapOf(load, { slots: 288, ranks: 32, nodes: 4, groups: 8 });
  expect(before).toBeGreaterThan(2.8);
  expect(imbalanceOf(load, moved)).toBeLessThan(2.5);
  expect(imbalanceOf(load, copied)).toBeLessThan(1.01);
  expect(imbalanceOf(load, grouped)).toBeLessThan(1.11);
  expect(moved.version).toBe(1);
});

describe("refusals say what to change", () => {
  test.each([
    ["slots-few", [[1, 2, 3]], { slots: 2, ranks: 2 }],
    ["slots-uneven", [[1, 2, 3]], { slots: 4, ranks: 3 }],
    ["slots-spare", [[1, 2]], { slots: 6, ranks: 2 }],
    ["slots-many", [[1, 2]], { slots: SLOTS_MAX + 1, ranks: 1 }],
    ["layers-many", Array.from({ length: LAYERS_MAX + 1 }, () => [1]), { slots: 1, ranks: 1 }],
    ["ranks-uneven", [[1, 2]], { slots: 3, ranks: 3, nodes: 2 }],
    ["groups-uneven", [[1, 2, 3]], { slots: 4, ranks: 2, groups: 2 }],
    ["size-not-positive", [[1]], { slots: 1, ranks: 0 }],
    ["no-experts", [], { slots: 1, ranks: 1 }],
    ["load-uneven", [[1, 2], [1]], { slots: 2, ranks: 1 }],
    ["load-invalid", [[1, Number.NaN]], { slots: 2, ranks: 1 }],
    ["load-invalid", [[1, -1]], { slots: 2, ranks: 1 }],
  ])("%s", (code, load, shape) => expect(refusalOf(load, shape)).toBe(code));
});

describe("whether to move", () => {
  const terms: MoveTerms = {
    gainMin: 0.05,
    slotBytes: 44e6,
    moveBytesPerSecond: 1e9,
    expertSecondsPerStep: 0.01,
    stepsAhead: 3000,
  };
  const load = [[8, 1, 1, 1, 1, 4]];
  const current: ExpertMap = { version: 4, ranks: 3, policy: "flat", layers: [[0, 5, 1, 2, 3, 4]] };
  const next = mapOf(load, { slots: 6, ranks: 3 }, current);

  test("a large gain is worth its bytes", () => {
    const verdict = worthMoving(load, { current, next }, terms);
    expect(verdict).toMatchObject({ isWorth: true, code: "moves", moves: movesBetween(current, next).length });
    expect(verdict.gain).toBeCloseTo(1 - 9 / 12, 9);
    expect(next.version).toBe(5);
  });

  test("a small gain, a dear move, an equal map and another shape are not", () => {
    const verdict = (changes: Partial<MoveTerms>, maps = { current, next }) =>
      worthMoving(load, maps, { ...terms, ...changes });
    expect(verdict({ gainMin: 0.3 })).toMatchObject({ isWorth: false, code: "gain-small" });
    expect(verdict({ moveBytesPerSecond: 1e6 })).toMatchObject({ isWorth: false, code: "cost-large" });
    expect(verdict({}, { current: next, next })).toMatchObject({ isWorth: false, code: "same-map", moves: 0 });
    const wider = mapOf(load, { slots: 9, ranks: 3 });
    expect(verdict({}, { current, next: wider })).toMatchObject({ isWorth: false, code: "shape-differs" });
    expect(verdict({}, { current: next, next: current })).toMatchObject({ isWorth: false, code: "gain-small" });
  });
});

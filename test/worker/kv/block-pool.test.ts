import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { BlockPool, blocksFor } from "../../../worker/kv/block-pool.ts";

/** The same pool in plain words: who holds what, what rests for which step. */
type Model = {
  total: number;
  holders: Map<number, number>;
  resting: Map<number, bigint>;
  step: bigint;
  completed: bigint;
  leases: number[][];
};
type Real = { pool: BlockPool };

const checkAll = (model: Model, { pool }: Real) => {
  expect(pool.heldCount).toBe(model.holders.size);
  expect(pool.restingCount).toBe(model.resting.size);
  expect(pool.freeCount + pool.heldCount + pool.restingCount).toBe(model.total - 1); // K1
};

class Reserve implements fc.Command<Model, Real> {
  readonly count: number;
  constructor(count: number) {
    this.count = count;
  }
  check = () => true;
  run(model: Model, real: Real) {
    const free = real.pool.freeCount;
    const blocks = real.pool.reserve(this.count);
    if (this.count > free) expect(blocks).toBeUndefined();
    else {
      expect(blocks?.length).toBe(this.count);
      for (const block of blocks ?? []) {
        expect(block).toBeGreaterThan(0); // K1
        expect(block).toBeLessThan(model.total);
        expect(model.holders.has(block)).toBe(false); // K2
        expect(model.resting.has(block)).toBe(false); // K3
        model.holders.set(block, 1);
      }
      model.leases.push(blocks ?? []);
    }
    checkAll(model, real);
  }
  toString = () => `reserve ${this.count}`;
}

class Share implements fc.Command<Model, Real> {
  readonly pick: number;
  constructor(pick: number) {
    this.pick = pick;
  }
  check = (model: Readonly<Model>) => model.leases.length > 0;
  run(model: Model, real: Real) {
    const blocks = model.leases[this.pick % model.leases.length] ?? [];
    real.pool.share(blocks);
    for (const block of blocks) model.holders.set(block, (model.holders.get(block) ?? 0) + 1);
    model.leases.push(blocks);
    checkAll(model, real);
  }
  toString = () => `share ${this.pick}`;
}

class Release implements fc.Command<Model, Real> {
  readonly pick: number;
  readonly isInFlight: boolean;
  constructor(pick: number, isInFlight: boolean) {
    this.pick = pick;
    this.isInFlight = isInFlight;
  }
  check = (model: Readonly<Model>) => model.leases.length > 0;
  run(model: Model, real: Real) {
    const [blocks = []] = model.leases.splice(this.pick % model.leases.length, 1);
    const last = this.isInFlight ? model.step : model.completed;
    real.pool.release(blocks, last);
    for (const block of blocks) {
      const holders = (model.holders.get(block) ?? 0) - 1;
      if (holders > 0) model.holders.set(block, holders);
      else {
        model.holders.delete(block);
        if (last > model.completed) model.resting.set(block, last);
      }
    }
    checkAll(model, real);
  }
  toString = () => `release ${this.pick}${this.isInFlight ? " in flight" : ""}`;
}

class Launch implements fc.Command<Model, Real> {
  check = (model: Readonly<Model>) => model.step - model.completed < 2n;
  run(model: Model) {
    model.step++;
  }
  toString = () => "launch";
}

class Complete implements fc.Command<Model, Real> {
  check = (model: Readonly<Model>) => model.completed < model.step;
  run(model: Model, real: Real) {
    model.completed++;
    real.pool.completed(model.completed);
    for (const [block, step] of model.resting) if (step <= model.completed) model.resting.delete(block);
    checkAll(model, real);
  }
  toString = () => "complete";
}

describe("block pool", () => {
  test("K1, K2, K3 hold under any operations", () => {
    const commands = [
      fc.nat(12).map((count) => new Reserve(count)),
      fc.nat(20).map((pick) => new Share(pick)),
      fc.tuple(fc.nat(20), fc.boolean()).map(([pick, isInFlight]) => new Release(pick, isInFlight)),
      fc.constant(new Launch()),
      fc.constant(new Complete()),
    ];
    fc.assert(
      fc.property(fc.integer({ min: 2, max: 40 }), fc.commands(commands, { maxCommands: 200 }), (total, run) => {
        const setup = () => ({
          model: { total, holders: new Map(), resting: new Map(), step: 0n, completed: 0n, leases: [] },
          real: { pool: new BlockPool(total) },
        });
        fc.modelRun(setup, run);
      }),
      { numRuns: 200 },
    );
  });

  test("K1: block 0 is never handed out, all others are", () => {
    const blocks = new BlockPool(9).reserve(8) ?? [];
    expect([...blocks].sort((a, b) => a - b)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
  });

  test("a broken invariant throws: releasing or sharing what nobody holds", () => {
    const pool = new BlockPool(4);
    const blocks = pool.reserve(2) ?? [];
    pool.release(blocks, 0n);
    expect(() => pool.release(blocks, 0n)).toThrow("nobody holds it");
    expect(() => pool.share(blocks)).toThrow("nobody holds it");
    expect(() => pool.release([0], 0n)).toThrow("block 0");
    expect(() => new BlockPool(1)).toThrow("at least 2");
  });

  test("tokens need whole blocks", () => {
    expect([0, 1, 15, 16, 17].map((tokens) => blocksFor(tokens, 16))).toEqual([0, 1, 1, 1, 2]);
  });
});

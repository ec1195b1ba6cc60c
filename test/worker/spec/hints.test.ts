import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { Sampling } from "../../../proto/gen/muster/v1/worker.ts";
import { Breaker } from "../../../worker/spec/breaker.ts";
import { HintTable } from "../../../worker/spec/hint-table.ts";
import { extend, extendAll, rootHash } from "../../../worker/spec/prefix-hash.ts";

const tokens = fc.array(fc.nat(202_047), { maxLength: 40 });
const at = (temperature: number) => Sampling.create({ temperature });

describe("prefix hash", () => {
  test("the hash of a longer prefix follows from the shorter one", () => {
    fc.assert(
      fc.property(tokens, tokens, (head, tail) => {
        const root = rootHash(7n, { sampling: at(0), seedLow: 1n, seedHigh: 2n });
        expect(extendAll(extendAll(root, head), tail)).toEqual(extendAll(root, [...head, ...tail]));
      }),
    );
  });

  test("no two of 200,000 short prefixes share their 64 bits", () => {
    const seen = new Set<string>();
    const root = rootHash(7n, { sampling: at(0), seedLow: 0n, seedHigh: 0n });
    for (let a = 0; a < 447; a++) {
      const first = extend(root, a);
      for (let b = 0; b < 447; b++) {
        const { low, high } = extend(first, b);
        seen.add(`${low}/${high}`);
      }
    }
    expect(seen.size).toBe(447 * 447);
  });

  test("the seed counts above temperature zero and does not at zero; the vocabulary always counts", () => {
    const root = (temperature: number, seedLow: bigint, vocab = 7n) =>
      rootHash(vocab, { sampling: at(temperature), seedLow, seedHigh: 0n });
    expect(root(0, 1n)).toEqual(root(0, 2n));
    expect(root(0.7, 1n)).not.toEqual(root(0.7, 2n));
    expect(root(0, 1n, 7n)).not.toEqual(root(0, 1n, 8n));
  });
});

describe("hint table", () => {
  const root = rootHash(1n, { sampling: at(0), seedLow: 0n, seedHigh: 0n });

  test("a hint is found under its prefix, and its rest after each of its tokens", () => {
    const table = new HintTable();
    table.put(root, [5, 6, 7]);
    expect(table.get(root)).toEqual([5, 6, 7]);
    expect(table.get(extend(root, 5))).toEqual([6, 7]);
    expect(table.get(extendAll(root, [5, 6]))).toEqual([7]);
    expect(table.get(extendAll(root, [5, 6, 7]))).toBeUndefined();
    expect(table.get(extend(root, 6))).toBeUndefined();
  });

  test("H1: the order and number of deliveries does not matter for roots", () => {
    fc.assert(
      fc.property(fc.array(fc.nat(30), { minLength: 1, maxLength: 12 }), (order) => {
        const hints = Array.from({ length: 31 }, (_, i) => ({
          at: extendAll(root, [1000 + i]),
          tokens: [i, i + 1, i + 2],
        }));
        const table = new HintTable();
        for (const i of order) table.put(hints[i]?.at ?? root, hints[i]?.tokens ?? []);
        for (const i of order) expect(table.get(hints[i]?.at ?? root)).toEqual(hints[i]?.tokens);
      }),
    );
  });

  test("the table is bounded and forgets the oldest", () => {
    const table = new HintTable(10);
    for (let i = 0; i < 100; i++) table.put(extend(root, i), [i]);
    expect(table.size).toBe(10);
    expect(table.get(extend(root, 99))).toEqual([99]);
    expect(table.get(extend(root, 0))).toBeUndefined();
  });
});

describe("breaker", () => {
  test("B1, B2: it opens when nothing arrives, then waits once in 32 rounds, and closes when hints come back", () => {
    const breaker = new Breaker();
    let rounds = 0;
    while (!breaker.isOpen) {
      expect(breaker.mayWait()).toBe(true);
      breaker.waited(false);
      expect(++rounds).toBeLessThan(20);
    }
    let waits = 0;
    for (let i = 0; i < 320; i++) if (breaker.mayWait()) waits++;
    expect(waits).toBe(10);
    for (let i = 0; i < 3; i++) breaker.waited(true);
    expect(breaker.isOpen).toBe(false);
  });

  test("it opens on arrival without use: a draft that is never right is only probed", () => {
    const breaker = new Breaker();
    let verified = 0;
    for (let i = 0; i < 400; i++) {
      breaker.mayWait();
      if (!breaker.mayVerify()) continue;
      verified++;
      breaker.verified(0);
    }
    expect(verified).toBeLessThan(40);
  });
});

import { expect, test } from "vitest";
import { drawSeed, philox, seedOfChoice, seedOfClient } from "../../../controller/gateway/seed.ts";

test("philox gives the published known answers of Philox4x32-10", () => {
  expect(philox([0, 0, 0, 0], [0, 0])).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
  const ones = 0xffffffff;
  expect(philox([ones, ones, ones, ones], [ones, ones])).toEqual([0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
  expect(philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0])).toEqual([
    0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1,
  ]);
});

test("choice 0 is the seed itself", () => {
  const seed = { low: 3n, high: 9n };
  expect(seedOfChoice(seed, 0)).toEqual(seed);
});

test("choice i is Philox of (i, domain 1, high words) under the low words, lower word first", () => {
  const seed = { low: 0x0123456789abcdefn, high: 0xfedcba9876543210n };
  const [a, b, c, d] = philox([2, 1 << 24, 0x76543210, 0xfedcba98], [0x89abcdef, 0x01234567]).map(BigInt);
  const word = (value: bigint | undefined) => value ?? 0n;
  const expected = { low: word(a) | (word(b) << 32n), high: word(c) | (word(d) << 32n) };
  expect(seedOfChoice(seed, 2)).toEqual(expected);
});

test("fixed vectors, the same as seed_of_choice of native/ref/noise.cpp", () => {
  expect(vectors.map(([low, high, choice]) => seedOfChoice({ low, high }, choice))).toEqual(
    vectors.map(([, , , newLow, newHigh]) => ({ low: newLow, high: newHigh })),
  );
});

test("a client's integer is the low half, negative ones as two's complement", () => {
  expect(seedOfClient(42)).toEqual({ low: 42n, high: 0n });
  expect(seedOfClient(-1)).toEqual({ low: 0xffffffffffffffffn, high: 0n });
});

test("drawn seeds differ", () => {
  expect(drawSeed()).not.toEqual(drawSeed());
});

/** low, high, choice; new low, new high: printed by the native library. */
const vectors: [bigint, bigint, number, bigint, bigint][] = [
  [0x0n, 0x0n, 1, 0x1a90fdd58f51b95n, 0x27d67605c8868f5n],
  [0x2an, 0x0n, 2, 0xd60ae351cac50f67n, 0xcc7b9538a039a7c0n],
  [0xffffffffffffffffn, 0x0n, 15, 0x9e995104ea9479fdn, 0x94cf002837c2bfa4n],
  [0x123456789abcdefn, 0xfedcba9876543210n, 127, 0xf2a21736fd9b3c73n, 0x49550f73a2627a43n],
  [0x1n, 0x8000000000000000n, 4294967295, 0xa4362a2ada5f50f7n, 0xe238be4bc50c95c6n],
];

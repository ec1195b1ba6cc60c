// The 128-bit seed of a stream. Drawn here where the client gave none, so that a stream whose leader died goes on with the
// same noise. Bit for bit the seed_of_choice of native/include/muster/noise.h:
//   Philox4x32-10, key = low 64 bits of the seed (low word first), counter words =
//     { choice, domain 1 << 24, low word of the high 64 bits, high word of the high 64 bits }
//   words 0 and 1 of the output are the new low 64 bits, words 2 and 3 the new high 64 bits (the lower word first)
import { randomBytes } from "node:crypto";

export type Seed = { readonly low: bigint; readonly high: bigint };

const DOMAIN_CHOICE = 1 << 24;
const MULTIPLIER_0 = 0xd2511f53;
const MULTIPLIER_1 = 0xcd9e8d57;
const WEYL_0 = 0x9e3779b9;
const WEYL_1 = 0xbb67ae85;
const ROUNDS = 10;

type Words4 = [number, number, number, number];

/** Philox4x32-10 of a 128-bit counter under a 64-bit key; all words unsigned 32-bit. */
export function philox(counter: Words4, key: [number, number]): Words4 {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < ROUNDS; round++) {
    const product0 = BigInt(c0) * BigInt(MULTIPLIER_0);
    const product1 = BigInt(c2) * BigInt(MULTIPLIER_1);
    const high0 = Number(product0 >> 32n);
    const high1 = Number(product1 >> 32n);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c1 = Number(product1 & 0xffffffffn);
    c3 = Number(product0 & 0xffffffffn);
    k0 = (k0 + WEYL_0) >>> 0;
    k1 = (k1 + WEYL_1) >>> 0;
  }
  return [c0, c1, c2, c3];
}

const lowWord = (value: bigint): number => Number(value & 0xffffffffn);
const highWord = (value: bigint): number => Number((value >> 32n) & 0xffffffffn);

/** A fresh seed of 128 random bits. */
export function drawSeed(): Seed {
  const bytes = randomBytes(16);
  return { low: bytes.readBigUInt64LE(0), high: bytes.readBigUInt64LE(8) };
}

/** The seed a client's integer stands for; negative ones as their 64-bit two's complement. */
export const seedOfClient = (seed: number | bigint): Seed => ({ low: BigInt.asUintN(64, BigInt(seed)), high: 0n });

/** Seed of choice i of n: choice 0 is the seed itself. */
export function seedOfChoice(seed: Seed, choice: number): Seed {
  if (choice === 0) return seed;
  const [w0, w1, w2, w3] = philox(
    [choice >>> 0, DOMAIN_CHOICE, lowWord(seed.high), highWord(seed.high)],
    [lowWord(seed.low), highWord(seed.low)],
  );
  return { low: BigInt(w0) | (BigInt(w1) << 32n), high: BigInt(w2) | (BigInt(w3) << 32n) };
}

// The content address of a prefix: a 64-bit hash in two 32-bit lanes over the token ids, chained, so that the hash of a longer
// prefix follows from the hash of the shorter one and the new token alone. It begins with the vocabulary's hash and, where the
// temperature is above zero, the request's seed: two requests with one prefix and different seeds must not share hints.
// A collision costs a rejected draft, never a wrong token.
import type { Sampling } from "../../proto/gen/muster/v1/worker.ts";

export type PrefixHash = { low: number; high: number };

/** Murmur3's finalizer: every input bit reaches every output bit. */
function mix(x: number): number {
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return (x ^ (x >>> 16)) >>> 0;
}

/** The hash after one more token; a new object, the given one is left alone. */
export function extend(hash: PrefixHash, token: number): PrefixHash {
  const low = mix(hash.low ^ Math.imul(token + 1, 0x9e3779b1));
  const high = mix(hash.high ^ Math.imul(token + 0x632be5ab, 0x85157af5) ^ (low >>> 5));
  return { low, high };
}

export function extendAll(hash: PrefixHash, tokens: readonly number[], from = 0): PrefixHash {
  for (let i = from; i < tokens.length; i++) hash = extend(hash, tokens[i] ?? 0);
  return hash;
}

/** Where the chain of a request begins. */
export function rootHash(
  vocabHash: bigint,
  request: { sampling: Sampling; seedLow: bigint; seedHigh: bigint },
): PrefixHash {
  const words = [vocabHash & 0xffffffffn, vocabHash >> 32n];
  if (request.sampling.temperature > 0) {
    for (const seed of [request.seedLow, request.seedHigh]) words.push(seed & 0xffffffffn, seed >> 32n);
  }
  return words.reduce((hash, word) => extend(hash, Number(BigInt.asUintN(32, word))), {
    low: 0x4d555354,
    high: 0x53504543,
  });
}

export const equal = (a: PrefixHash, b: PrefixHash): boolean => a.low === b.low && a.high === b.high;

// Sampling noise, fixed to the bit: the same double on every machine, compiler and language.
//   Philox4x32-10, key = low 64 bits of the seed (low word first), counter words =
//     { index of the sampled token, domain << 24 | id >> 1, seed_high low word, seed_high high word }
//   even ids take output words 0 and 1 (word 0 low), odd ids words 2 and 3; k = top 52 bits of that u64
//   u = (2k + 1) * 2^-53, in (0, 1);  G = -log(-log(u))
// log is the function log_exact below: additions, multiplications and divisions in a stated order, no fused multiply-add,
// no library call. Vectors: test/fixtures/noise.json, shared with TypeScript.
#pragma once
#include <cstdint>

namespace muster {

struct Seed { uint64_t low = 0, high = 0; };

uint64_t noise_bits(const Seed& seed, uint32_t index, uint32_t domain, uint32_t id);  // the u64 of that id
double noise_uniform(uint64_t bits);
double log_exact(double x);   // natural logarithm of a positive normal double
double gumbel(uint64_t bits); // -log(-log(uniform))
// No id whose bits give a larger G than this can be found below it: G <= gumbel_bound(bits), cheap and never too small.
double gumbel_bound(uint64_t bits);
// Seed of choice i of n: choice 0 is the seed itself.
Seed seed_of_choice(const Seed& seed, uint32_t choice);

}  // namespace muster

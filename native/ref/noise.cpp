// Host code shared by all backends. Every double here is the result of +, -, *, / in the order written; the build forbids
// contraction, so the bits are the same on every IEEE machine. A port must keep the parentheses.
#include "muster/noise.h"

#include <array>
#include <bit>

namespace muster {
namespace {

// Philox4x32 with 10 rounds: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
using Words = std::array<uint32_t, 4>;

Words philox(Words counter, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0], b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key_low, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key_high, static_cast<uint32_t>(a)};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

constexpr uint32_t choice_domain = 1;  // domain 0 draws tokens

}  // namespace

uint64_t noise_bits(const Seed& seed, uint32_t index, uint32_t domain, uint32_t id) {
  const Words counter{index, domain << 24 | id >> 1, static_cast<uint32_t>(seed.high), static_cast<uint32_t>(seed.high >> 32)};
  const Words words = philox(counter, static_cast<uint32_t>(seed.low), static_cast<uint32_t>(seed.low >> 32));
  return id & 1 ? uint64_t{words[3]} << 32 | words[2] : uint64_t{words[1]} << 32 | words[0];
}

// 2k + 1 < 2^53 is exact in a double, and so is its product with a power of two.
double noise_uniform(uint64_t bits) { return static_cast<double>(2 * (bits >> 12) + 1) * 0x1p-53; }

// x = 2^k * m with m in [sqrt(1/2), sqrt(2)), f = m - 1 (exact), s = f / (2 + f), z = s * s:
//   log(m) = 2 atanh(s) = 2s + s * R             R = z * (2/3 + z * (2/5 + ... + z * 2/23))
//          = f - s * f + s * R                   since 2s = f - s * f
//          = f - (f^2/2 - s * (f^2/2 + R))       since s * f = f^2/2 - s * f^2/2
// The last form (fdlibm's e_log.c has it too) leaves the large term f without rounding. |s| <= 0.1716: the first dropped
// term, z^12 * 2/25, is below 2^-60 of log(m). Error below 1 ulp in trials; the fixtures hold it to 2 ulp of 60 digits.
// k * ln2_high is exact: ln2_high ends in 21 zero bits.
double log_exact(double x) {
  constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  constexpr uint64_t sqrt_half_high = 0x3fe6a09eull;  // top word of sqrt(1/2): where the exponent steps
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint64_t shifted = bits + ((0x3ff00000ull - sqrt_half_high) << 32);
  const double k = static_cast<double>(static_cast<int>(shifted >> 52) - 1023);
  const double m = std::bit_cast<double>((shifted & 0x000fffffffffffffull) + (sqrt_half_high << 32));
  const double f = m - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double r = 2.0 / 23;
  for (int n = 21; n >= 3; n -= 2) r = 2.0 / n + z * r;
  r = z * r;
  const double half_square = (0.5 * f) * f;
  return k * ln2_high - ((half_square - (s * (half_square + r) + k * ln2_low)) - f);
}

double gumbel(uint64_t bits) { return -log_exact(-log_exact(noise_uniform(bits))); }

// Let v = 1 - u = (2k' + 1) * 2^-53 with k' = 2^52 - 1 - k, the complement of the 52 bits. -log(1 - v) >= v, so
// G = -log(-log(1 - v)) <= -log(v) <= e * ln 2 where v >= 2^-e. With n leading zeros in the complement of the 64 bits
// (n <= 52 counts, then the forced 1 follows), 2k' + 1 >= 2^(52 - n), so e = n + 1 <= 53.
// The margin covers rounding: log_exact errs by less than 2 ulp, its argument's error moves the outer log by as much, and
// |G| < 37, so the computed G is off by less than 37 * 2^-50 < 1e-13, and the product here by less.
double gumbel_bound(uint64_t bits) {
  const uint64_t complement = ~bits >> 12;  // k', 52 bits
  const int zeros = complement == 0 ? 52 : std::countl_zero(complement) - 12;
  return static_cast<double>(zeros + 1) * 0x1.62e42fefa39efp-1 + 1e-12;
}

// The 128 bits of the two ids 0 and 1 at index `choice` in domain 1.
Seed seed_of_choice(const Seed& seed, uint32_t choice) {
  if (choice == 0) return seed;
  return {noise_bits(seed, choice, choice_domain, 0), noise_bits(seed, choice, choice_domain, 1)};
}

}  // namespace muster

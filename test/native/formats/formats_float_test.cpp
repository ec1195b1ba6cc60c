// Half floats: every f16 and bf16 there and back, and rounding of f32 to nearest even.
#include <bit>
#include <cmath>
#include <random>

#include "check.h"
#include "formats/format.h"

using namespace muster;

namespace {

// The definition: sign * 2^(e - 15) * 1.fraction, subnormals 2^-14 * 0.fraction.
double f16_by_definition(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const double fraction = (bits & 1023) / 1024.0, sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return bits & 1023 ? NAN : sign * INFINITY;
  return exponent == 0 ? sign * std::ldexp(fraction, -14) : sign * std::ldexp(1 + fraction, exponent - 15);
}

bool same(float a, double b) { return std::isnan(b) ? std::isnan(a) : double{a} == b && std::signbit(a) == std::signbit(b); }

}  // namespace

TEST("every f16 has the value of its definition and comes back") {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = f16_to_f32(static_cast<uint16_t>(bits));
    if (!same(value, f16_by_definition(bits))) { CHECK_EQ(bits, 0xffffffffu); return; }
    const uint16_t back = f32_to_f16(value);
    if (std::isnan(value) ? (back & 0x7e00) != 0x7e00 : back != bits) { CHECK_EQ(uint32_t{back}, bits); return; }
  }
}

TEST("every bf16 comes back, NaN as a quiet NaN") {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = bf16_to_f32(static_cast<uint16_t>(bits));
    const uint16_t back = f32_to_bf16(value);
    if (std::isnan(value) ? (back & 0x7fc0) != 0x7fc0 : back != bits) { CHECK_EQ(uint32_t{back}, bits); return; }
  }
}

TEST("f32 to f16 rounds to the nearest, ties to the even fraction") {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {  // between every two finite neighbours
    const double low = f16_by_definition(bits), high = f16_by_definition(bits + 1), middle = (low + high) / 2;
    const auto to = [](double x) { return uint32_t{f32_to_f16(static_cast<float>(x))}; };
    const float below = std::nextafterf(static_cast<float>(middle), 0.0f), above = std::nextafterf(static_cast<float>(middle), INFINITY);
    if (to(middle) != bits + (bits & 1) || to(below) != bits || to(above) != bits + 1) { CHECK_EQ(bits, 0xffffffffu); return; }
  }
  CHECK_EQ(f32_to_f16(65519.996f), 0x7bff);
  CHECK_EQ(f32_to_f16(65520.0f), 0x7c00);
  CHECK_EQ(f32_to_f16(-1e30f), 0xfc00);
  CHECK_EQ(f32_to_f16(0x1p-25f), 0);        // half of the smallest: a tie, to even
  CHECK_EQ(f32_to_f16(-0x1.8p-25f), 0x8001);
}

TEST("f32 to bf16 rounds to the nearest, ties to the even fraction") {
  std::mt19937 random(11);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t bits = random();
    const float value = std::bit_cast<float>(bits);
    if (!std::isfinite(value)) continue;
    const uint32_t rest = bits & 0xffff, up = rest > 0x8000 || (rest == 0x8000 && (bits >> 16 & 1));
    if (f32_to_bf16(value) != (bits >> 16) + up) { CHECK_EQ(bits, 0xffffffffu); return; }
  }
  CHECK_EQ(f32_to_bf16(std::bit_cast<float>(0x3f808000u)), 0x3f80);
  CHECK_EQ(f32_to_bf16(std::bit_cast<float>(0x3f818000u)), 0x3f82);
  CHECK_EQ(f32_to_bf16(std::bit_cast<float>(0x7f7fffffu)), 0x7f80);
}

MUSTER_TEST_MAIN

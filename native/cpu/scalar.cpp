// The variant for any CPU: 16 lanes are an array, fma is the C library's correctly rounded fmaf.
#include "cpu/attend_kernel.h"
#include "formats/format.h"

namespace muster::cpu {
namespace {

struct LanesScalar {
  struct F { float at[lanes]; };
  struct I { uint32_t at[lanes]; };
  static constexpr int tokens_max = 4;
  static constexpr int panels(int) { return 1; }
  static constexpr uint32_t columns(int) { return 1; }

  template <class Of> static MUSTER_INLINE F each(Of&& of) {
    F out;
    for (uint32_t i = 0; i < lanes; ++i) out.at[i] = of(i);
    return out;
  }
  static F zero() { return each([](uint32_t) { return 0.0f; }); }
  static F set1(float x) { return each([&](uint32_t) { return x; }); }
  static F load(const float* p) { return each([&](uint32_t i) { return p[i]; }); }
  static F load_part(const float* p, uint32_t n) { return each([&](uint32_t i) { return i < n ? p[i] : 0.0f; }); }
  static void store(float* p, const F& x) { store_part(p, x, lanes); }
  static void store_part(float* p, const F& x, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) p[i] = x.at[i];
  }
  static F fma(const F& a, const F& b, const F& c) { return each([&](uint32_t i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); }); }
  static F add(const F& a, const F& b) { return each([&](uint32_t i) { return a.at[i] + b.at[i]; }); }
  static F sub(const F& a, const F& b) { return each([&](uint32_t i) { return a.at[i] - b.at[i]; }); }
  static F mul(const F& a, const F& b) { return each([&](uint32_t i) { return a.at[i] * b.at[i]; }); }
  static F div(const F& a, const F& b) { return each([&](uint32_t i) { return a.at[i] / b.at[i]; }); }
  // The second operand where the two are equal or unordered, as the vector instructions have it.
  static F max(const F& a, const F& b) { return each([&](uint32_t i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; }); }
  static F min(const F& a, const F& b) { return each([&](uint32_t i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; }); }
  static F where_less(const F& a, const F& b, const F& yes, const F& no) {
    return each([&](uint32_t i) { return a.at[i] < b.at[i] ? yes.at[i] : no.at[i]; });
  }

  static I load_u32(const uint32_t* p) {
    I out;
    for (uint32_t i = 0; i < lanes; ++i) out.at[i] = p[i];
    return out;
  }
  static float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
  static F bf16_low(const I& x) { return each([&](uint32_t i) { return from_bits(x.at[i] << 16); }); }
  static F bf16_high(const I& x) { return each([&](uint32_t i) { return from_bits(x.at[i] & 0xffff0000u); }); }
  static F load_f16(const uint16_t* p) { return each([&](uint32_t i) { return f16_to_f32(p[i]); }); }
  static F load_i8(const int8_t* p) { return each([&](uint32_t i) { return static_cast<float>(p[i]); }); }
  static F load_u8(const uint8_t* p) { return each([&](uint32_t i) { return static_cast<float>(p[i]); }); }
  static F nibble(const I& x) { return each([&](uint32_t i) { return static_cast<float>(x.at[i] & 15u); }); }
  static I next_nibble(const I& x) {
    I out;
    for (uint32_t i = 0; i < lanes; ++i) out.at[i] = x.at[i] >> 4;
    return out;
  }

  static F add_exponent(const F& p, const F& shifted) {
    return each([&](uint32_t i) {
      return from_bits(__builtin_bit_cast(uint32_t, p.at[i]) + (__builtin_bit_cast(uint32_t, shifted.at[i]) << 23));
    });
  }
  static float reduce_add(F x) {
    for (uint32_t step = lanes / 2; step > 0; step /= 2)
      for (uint32_t i = 0; i < step; ++i) x.at[i] += x.at[i + step];
    return x.at[0];
  }
  static float reduce_max(F x) {
    for (uint32_t step = lanes / 2; step > 0; step /= 2)
      for (uint32_t i = 0; i < step; ++i) x.at[i] = x.at[i] > x.at[i + step] ? x.at[i] : x.at[i + step];
    return x.at[0];
  }
};

constexpr Kernels table = kernels_of<LanesScalar>("scalar");

}  // namespace

const Kernels& scalar_kernels() { return table; }

}  // namespace muster::cpu

// The AVX-512 (F, BW, DQ, VL) variant: 16 lanes are one register.
// GCC 12 warns of its own _mm512_undefined_epi32 (bug 105593) in callers of the intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/attend_kernel.h"

namespace muster::cpu {
namespace {

struct Lanes512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int tokens_max = 8;
  // Panels of a tile: enough independent sums to cover the latency of an fma (4 cycles, two in each), no more registers than 32.
  static constexpr int panels(int tokens) { return tokens <= 2 ? 4 : 2; }
  static constexpr uint32_t columns(int tokens) { return tokens <= 4 ? 4 : 2; }
  static __mmask16 mask(uint32_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static MUSTER_INLINE F zero() { return _mm512_setzero_ps(); }
  static MUSTER_INLINE F set1(float x) { return _mm512_set1_ps(x); }
  static MUSTER_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static MUSTER_INLINE F load_part(const float* p, uint32_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static MUSTER_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static MUSTER_INLINE void store_part(float* p, F x, uint32_t n) { _mm512_mask_storeu_ps(p, mask(n), x); }
  static MUSTER_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static MUSTER_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static MUSTER_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static MUSTER_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static MUSTER_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static MUSTER_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static MUSTER_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static MUSTER_INLINE F where_less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }

  static MUSTER_INLINE I load_u32(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static MUSTER_INLINE F bf16_low(I x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
  static MUSTER_INLINE F bf16_high(I x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))); }
  static MUSTER_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static MUSTER_INLINE F load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static MUSTER_INLINE F load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // A permutation reads only the low four bits of an index: masking and conversion to float in one.
  static MUSTER_INLINE F nibble(I x) {
    return _mm512_permutexvar_ps(x, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static MUSTER_INLINE I next_nibble(I x) { return _mm512_srli_epi32(x, 4); }

  static MUSTER_INLINE F add_exponent(F p, F shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
  }
  static MUSTER_INLINE float reduce_add(F x) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static MUSTER_INLINE float reduce_max(F x) {
    const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
};

constexpr Kernels table = kernels_of<Lanes512>("avx512");

}  // namespace

const Kernels& avx512_kernels() { return table; }

}  // namespace muster::cpu

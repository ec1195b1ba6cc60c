// The AVX2 (with FMA and F16C) variant: 16 lanes are two registers.
#include <immintrin.h>

#include "cpu/attend_kernel.h"

namespace muster::cpu {
namespace {

struct Lanes256 {
  struct F { __m256 low, high; };
  struct I { __m256i low, high; };
  static constexpr int tokens_max = 4;
  static constexpr int panels(int tokens) { return tokens == 1 ? 2 : 1; }  // 16 registers: 8 sums, the rest weights and scales
  static constexpr uint32_t columns(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }

  static MUSTER_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static MUSTER_INLINE F set1(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
  static MUSTER_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static MUSTER_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.low); _mm256_storeu_ps(p + 8, x.high); }
  static MUSTER_INLINE __m256i mask(uint32_t n, int from) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n) - from), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static MUSTER_INLINE F load_part(const float* p, uint32_t n) { return {_mm256_maskload_ps(p, mask(n, 0)), _mm256_maskload_ps(p + 8, mask(n, 8))}; }
  static MUSTER_INLINE void store_part(float* p, F x, uint32_t n) {
    _mm256_maskstore_ps(p, mask(n, 0), x.low);
    _mm256_maskstore_ps(p + 8, mask(n, 8), x.high);
  }
  static MUSTER_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
  static MUSTER_INLINE F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static MUSTER_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static MUSTER_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static MUSTER_INLINE F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static MUSTER_INLINE F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static MUSTER_INLINE F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  static MUSTER_INLINE F where_less(F a, F b, F yes, F no) {
    return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
  }

  static MUSTER_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static MUSTER_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static MUSTER_INLINE __m128i load_64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static MUSTER_INLINE I load_u32(const uint32_t* p) { return {load_256(p), load_256(p + 8)}; }
  static MUSTER_INLINE F bf16_low(I x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.high, 16))};
  }
  static MUSTER_INLINE F bf16_high(I x) {
    const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(x.low, top)), _mm256_castsi256_ps(_mm256_and_si256(x.high, top))};
  }
  static MUSTER_INLINE F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))}; }
  static MUSTER_INLINE F load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_64(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_64(p + 8)))};
  }
  static MUSTER_INLINE F load_u8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_64(p))), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_64(p + 8)))};
  }
  static MUSTER_INLINE F nibble(I x) {
    const __m256i low = _mm256_set1_epi32(15);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(x.low, low)), _mm256_cvtepi32_ps(_mm256_and_si256(x.high, low))};
  }
  static MUSTER_INLINE I next_nibble(I x) { return {_mm256_srli_epi32(x.low, 4), _mm256_srli_epi32(x.high, 4)}; }

  static MUSTER_INLINE __m256 add_exponent(__m256 p, __m256 shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  }
  static MUSTER_INLINE F add_exponent(F p, F shifted) { return {add_exponent(p.low, shifted.low), add_exponent(p.high, shifted.high)}; }
  static MUSTER_INLINE float reduce_add(F x) {
    const __m256 a = _mm256_add_ps(x.low, x.high);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static MUSTER_INLINE float reduce_max(F x) {
    const __m256 a = _mm256_max_ps(x.low, x.high);
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
};

constexpr Kernels table = kernels_of<Lanes256>("avx2");

}  // namespace

const Kernels& avx2_kernels() { return table; }

}  // namespace muster::cpu

// Attention and exp over a lane type V; see linear_kernel.h for the linkage rule.
//   A1  keys are taken in splits [128 i, 128 i + 128) of absolute positions; a split has its own maximum, sum and output,
//       which are folded into the running ones in order. So a token's bits do not depend on how its prefix was computed,
//       nor on the size of a KV block.
#pragma once
#include "cpu/linear_kernel.h"

namespace muster::cpu {
namespace {

// e^x, about 1.5 ulp; 0 below -86.5, e^88 above 88. Cephes' polynomial; 2^n is added to the exponent bits.
template <class V> MUSTER_INLINE typename V::F exp_lanes(typename V::F x) {
  using F = typename V::F;
  const F shift = V::set1(12582912.0f);  // 1.5 * 2^23: the sum's low mantissa bits are the rounded integer
  const F bounded = V::min(V::max(x, V::set1(-86.5f)), V::set1(88.0f));
  const F t = V::fma(bounded, V::set1(1.44269504088896341f), shift);
  const F n = V::sub(t, shift);
  const F r = V::fma(n, V::set1(2.12194440e-4f), V::fma(n, V::set1(-0.693359375f), bounded));
  F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::add(V::fma(p, V::mul(r, r), r), V::set1(1.0f));
  return V::where_less(x, V::set1(-86.5f), V::zero(), V::add_exponent(p, t));
}

template <class V> void exp_array(float* values, size_t count) {
  for (size_t i = 0; i < count; i += lanes) {
    if (count - i >= lanes) V::store(values + i, exp_lanes<V>(V::load(values + i)));
    else V::store_part(values + i, exp_lanes<V>(V::load_part(values + i, uint32_t(count - i))), uint32_t(count - i));
  }
}

template <class V> MUSTER_INLINE typename V::F silu_mul_lanes(typename V::F gate, typename V::F up) {
  const auto e = exp_lanes<V>(V::sub(V::zero(), gate));
  return V::mul(V::div(gate, V::add(V::set1(1.0f), e)), up);
}

template <class V> void silu_mul(float* gate, const float* up, size_t count) {
  for (size_t i = 0; i < count; i += lanes) {
    const uint32_t rest = uint32_t(count - i < lanes ? count - i : lanes);
    if (rest == lanes) V::store(gate + i, silu_mul_lanes<V>(V::load(gate + i), V::load(up + i)));
    else V::store_part(gate + i, silu_mul_lanes<V>(V::load_part(gate + i, rest), V::load_part(up + i, rest)), rest);
  }
}

// A split's part of the keys: positions [begin, end) inside [base, base + split_tokens).
struct Split { uint32_t base, begin, end; };

// a.scratch[m][lanes + position - base] = q of head m . k, for all keys of every key group that touches the split.
template <class V> void scores(const AttendArgs& a, const Split& s, const float* q, uint32_t heads) {
  Panel groups[split_tokens + 2];  // blocks of one token are the most there can be
  uint32_t count = 0;
  for (uint32_t block = s.begin / a.block_tokens; block <= (s.end - 1) / a.block_tokens; ++block) {
    const float* keys = a.k + a.block_stride * a.table[block];
    for (uint32_t g = 0; g * lanes < a.block_tokens; ++g) {
      const uint32_t at = block * a.block_tokens + g * lanes;
      const uint32_t rows = a.block_tokens - g * lanes < lanes ? a.block_tokens - g * lanes : lanes;
      if (at >= s.end || at + rows <= s.begin) continue;
      groups[count++] = {reinterpret_cast<const uint8_t*>(keys + size_t{g} * a.dim * lanes), at + lanes - s.base, rows};
    }
  }
  const PanelLayout layout{PanelKind::f32, false, false, 0, a.dim, 1, 0, 0, 0, 0, 0};
  const uint32_t step = V::panels(int(heads));
  for (uint32_t g = 0; g < count; g += step) {
    const uint32_t rest = count - g < step ? count - g : step;
    tile_of<V, PanelKind::f32>(heads, {&layout, groups + g, rest, 0, a.dim, q, a.dim, a.scratch, score_stride, false});
  }
}

// Turns a split's scores into exp(scale * score - maximum); returns maximum and sum. Lane = position mod 16.
struct Softmax { float maximum, sum; };
template <class V> Softmax softmax(const AttendArgs& a, const Split& s, float* row) {
  using F = typename V::F;
  float* score = row + lanes;
  const uint32_t first = (s.begin - s.base) / lanes * lanes, last = (s.end - s.base + lanes - 1) / lanes * lanes;
  for (uint32_t i = first; i < s.begin - s.base; ++i) score[i] = -__builtin_inff();
  for (uint32_t i = s.end - s.base; i < last; ++i) score[i] = -__builtin_inff();
  F maximum = V::set1(-__builtin_inff());
  for (uint32_t i = first; i < last; i += lanes) {
    const F scaled = V::mul(V::load(score + i), V::set1(a.scale));
    V::store(score + i, scaled);
    maximum = V::max(maximum, scaled);
  }
  const float top = V::reduce_max(maximum);
  F sum = V::zero();
  for (uint32_t i = first; i < last; i += lanes) {
    const F e = exp_lanes<V>(V::sub(V::load(score + i), V::set1(top)));
    V::store(score + i, e);
    sum = V::add(sum, e);
  }
  return {top, V::reduce_add(sum)};
}

// out[m][d] = sum over the split's keys, in order, of p[m][key] * v[key][d].
template <class V, int MT> void mix(const AttendArgs& a, const Split& s, const float* p, float* out) {
  using F = typename V::F;
  constexpr uint32_t ND = V::columns(MT);
  const uint32_t columns = (a.dim + lanes - 1) / lanes;
  for (uint32_t c = 0; c < columns; c += ND) {
    F sum[MT][ND];
    size_t at[ND];
    for (uint32_t d = 0; d < ND; ++d) at[d] = size_t{c + d < columns ? c + d : columns - 1} * lanes;
    MUSTER_UNROLL for (int m = 0; m < MT; ++m) {
      MUSTER_UNROLL for (uint32_t d = 0; d < ND; ++d) sum[m][d] = V::zero();
    }
    for (uint32_t position = s.begin; position < s.end;) {
      const uint32_t block = position / a.block_tokens, inside = position % a.block_tokens;
      const uint32_t here = a.block_tokens - inside < s.end - position ? a.block_tokens - inside : s.end - position;
      const float* v = a.v + a.block_stride * a.table[block] + size_t{inside} * a.dim;
      const float* weight = p + lanes + (position - s.base);
      for (uint32_t j = 0; j < here; ++j, v += a.dim) {
        F value[ND];
        MUSTER_UNROLL for (uint32_t d = 0; d < ND; ++d) value[d] = V::load(v + at[d]);
        MUSTER_UNROLL for (int m = 0; m < MT; ++m) {
          const F b = V::set1(weight[size_t(m) * score_stride + j]);
          MUSTER_UNROLL for (uint32_t d = 0; d < ND; ++d) sum[m][d] = V::fma(b, value[d], sum[m][d]);
        }
      }
      position += here;
    }
    MUSTER_UNROLL for (uint32_t d = 0; d < ND; ++d) {
      if (c + d >= columns) break;
      const uint32_t rest = a.dim - uint32_t(at[d]) < lanes ? a.dim - uint32_t(at[d]) : lanes;
      MUSTER_UNROLL for (int m = 0; m < MT; ++m) V::store_part(out + size_t(m) * a.dim + at[d], sum[m][d], rest);
    }
  }
}

template <class V> void mix_of(uint32_t heads, const AttendArgs& a, const Split& s, float* scratch) {
  float* out = scratch + size_t{tile_tokens_max} * score_stride;
  if constexpr (V::tokens_max >= 8) {
    if (heads == 8) return mix<V, 8>(a, s, scratch, out);
    if (heads == 7) return mix<V, 7>(a, s, scratch, out);
    if (heads == 6) return mix<V, 6>(a, s, scratch, out);
    if (heads == 5) return mix<V, 5>(a, s, scratch, out);
  }
  if (heads == 4) return mix<V, 4>(a, s, scratch, out);
  if (heads == 3) return mix<V, 3>(a, s, scratch, out);
  if (heads == 2) return mix<V, 2>(a, s, scratch, out);
  return mix<V, 1>(a, s, scratch, out);
}

// into = from * b, or into * a + from * b
template <class V> void scale(float* into, const float* from, uint32_t dim, float b) {
  for (uint32_t d = 0; d < dim; d += lanes) {
    const uint32_t rest = dim - d < lanes ? dim - d : lanes;
    V::store_part(into + d, V::mul(V::load_part(from + d, rest), V::set1(b)), rest);
  }
}
struct Shares { float a, b; };
template <class V> void fold(float* into, const float* from, uint32_t dim, Shares s) {
  for (uint32_t d = 0; d < dim; d += lanes) {
    const uint32_t rest = dim - d < lanes ? dim - d : lanes;
    const auto kept = V::mul(V::load_part(into + d, rest), V::set1(s.a));
    V::store_part(into + d, V::fma(V::load_part(from + d, rest), V::set1(s.b), kept), rest);
  }
}

struct Partial { Softmax softmax; float* values; };

// Folds a later split's result into the running one.
template <class V> void merge(Partial& into, const Partial& from, uint32_t dim) {
  const float top = from.softmax.maximum > into.softmax.maximum ? from.softmax.maximum : into.softmax.maximum;
  float change[lanes] = {into.softmax.maximum - top, from.softmax.maximum - top};
  V::store(change, exp_lanes<V>(V::load(change)));
  fold<V>(into.values, from.values, dim, {change[0], change[1]});
  into.softmax = {top, __builtin_fmaf(from.softmax.sum, change[1], into.softmax.sum * change[0])};
}

template <class V> void attend_heads(const AttendArgs& a, uint32_t head, uint32_t heads) {
  float* mixed = a.scratch + size_t{tile_tokens_max} * score_stride;
  Partial running[tile_tokens_max];
  for (uint32_t m = 0; m < heads; ++m) running[m] = {{0, 0}, a.out + size_t{head + m} * a.dim};
  for (uint32_t base = a.begin / split_tokens * split_tokens; base < a.end; base += split_tokens) {
    const bool first = base <= a.begin;
    const Split s{base, first ? a.begin : base, a.end - base < split_tokens ? a.end : base + split_tokens};
    Partial own[tile_tokens_max];
    scores<V>(a, s, a.q + size_t{head} * a.dim, heads);
    for (uint32_t m = 0; m < heads; ++m) own[m] = {softmax<V>(a, s, a.scratch + size_t{m} * score_stride), mixed + size_t{m} * a.dim};
    mix_of<V>(heads, a, s, a.scratch);
    for (uint32_t m = 0; m < heads; ++m) {
      if (!first) {
        merge<V>(running[m], own[m], a.dim);
        continue;
      }
      running[m].softmax = own[m].softmax;
      scale<V>(running[m].values, own[m].values, a.dim, 1.0f);
    }
  }
  for (uint32_t m = 0; m < heads; ++m) scale<V>(running[m].values, running[m].values, a.dim, 1.0f / running[m].softmax.sum);
}

template <class V> void attend(const AttendArgs& a) {
  constexpr uint32_t most = uint32_t(V::tokens_max);
  for (uint32_t head = 0; head < a.heads; head += most) attend_heads<V>(a, head, a.heads - head < most ? a.heads - head : most);
}

template <class V> constexpr Kernels kernels_of(const char* isa) {
  return {isa, linear<V>, unpack<V>, silu_mul<V>, exp_array<V>, attend<V>};
}

}  // namespace
}  // namespace muster::cpu

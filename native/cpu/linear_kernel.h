// Panels times activations, over a lane type V (16 f32 lanes). Included by one file per instruction set, which defines V in an
// unnamed namespace: nothing here may have external linkage, or the linker could pick code that the CPU does not have. For the
// same reason no standard container or algorithm is used.
#pragma once
#include "cpu/kernels.h"

namespace muster::cpu {
namespace {

#define MUSTER_INLINE inline __attribute__((always_inline))
#define MUSTER_UNROLL _Pragma("GCC unroll 8")
#define MUSTER_LAMBDA_INLINE __attribute__((always_inline))

// Weights are read once, in several streams at a time, more than hardware prefetchers follow: fetched 2 KiB ahead, weights from
// DRAM came 1.1 to 1.4 times as fast for one token and 1.3 to 1.5 times for four (Zen 5; 1 and 2 KiB alike, 512 bytes too near).
MUSTER_INLINE void fetch_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 2048); }

template <class V> struct GroupScale { typename V::F scale, shift; };  // value = code * scale + shift

template <class V> MUSTER_INLINE GroupScale<V> group_scale(const PanelLayout& layout, const uint8_t* panel, uint32_t group) {
  const uint32_t width = layout.has_minimum ? 2 : 1;
  typename V::F scale, minimum = V::zero();
  if (layout.two_level) {
    const uint32_t super = (group + layout.supers_offset) >> layout.supers_shift;
    const auto* d = reinterpret_cast<const uint16_t*>(panel) + size_t{super} * width * lanes;
    const uint8_t* sub = panel + layout.scales_at + size_t{group} * width * lanes;
    scale = V::mul(V::load_f16(d), V::load_i8(reinterpret_cast<const int8_t*>(sub)));
    if (layout.has_minimum) minimum = V::mul(V::load_f16(d + lanes), V::load_u8(sub + lanes));
  } else {
    const auto* d = reinterpret_cast<const uint16_t*>(panel + layout.scales_at) + size_t{group} * width * lanes;
    scale = V::load_f16(d);
    if (layout.has_minimum) minimum = V::load_f16(d + lanes);
  }
  // zero is not 0 only where there is no minimum (Q4_0): both products and the difference are exact.
  return {scale, V::sub(V::mul(V::set1(-static_cast<float>(layout.zero)), scale), minimum)};
}

struct Columns { const PanelLayout& layout; uint32_t first, count; };

template <class V, PanelKind kind, int NP, class Each>
MUSTER_INLINE void each_float_column(const Columns& c, const uint8_t* const (&panel)[NP], Each&& each) {
  typename V::F w[NP];
  if constexpr (kind == PanelKind::bf16) {
    typename V::I pair[NP];
    for (uint32_t k = 0; k < c.count; k += 2) {
      MUSTER_UNROLL for (int p = 0; p < NP; ++p) {
        const auto* at = reinterpret_cast<const uint32_t*>(panel[p]) + size_t{(c.first + k) / 2} * lanes;
        fetch_ahead(at);
        pair[p] = V::load_u32(at);
        w[p] = V::bf16_low(pair[p]);
      }
      each(k, w);
      if (k + 1 == c.count) break;
      MUSTER_UNROLL for (int p = 0; p < NP; ++p) w[p] = V::bf16_high(pair[p]);
      each(k + 1, w);
    }
  } else {
    for (uint32_t k = 0; k < c.count; ++k) {
      MUSTER_UNROLL for (int p = 0; p < NP; ++p) {
        const size_t at = size_t{c.first + k} * lanes;
        if constexpr (kind == PanelKind::f32) {
          w[p] = V::load(reinterpret_cast<const float*>(panel[p]) + at);
        } else {
          fetch_ahead(reinterpret_cast<const uint16_t*>(panel[p]) + at);
          w[p] = V::load_f16(reinterpret_cast<const uint16_t*>(panel[p]) + at);
        }
      }
      each(k, w);
    }
  }
}

template <class V, PanelKind kind, int NP, class Each>
MUSTER_INLINE void each_code_column(const Columns& c, const uint8_t* const (&panel)[NP], Each&& each) {
  // A cache line of codes holds eight columns of code4, four of code8.
  constexpr uint32_t step = kind == PanelKind::code4 ? 8 : 4;
  const uint32_t in_group = c.layout.group;
  typename V::F w[NP];
  GroupScale<V> s[NP];
  uint32_t group = c.first / in_group;
  for (uint32_t k = 0; k < c.count; k += in_group, ++group) {
    MUSTER_UNROLL for (int p = 0; p < NP; ++p) s[p] = group_scale<V>(c.layout, panel[p], group);
    for (uint32_t i = 0; i < in_group; i += step) {
      const uint8_t* line[NP];
      [[maybe_unused]] typename V::I eight[NP];
      MUSTER_UNROLL for (int p = 0; p < NP; ++p) {
        line[p] = panel[p] + c.layout.codes_at + size_t{(c.first + k + i) / step} * (lanes * sizeof(uint32_t));
        fetch_ahead(line[p]);
        if constexpr (kind == PanelKind::code4) eight[p] = V::load_u32(reinterpret_cast<const uint32_t*>(line[p]));
      }
      MUSTER_UNROLL for (uint32_t j = 0; j < step; ++j) {
        MUSTER_UNROLL for (int p = 0; p < NP; ++p) {
          if constexpr (kind == PanelKind::code4) {
            w[p] = V::fma(V::nibble(eight[p]), s[p].scale, s[p].shift);
            eight[p] = V::next_nibble(eight[p]);
          } else {
            w[p] = V::fma(V::load_i8(reinterpret_cast<const int8_t*>(line[p]) + size_t{j} * lanes), s[p].scale, s[p].shift);
          }
        }
        each(k + i + j, w);
      }
    }
  }
}

// Calls each(k, w[NP]) for every column k of [first, first + count), counted from `first`.
template <class V, PanelKind kind, int NP, class Each>
MUSTER_INLINE void each_column(const Columns& columns, const uint8_t* const (&panel)[NP], Each&& each) {
  if constexpr (kind == PanelKind::code4 || kind == PanelKind::code8) each_code_column<V, kind, NP>(columns, panel, each);
  else each_float_column<V, kind, NP>(columns, panel, each);
}

// One tile: MT tokens by V::panels(MT) panels over one chunk of k. Panels past `count` repeat the last one and are dropped.
struct Tile {
  const PanelLayout* layout;
  const Panel* panels;
  uint32_t count;
  uint32_t first, length;          // columns
  const float* x;                  // at column `first`
  size_t x_stride;
  float* out;
  size_t out_stride;
  bool add;                        // to out; else out is overwritten
};

template <class V, PanelKind kind, int MT> void tile(const Tile& t) {
  using F = typename V::F;
  constexpr int NP = V::panels(MT);
  const uint8_t* panel[NP];
  for (int p = 0; p < NP; ++p) panel[p] = t.panels[uint32_t(p) < t.count ? uint32_t(p) : t.count - 1].data;
  F sum[MT][NP];
  MUSTER_UNROLL for (int m = 0; m < MT; ++m) {
    MUSTER_UNROLL for (int p = 0; p < NP; ++p) sum[m][p] = V::zero();
  }
  const float* x = t.x;
  const size_t stride = t.x_stride;
  each_column<V, kind, NP>({*t.layout, t.first, t.length}, panel, [&](uint32_t k, const F(&w)[NP]) MUSTER_LAMBDA_INLINE {
    MUSTER_UNROLL for (int m = 0; m < MT; ++m) {
      const F b = V::set1(x[size_t(m) * stride + k]);
      MUSTER_UNROLL for (int p = 0; p < NP; ++p) sum[m][p] = V::fma(b, w[p], sum[m][p]);
    }
  });
  MUSTER_UNROLL for (int p = 0; p < NP; ++p) {
    if (uint32_t(p) >= t.count) break;
    const uint32_t rows = t.panels[p].rows;
    MUSTER_UNROLL for (int m = 0; m < MT; ++m) {
      float* at = t.out + size_t(m) * t.out_stride + t.panels[p].row;
      if (rows == lanes) V::store(at, t.add ? V::add(V::load(at), sum[m][p]) : sum[m][p]);
      else V::store_part(at, t.add ? V::add(V::load_part(at, rows), sum[m][p]) : sum[m][p], rows);
    }
  }
}

template <class V, PanelKind kind> void tile_of(uint32_t tokens, const Tile& t) {
  if constexpr (V::tokens_max >= 8) {
    if (tokens == 8) return tile<V, kind, 8>(t);
    if (tokens == 7) return tile<V, kind, 7>(t);
    if (tokens == 6) return tile<V, kind, 6>(t);
    if (tokens == 5) return tile<V, kind, 5>(t);
  }
  if (tokens == 4) return tile<V, kind, 4>(t);
  if (tokens == 3) return tile<V, kind, 3>(t);
  if (tokens == 2) return tile<V, kind, 2>(t);
  return tile<V, kind, 1>(t);
}

template <class V, PanelKind kind> void unpack_kind(const UnpackArgs& a) {
  const uint8_t* panel[1] = {a.panel};
  each_column<V, kind, 1>({*a.layout, a.k, a.count}, panel,
                          [&](uint32_t k, const typename V::F(&w)[1]) MUSTER_LAMBDA_INLINE { V::store(a.out + size_t{k} * lanes, w[0]); });
}

template <class V> void unpack(const UnpackArgs& a) {
  switch (a.layout->kind) {
    case PanelKind::f32: return unpack_kind<V, PanelKind::f32>(a);
    case PanelKind::f16: return unpack_kind<V, PanelKind::f16>(a);
    case PanelKind::bf16: return unpack_kind<V, PanelKind::bf16>(a);
    case PanelKind::code4: return unpack_kind<V, PanelKind::code4>(a);
    case PanelKind::code8: return unpack_kind<V, PanelKind::code8>(a);
  }
}

// Up to tokens_max tokens: every weight is read and unpacked once, straight from its panel.
template <class V, PanelKind kind> void linear_few(const LinearArgs& a) {
  const uint32_t step = V::panels(int(a.tokens));
  for (uint32_t p = 0; p < a.count; p += step) {
    const uint32_t count = a.count - p < step ? a.count - p : step;
    for (uint32_t k = 0; k < a.layout->k; k += chunk_k) {
      const uint32_t length = a.layout->k - k < chunk_k ? a.layout->k - k : chunk_k;
      tile_of<V, kind>(a.tokens, {a.layout, a.panels + p, count, k, length, a.x + k, a.x_stride, a.out, a.out_stride, k != 0});
    }
  }
}

// More tokens: a chunk of V::panels(tokens_max) panels is unpacked to f32 in L1, then used by all tiles of tokens. Tiles are
// of nearly equal size, so that none is small enough for a tile of more panels.
template <class V> void linear_many(const LinearArgs& a) {
  constexpr uint32_t step = V::panels(V::tokens_max);
  static_assert(step <= 2 && V::panels((V::tokens_max + 1) / 2) == step);
  const uint32_t tiles = (a.tokens + V::tokens_max - 1) / V::tokens_max;
  const PanelLayout plain{PanelKind::f32, false, false, 0, a.layout->k, 1, 0, 0, 0, 0, 0};
  for (uint32_t p = 0; p < a.count; p += step) {
    const uint32_t count = a.count - p < step ? a.count - p : step;
    for (uint32_t k = 0; k < a.layout->k; k += chunk_k) {
      const uint32_t length = a.layout->k - k < chunk_k ? a.layout->k - k : chunk_k;
      Panel part[step];
      for (uint32_t i = 0; i < count; ++i) {
        part[i] = a.panels[p + i];
        if (a.layout->kind == PanelKind::f32) {
          part[i].data += size_t{k} * lanes * sizeof(float);
          continue;
        }
        float* to = a.scratch + size_t{i} * chunk_k * lanes;
        unpack<V>({a.layout, part[i].data, k, length, to});
        part[i].data = reinterpret_cast<const uint8_t*>(to);
      }
      for (uint32_t i = 0; i < tiles; ++i) {
        const uint32_t begin = uint32_t(uint64_t{a.tokens} * i / tiles), end = uint32_t(uint64_t{a.tokens} * (i + 1) / tiles);
        tile_of<V, PanelKind::f32>(end - begin, {&plain, part, count, 0, length, a.x + begin * a.x_stride + k, a.x_stride,
                                                 a.out + begin * a.out_stride, a.out_stride, k != 0});
      }
    }
  }
}

template <class V> void linear(const LinearArgs& a) {
  if (a.tokens > uint32_t(V::tokens_max)) return linear_many<V>(a);
  switch (a.layout->kind) {
    case PanelKind::f32: return linear_few<V, PanelKind::f32>(a);
    case PanelKind::f16: return linear_few<V, PanelKind::f16>(a);
    case PanelKind::bf16: return linear_few<V, PanelKind::bf16>(a);
    case PanelKind::code4: return linear_few<V, PanelKind::code4>(a);
    case PanelKind::code8: return linear_few<V, PanelKind::code8>(a);
  }
}

}  // namespace
}  // namespace muster::cpu

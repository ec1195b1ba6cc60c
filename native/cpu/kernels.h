// What an instruction-set variant computes. Owns the layouts that kernels read (panels of weights, KV blocks) and the order of
// every sum; does not own memory, threads or shapes of a model. Three variants (scalar, avx2, avx512) are built from the same
// templates over 16 lanes (linear_kernel.h, attend_kernel.h).
//
//   C1  a lane is an output: a weight row, a key, or a value column. No sum over K crosses lanes, so neither the number of
//       tokens, nor the tile, nor the thread, nor the width of a register changes the order of a sum.
//   C2  a linear's sum over k is cut into chunks of `chunk_k`: one fused multiply-add after the other inside a chunk, then
//       the chunks are added in order.
//   C3  what does cross lanes (softmax sums) goes through one tree: i + (i + 8), then + 4, + 2, + 1.
//   C4  no libm: exp is a polynomial of named fused multiply-adds. Therefore all variants give the same bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace muster::cpu {

inline constexpr uint32_t lanes = 16;
inline constexpr uint32_t chunk_k = 256;          // multiple of every code group
inline constexpr uint32_t split_tokens = 128;     // attention splits start at absolute multiples of this
inline constexpr uint32_t group_panels = 4;       // panels of one task: 64 rows keep four sums in flight for one token
inline constexpr uint32_t tile_tokens_max = 8;
inline constexpr size_t linear_scratch = size_t{2} * chunk_k * lanes;  // floats for each thread: 32 KiB, stays in L1

enum class PanelKind : uint8_t { f32, f16, bf16, code4, code8 };

// 16 rows of a matrix, interleaved: [supers][scales][codes], each plane from a multiple of 64 bytes on.
//   f32    codes [k][16] f32            f16  codes [k][16] f16
//   bf16   codes [k / 2][16] u32: k in the low half, k + 1 in the high half
//   code4  codes [k / 8][16] u32: element k + i in bits 4i..4i+3          code8  codes [k][16] i8
// One level:   scales by group: d f16[16], with a minimum also dmin f16[16].
// Two levels:  supers by superblock: d f16[16] (dmin f16[16]); scales by group: i8[16] (u8[16]).
// value = code * (d * scale) - (zero * d * scale + dmin * minimum), one rounding: the products are exact in f32.
struct PanelLayout {
  PanelKind kind = PanelKind::f32;
  bool two_level = false, has_minimum = false;
  uint8_t zero = 0;                // what a stored code4 stands above its value (Q4_0: 8)
  uint32_t k = 0;                  // columns, for codes padded to whole groups
  uint32_t group = 1;
  uint32_t supers_shift = 0;       // log2 of groups in a superblock
  uint32_t supers_offset = 0;      // group 0 is this group of superblock 0
  uint32_t scales_at = 0, codes_at = 0;
  uint64_t panel_bytes = 0;
};

struct Panel {
  const uint8_t* data = nullptr;
  uint32_t row = 0, rows = 0;      // first output column, valid lanes
};

// out[t][panel.row + lane] = sum over k of x[t][k] * w. `scratch` has linear_scratch floats.
struct LinearArgs {
  const PanelLayout* layout = nullptr;
  const Panel* panels = nullptr;
  uint32_t count = 0, tokens = 0;
  const float* x = nullptr;
  size_t x_stride = 0;
  float* out = nullptr;
  size_t out_stride = 0;
  float* scratch = nullptr;
};

// Columns [k, k + count) of a panel as f32 [count][16].
struct UnpackArgs {
  const PanelLayout* layout = nullptr;
  const uint8_t* panel = nullptr;
  uint32_t k = 0, count = 0;
  float* out = nullptr;
};

// One token's query heads of one kv head over the keys [begin, end) of its sequence.
//   k  [group][dim][16 keys] of each block      v  [token][dim] of each block; 15 floats past the last may be read
struct AttendArgs {
  const float* q = nullptr;        // [heads, dim]
  uint32_t heads = 0, dim = 0;
  float scale = 1;
  const float* k = nullptr;        // of this layer and kv head in block 0
  const float* v = nullptr;
  size_t block_stride = 0;         // floats from block to block
  const uint32_t* table = nullptr;
  uint32_t block_tokens = 0;
  uint32_t begin = 0, end = 0;     // begin < end
  float* out = nullptr;            // [heads, dim]
  float* scratch = nullptr;        // attend_scratch(dim) floats
};
inline constexpr uint32_t score_stride = split_tokens + 2 * lanes;  // a key group may hang over on both sides
inline constexpr size_t attend_scratch(uint32_t dim) { return size_t{tile_tokens_max} * (score_stride + dim); }

struct Kernels {
  const char* isa;
  void (*linear)(const LinearArgs&);
  void (*unpack)(const UnpackArgs&);
  void (*silu_mul)(float* gate, const float* up, size_t count);  // gate = silu(gate) * up
  void (*exp)(float* values, size_t count);                      // below -86.5: 0
  void (*attend)(const AttendArgs&);
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace muster::cpu

// Integer codes of quantised blocks: one affine form for all of them, so that a backend packs panels from codes and never
// learns a bit layout.
//   value(i) = (d * scale[i / group]) * code[i]  -  dmin * minimum[i / group]        in f32, one rounding for each * and -
// d and dmin are f16 of the whole block. Formats of one level have scale 1; formats without minima have dmin = 0 and
// minimum 0 (x - 0 is x, signed zeros too); Q4_1's added minimum is stored with its sign turned.
//
//   type   block  group  codes      scale       minimum
//   Q8_0   32     32     -128..127  1           0
//   Q4_0   32     32     -8..7      1           0
//   Q4_1   32     32     0..15      1           1
//   Q4_K   256    32     0..15      0..63       0..63
//   Q5_K   256    32     0..31      0..63       0..63
//   Q6_K   256    16     -32..31    -128..127   0
#pragma once
#include <cstdint>

#include "muster/model.h"

namespace muster {

inline constexpr uint32_t code_block_max = 256;   // elements
inline constexpr uint32_t code_groups_max = 16;   // groups of a block

struct CodeShape {
  uint32_t elements;    // of a block
  uint32_t group;       // elements under one scale; divides elements
  int code_min, code_max;
  bool has_scales;      // false: every scale is 1
  bool has_minimum;     // false: dmin is 0
};

// Null for the float types: they have no codes.
const CodeShape* code_shape(StoredType type);

struct BlockCodes {
  uint16_t d = 0, dmin = 0;                 // f16 bits
  int8_t scale[code_groups_max] = {};       // [elements / group]
  uint8_t minimum[code_groups_max] = {};
  int8_t code[code_block_max] = {};         // [elements]
};

// Reads block_format(type)->bytes bytes. False (and `out` untouched) where the type has no codes.
bool unpack_block(StoredType type, const uint8_t* block, BlockCodes* out);

}  // namespace muster

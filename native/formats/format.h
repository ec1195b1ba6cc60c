// Stored formats: how many bytes a block of elements takes, and what f32 values those bytes stand for. Owns the bit layouts
// of stored weights; does not own files, headers or any backend's layout.
//
//   F1  a value is rounded as gguf-py rounds it: every product and sum once, in f32, in the order of codes.h.
//   F2  sizes are 64 bits wide; a product of a row count and a row size never wraps.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "muster/model.h"

namespace muster {

static_assert(std::endian::native == std::endian::little, "stored weights are little-endian and read in place");

struct BlockFormat {
  const char* name;     // as GGUF spells it
  uint32_t elements;    // of one block, along a row
  uint32_t bytes;       // of one block
};

// Null where the number is no stored type.
const BlockFormat* block_format(StoredType type);

// Bytes of the blocks that cover elements [first, first + count) of a row, from the block that holds `first` on: what a cut
// that begins inside a block has to read.
uint64_t covering_bytes(const BlockFormat& format, uint64_t first, uint64_t count);

// Blocks have odd sizes, so nothing in a row is aligned.
inline uint16_t load_u16(const uint8_t* at) {
  uint16_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float value);    // round to nearest even; NaN stays a quiet NaN
float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value);   // round to nearest even; NaN stays a quiet NaN

// out[i] = element part.begin + i of the row that begins at `row`. The row holds covering_bytes(format, 0, part.end) bytes
// and `type` has a block_format: checked once by stored_matrix.h, trusted here.
void dequantize(StoredType type, const uint8_t* row, const Range& part, float* out);

}  // namespace muster

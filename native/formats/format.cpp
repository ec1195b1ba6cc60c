#include "formats/format.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "formats/codes.h"

namespace muster {
namespace {

// Elements [begin, end) of one quantised block.
void decode_block(StoredType type, const uint8_t* block, const Range& part, float* out) {
  BlockCodes codes;
  const CodeShape* shape = code_shape(type);
  if (!shape || !unpack_block(type, block, &codes)) return;
  const float d = f16_to_f32(codes.d), dmin = f16_to_f32(codes.dmin);
  for (uint32_t i = part.begin; i < part.end; ++i) {
    const uint32_t group = i / shape->group;
    const float scale = d * static_cast<float>(codes.scale[group]);
    const float minimum = dmin * static_cast<float>(codes.minimum[group]);
    out[i - part.begin] = scale * static_cast<float>(codes.code[i]) - minimum;
  }
}

}  // namespace

const BlockFormat* block_format(StoredType type) {
  static constexpr BlockFormat f32{"F32", 1, 4}, f16{"F16", 1, 2}, bf16{"BF16", 1, 2}, q8_0{"Q8_0", 32, 34}, q4_0{"Q4_0", 32, 18},
      q4_1{"Q4_1", 32, 20}, q4_k{"Q4_K", 256, 144}, q5_k{"Q5_K", 256, 176}, q6_k{"Q6_K", 256, 210};
  switch (type) {
    case StoredType::f32: return &f32;
    case StoredType::f16: return &f16;
    case StoredType::bf16: return &bf16;
    case StoredType::q8_0: return &q8_0;
    case StoredType::q4_0: return &q4_0;
    case StoredType::q4_1: return &q4_1;
    case StoredType::q4_k: return &q4_k;
    case StoredType::q5_k: return &q5_k;
    case StoredType::q6_k: return &q6_k;
  }
  return nullptr;
}

uint64_t covering_bytes(const BlockFormat& format, uint64_t first, uint64_t count) {
  if (count == 0) return 0;
  const uint64_t first_block = first / format.elements, last_block = (first + count - 1) / format.elements;
  return (last_block - first_block + 1) * format.bytes;
}

float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 1023u;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  // Zero and subnormals: fraction * 2^-24, exact in f32.
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on: rounds to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded to nearest even by the addition itself.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t odd = magnitude >> 13 & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
}

float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void dequantize(StoredType type, const uint8_t* row, const Range& part, float* out) {
  const BlockFormat* format = block_format(type);
  if (!format || part.begin >= part.end) return;
  if (type == StoredType::f32) {
    std::memcpy(out, row + uint64_t{part.begin} * 4, uint64_t{part.size()} * 4);
    return;
  }
  if (type == StoredType::f16 || type == StoredType::bf16) {
    const uint8_t* at = row + uint64_t{part.begin} * 2;
    for (uint32_t i = 0; i < part.size(); ++i, at += 2) out[i] = type == StoredType::f16 ? f16_to_f32(load_u16(at)) : bf16_to_f32(load_u16(at));
    return;
  }
  for (uint64_t at = part.begin; at < part.end;) {
    const uint64_t block = at / format->elements, block_first = block * format->elements;
    const uint64_t inside_end = std::min<uint64_t>(format->elements, part.end - block_first);
    const Range inside{static_cast<uint32_t>(at - block_first), static_cast<uint32_t>(inside_end)};
    decode_block(type, row + block * format->bytes, inside, out + (at - part.begin));
    at += inside.size();
  }
}

}  // namespace muster

#include "formats/codes.h"

#include <cstring>

#include "formats/format.h"

namespace muster {
namespace {

int8_t as_code(uint32_t value, int zero) { return static_cast<int8_t>(static_cast<int>(value) - zero); }

// 32 nibbles: elements 0..15 in the low halves, 16..31 in the high halves.
void unpack_nibbles(const uint8_t* packed, int zero, int8_t* code) {
  for (uint32_t i = 0; i < 16; ++i) {
    code[i] = as_code(packed[i] & 15u, zero);
    code[i + 16] = as_code(packed[i] >> 4, zero);
  }
}

// The 12 bytes of a K-quant's eight 6-bit scales and eight 6-bit minima: groups 0..3 whole in the low six bits of bytes 0..3
// and 4..7, groups 4..7 with four bits in bytes 8..11 and their top two bits above groups 0..3.
void unpack_k_scales(const uint8_t* packed, BlockCodes* out) {
  for (uint32_t g = 0; g < 4; ++g) {
    out->scale[g] = static_cast<int8_t>(packed[g] & 63u);
    out->minimum[g] = static_cast<uint8_t>(packed[g + 4] & 63u);
    out->scale[g + 4] = static_cast<int8_t>((packed[g + 8] & 15u) | (packed[g] >> 6) << 4);
    out->minimum[g + 4] = static_cast<uint8_t>(packed[g + 8] >> 4 | (packed[g + 4] >> 6) << 4);
  }
}

// [0] d  [2] dmin  [4..15] scales  [16..47] fifth bits, Q5_K only  then 128 bytes of nibbles: 32 bytes hold two groups
void unpack_q45_k(const uint8_t* block, bool five, BlockCodes* out) {
  out->d = load_u16(block);
  out->dmin = load_u16(block + 2);
  unpack_k_scales(block + 4, out);
  const uint8_t* high = block + 16;
  const uint8_t* low = block + (five ? 48 : 16);
  for (uint32_t i = 0; i < 256; ++i) {
    const uint32_t g = i / 32, lane = i % 32;
    uint32_t q = low[32 * (g / 2) + lane] >> 4 * (g % 2) & 15u;
    if (five) q |= (high[lane] >> g & 1u) << 4;
    out->code[i] = as_code(q, 0);
  }
}

// [0..127] low four bits  [128..191] high two bits  [192..207] i8 scales  [208] d
void unpack_q6_k(const uint8_t* block, BlockCodes* out) {
  out->d = load_u16(block + 208);
  std::memcpy(out->scale, block + 192, 16);
  for (uint32_t i = 0; i < 256; ++i) {
    const uint32_t half = i / 128, k = i % 128 / 32, lane = i % 32;
    const uint32_t low = block[64 * half + 32 * (k % 2) + lane] >> 4 * (k / 2) & 15u;
    const uint32_t high = block[128 + 32 * half + lane] >> 2 * k & 3u;
    out->code[i] = as_code(low | high << 4, 32);
  }
}

}  // namespace

const CodeShape* code_shape(StoredType type) {
  static constexpr CodeShape q8_0{32, 32, -128, 127, false, false}, q4_0{32, 32, -8, 7, false, false}, q4_1{32, 32, 0, 15, false, true},
      q4_k{256, 32, 0, 15, true, true}, q5_k{256, 32, 0, 31, true, true}, q6_k{256, 16, -32, 31, true, false};
  switch (type) {
    case StoredType::q8_0: return &q8_0;
    case StoredType::q4_0: return &q4_0;
    case StoredType::q4_1: return &q4_1;
    case StoredType::q4_k: return &q4_k;
    case StoredType::q5_k: return &q5_k;
    case StoredType::q6_k: return &q6_k;
    default: return nullptr;
  }
}

bool unpack_block(StoredType type, const uint8_t* block, BlockCodes* out) {
  if (!code_shape(type)) return false;
  *out = {};
  if (type == StoredType::q6_k) {
    unpack_q6_k(block, out);
    return true;
  }
  if (type == StoredType::q4_k || type == StoredType::q5_k) {
    unpack_q45_k(block, type == StoredType::q5_k, out);
    return true;
  }
  out->d = load_u16(block);
  out->scale[0] = 1;
  if (type == StoredType::q8_0) {
    std::memcpy(out->code, block + 2, 32);
  } else if (type == StoredType::q4_0) {
    unpack_nibbles(block + 2, 8, out->code);
  } else {
    out->dmin = load_u16(block + 2) ^ 0x8000u;  // Q4_1 adds its minimum
    out->minimum[0] = 1;
    unpack_nibbles(block + 4, 0, out->code);
  }
  return true;
}

}  // namespace muster

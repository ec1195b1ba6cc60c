// Stored formats against gguf-py's values (test/fixtures/formats.txt), bit for bit.
#include <algorithm>
#include <cstdint>
#include <fstream>

#include "check.h"
#include "formats/codes.h"
#include "formats/format.h"

using namespace muster;

namespace {

constexpr StoredType all_types[] = {StoredType::f32, StoredType::f16, StoredType::bf16, StoredType::q8_0, StoredType::q4_0,
                                    StoredType::q4_1, StoredType::q4_k, StoredType::q5_k, StoredType::q6_k};

struct Vector {
  StoredType type;
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> values;  // f32 bits
};

std::vector<Vector> load_vectors() {
  std::ifstream file(MUSTER_ROOT "/test/fixtures/formats.txt");
  std::vector<Vector> all;
  std::string name, bytes, values;
  for (size_t count; file >> name >> count >> bytes >> values;) {
    Vector v{};
    for (const StoredType type : all_types)
      if (name == block_format(type)->name) v.type = type;
    for (size_t i = 0; i + 2 <= bytes.size(); i += 2) v.bytes.push_back(static_cast<uint8_t>(std::stoul(bytes.substr(i, 2), nullptr, 16)));
    for (size_t i = 0; i + 8 <= values.size(); i += 8) v.values.push_back(static_cast<uint32_t>(std::stoul(values.substr(i, 8), nullptr, 16)));
    CHECK_EQ(v.values.size(), count);
    all.push_back(std::move(v));
  }
  return all;
}

// Elements [begin, end) of the vector, compared with its values.
uint32_t wrong_values(const Vector& v, uint32_t begin, uint32_t end) {
  std::vector<float> got(end - begin + 1, -1.5f);
  dequantize(v.type, v.bytes.data(), {begin, end}, got.data());
  uint32_t wrong = got.back() == -1.5f ? 0 : 1;  // nothing past the range is written
  for (uint32_t i = begin; i < end; ++i) wrong += std::bit_cast<uint32_t>(got[i - begin]) != v.values[i];
  return wrong;
}

}  // namespace

TEST("every stored format has vectors of whole blocks") {
  const std::vector<Vector> vectors = load_vectors();
  for (const StoredType type : all_types)
    CHECK(std::count_if(vectors.begin(), vectors.end(), [&](const Vector& v) { return v.type == type; }) >= 4);
  for (const Vector& v : vectors) CHECK_EQ(covering_bytes(*block_format(v.type), 0, v.values.size()), v.bytes.size());
}

TEST("F1: dequantised values equal gguf-py's to the bit") {
  for (const Vector& v : load_vectors()) {
    if (const uint32_t wrong = wrong_values(v, 0, static_cast<uint32_t>(v.values.size())))
      check::fail(__FILE__, __LINE__, std::string(block_format(v.type)->name) + ": " + std::to_string(wrong) + " wrong values");
  }
}

TEST("a range may begin and end inside a block, or be empty") {
  for (const Vector& v : load_vectors()) {
    const uint32_t count = static_cast<uint32_t>(v.values.size());
    for (uint32_t begin = 0; begin <= count; begin += begin < 40 || begin % 256 > 250 ? 1 : 7)
      for (const uint32_t length : {0u, 1u, 15u, 32u, 33u, 255u, 257u, count})
        if (const uint32_t end = std::min(count, begin + length); wrong_values(v, begin, end)) {
          check::fail(__FILE__, __LINE__, std::string(block_format(v.type)->name) + " [" + std::to_string(begin) + ", " + std::to_string(end) + ")");
          return;
        }
  }
}

TEST("codes stay within their shape and give the same values by the affine form") {
  for (const Vector& v : load_vectors()) {
    const CodeShape* shape = code_shape(v.type);
    BlockCodes codes;
    CHECK_EQ(unpack_block(v.type, v.bytes.data(), &codes), shape != nullptr);
    if (!shape) continue;
    const BlockFormat* format = block_format(v.type);
    CHECK_EQ(shape->elements, format->elements);
    CHECK_EQ(shape->elements % shape->group, 0u);
    CHECK(shape->elements / shape->group <= code_groups_max);
    for (uint32_t b = 0; b < v.values.size() / shape->elements; ++b) {
      unpack_block(v.type, v.bytes.data() + b * format->bytes, &codes);
      for (uint32_t i = 0; i < shape->elements; ++i) {
        const uint32_t g = i / shape->group;
        CHECK(codes.code[i] >= shape->code_min && codes.code[i] <= shape->code_max);
        if (!shape->has_scales) CHECK_EQ(int{codes.scale[g]}, 1);
        if (!shape->has_minimum) CHECK(codes.dmin == 0 && codes.minimum[g] == 0);
        const float scale = f16_to_f32(codes.d) * codes.scale[g], minimum = f16_to_f32(codes.dmin) * codes.minimum[g];
        CHECK_EQ(std::bit_cast<uint32_t>(scale * codes.code[i] - minimum), v.values[b * shape->elements + i]);
      }
    }
  }
}

TEST("Q4_K: a block written by hand has the values of its bit layout") {
  // Group 5: scale 37 = 0b100101 (low four bits in byte 9, top two above byte 1), minimum 22 = 0b010110.
  uint8_t block[144] = {};
  block[1] = 0x3c;                                  // d = 1
  block[3] = 0x38;                                  // dmin = 0.5
  block[4 + 9] = (37 & 15) | (22 & 15) << 4;
  block[4 + 1] = (37 >> 4) << 6;
  block[4 + 5] = (22 >> 4) << 6;
  block[16 + 64 + 3] = 0xb0;                        // element 5 * 32 + 3 is 11: high nibbles of the third 32 bytes
  float out[256];
  dequantize(StoredType::q4_k, block, {0, 256}, out);
  CHECK_EQ(out[163], 37.0f * 11 - 11);
  CHECK_EQ(out[162], -11.0f);
  CHECK_EQ(out[131], 0.0f);
}

TEST("sizes are 64 bits wide and count covering blocks") {
  const BlockFormat& q4k = *block_format(StoredType::q4_k);
  CHECK_EQ(covering_bytes(q4k, 0, 0), 0u);
  CHECK_EQ(covering_bytes(q4k, 0, 1), 144u);
  CHECK_EQ(covering_bytes(q4k, 255, 2), 288u);
  CHECK_EQ(covering_bytes(q4k, 256, 256), 144u);
  CHECK_EQ(covering_bytes(*block_format(StoredType::f32), 3, uint64_t{1} << 33), uint64_t{1} << 35);
  CHECK(block_format(static_cast<StoredType>(0)) == nullptr && block_format(static_cast<StoredType>(10)) == nullptr);
  CHECK(code_shape(StoredType::f32) == nullptr && code_shape(static_cast<StoredType>(77)) == nullptr);
}

MUSTER_TEST_MAIN

// What happens to q and k between projection and cache: rotation in both layouts, unit norm, temperature, where they land.
#include <cmath>

#include "ref/tiny_ops.h"

using namespace muster;
using tiny::check_near;

namespace {

// One head of q, k, v of width 4 at `position`, through rope_kv; q and k come back.
std::vector<float> rope(RopeDesc desc, uint32_t position, const std::vector<float>& qkv) {
  const tiny::Ops ops;
  CHECK_OK(ops->kv_init({1, 1, 4, 2, 1}));
  desc.heads = desc.kv_heads = 1;
  desc.head_dim = 4;
  tiny::Tokens tokens{{0}, {position}, {0}, {std::vector<uint32_t>(position + 1, 1)}, {}};
  const Rows rows = ops.rows(qkv);
  CHECK_OK(ops->rope_kv(desc, tokens.batch(), rows));
  return ops.read(rows, 12);
}

const std::vector<float> input{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
const float frequencies[] = {0.5f, 0.25f};

}  // namespace

TEST("interleaved rope turns neighbours, half rope turns element j and j + dims / 2; v is left alone") {
  const double c0 = std::cos(1.5), s0 = std::sin(1.5), c1 = std::cos(0.75), s1 = std::sin(0.75);  // position 3
  RopeDesc desc;
  desc.layout = RopeLayout::interleaved;
  desc.dims = 4;
  desc.frequencies = frequencies;
  check_near(rope(desc, 3, input), {1 * c0 - 2 * s0, 2 * c0 + 1 * s0, 3 * c1 - 4 * s1, 4 * c1 + 3 * s1, 5 * c0 - 6 * s0, 6 * c0 + 5 * s0,
                                    7 * c1 - 8 * s1, 8 * c1 + 7 * s1, 9, 10, 11, 12}, 1e-6);
  desc.layout = RopeLayout::half;
  check_near(rope(desc, 3, input), {1 * c0 - 3 * s0, 2 * c1 - 4 * s1, 3 * c0 + 1 * s0, 4 * c1 + 2 * s1, 5 * c0 - 7 * s0, 6 * c1 - 8 * s1,
                                    7 * c0 + 5 * s0, 8 * c1 + 6 * s1, 9, 10, 11, 12}, 1e-6);
  check_near(rope(desc, 0, input), {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, 0);
}

TEST("partial rope passes the dimensions past dims through") {
  RopeDesc desc;
  desc.layout = RopeLayout::half;
  desc.dims = 2;
  desc.frequencies = frequencies;
  const double c = std::cos(1.0), s = std::sin(1.0);  // position 2
  check_near(rope(desc, 2, input), {c - 2 * s, 2 * c + s, 3, 4, 5 * c - 6 * s, 6 * c + 5 * s, 7, 8, 9, 10, 11, 12}, 1e-6);
}

TEST("the angle is the product in f32") {
  RopeDesc desc;
  desc.layout = RopeLayout::interleaved;
  desc.dims = 2;
  const float frequency[] = {0.1f};
  desc.frequencies = frequency;
  const uint32_t position = 100003;
  const float angle = 100003.0f * 0.1f;  // 10000.2998..., rounded to a step of 2^-10
  CHECK(std::fabs(double{angle} - 100003.0 * double{0.1f}) > 1e-5);
  const std::vector<float> got = rope(desc, position, {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  CHECK_NEAR(got[0], std::cos(double{angle}), 1e-7);
  CHECK_NEAR(got[1], std::sin(double{angle}), 1e-7);
}

TEST("unit norm follows the rotation, over the whole head of q and k") {
  RopeDesc desc;
  desc.layout = RopeLayout::interleaved;
  desc.dims = 2;
  desc.frequencies = frequencies;
  desc.unit_norm = true;
  desc.norm_eps = 0.5;
  const double c = std::cos(0.5), s = std::sin(0.5), q = 1 / std::sqrt(30.0 / 4 + 0.5), k = 1 / std::sqrt(174.0 / 4 + 0.5);
  check_near(rope(desc, 1, input), {(c - 2 * s) * q, (2 * c + s) * q, 3 * q, 4 * q,
                                    (5 * c - 6 * s) * k, (6 * c + 5 * s) * k, 7 * k, 8 * k, 9, 10, 11, 12}, 1e-6);
}

TEST("temperature scales q alone and begins to differ from 1 at position floor - 1") {
  RopeDesc desc;
  desc.temperature_scale = 0.1;
  desc.temperature_floor = 4;
  check_near(rope(desc, 2, input), {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, 0);
  const double two = 1 + 0.1 * std::log(2.0), three = 1 + 0.1 * std::log(3.0);
  check_near(rope(desc, 3, input), {two, 2 * two, 3 * two, 4 * two, 5, 6, 7, 8, 9, 10, 11, 12}, 1e-6);
  check_near(rope(desc, 6, input), {two, 2 * two, 3 * two, 4 * two, 5, 6, 7, 8, 9, 10, 11, 12}, 1e-6);
  check_near(rope(desc, 7, input), {three, 2 * three, 3 * three, 4 * three, 5, 6, 7, 8, 9, 10, 11, 12}, 1e-6);
}

TEST("X2: a batch that reaches past its table or names a block that is none is refused") {
  const tiny::Ops ops;
  CHECK_OK(ops->kv_init({1, 1, 2, 4, 2}));
  RopeDesc desc;
  desc.heads = desc.kv_heads = 1;
  desc.head_dim = 2;
  const Rows rows = ops.rows(std::vector<float>(6));
  const auto refused = [&](uint32_t position, std::vector<uint32_t> table, uint32_t sequence) {
    tiny::Tokens tokens{{0}, {position}, {sequence}, {std::move(table)}, {}};
    return ops->rope_kv(desc, tokens.batch(), rows).field;
  };
  CHECK_EQ(refused(3, {1, 3}, 0), "");
  CHECK_EQ(refused(4, {1, 3}, 0), "KV table");
  CHECK_EQ(refused(3, {1, 4}, 0), "KV table");
  CHECK_EQ(refused(3, {1, 3}, 1), "KV table");
  desc.layer = 1;
  CHECK_EQ(refused(0, {1}, 0), "rope_kv");
}

TEST("a KV cache without elements or past 64 bits is refused") {
  const tiny::Ops ops;
  CHECK_EQ(ops->kv_init({1, 0, 2, 4, 2}).field, "blocks");
  CHECK(ops->kv_init({UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX}).code == Status::Code::out_of_memory);
  CHECK_EQ(ops->kv_bytes(), 0u);
  CHECK_OK(ops->kv_init({3, 2, 8, 5, 16}));
  CHECK_EQ(ops->kv_bytes(), 2u * 4 * 3 * 2 * 8 * 5 * 16);
}

MUSTER_TEST_MAIN

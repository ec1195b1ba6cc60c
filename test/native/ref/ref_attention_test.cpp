// Attention over paged KV: which keys a query sees, which kv head it reads, and that pages and batch mates do not matter.
#include <cmath>
#include <random>

#include "ref/tiny_ops.h"

using namespace muster;
using tiny::check_near;

namespace {

// Head of width 1. All scores are equal (k = 0), so the output is the mean of the visible values; v at position p is 2^p,
// hence the output times the count of keys spells the set of visible positions in binary.
struct Seen {
  tiny::Ops ops;
  uint32_t count;
  Seen(uint32_t tokens, uint32_t block_tokens) : count(tokens) {
    CHECK_OK(ops->kv_init({1, 1, 1, 32, block_tokens}));
    std::vector<float> qkv;
    for (uint32_t p = 0; p < tokens; ++p) qkv.insert(qkv.end(), {1, 0, std::ldexp(1.0f, static_cast<int>(p))});
    RopeDesc rope;
    rope.heads = rope.kv_heads = rope.head_dim = 1;
    tiny::Tokens t = all(block_tokens);
    rows = ops.rows(qkv);
    CHECK_OK(ops->rope_kv(rope, t.batch(), rows));
  }
  tiny::Tokens all(uint32_t block_tokens) const {
    tiny::Tokens t;
    for (uint32_t p = 0; p < count; ++p) { t.ids.push_back(0); t.positions.push_back(p); t.sequence.push_back(0); }
    t.blocks.emplace_back();
    for (uint32_t b = 0; b * block_tokens < count; ++b) t.blocks[0].push_back(31 - b);
    return t;
  }
  // Bit p of entry t: token t saw position p.
  std::vector<uint32_t> masks(MaskKind mask, uint32_t span, uint32_t block_tokens) const {
    AttentionDesc desc;
    desc.heads = desc.kv_heads = desc.head_dim = 1;
    desc.scale = 1;
    desc.mask = mask;
    desc.mask_span = span;
    tiny::Tokens t = all(block_tokens);
    const Rows out = ops.rows(std::vector<float>(count));
    CHECK_OK(ops->attention(desc, t.batch(), rows, out));
    std::vector<uint32_t> result;
    for (const float mean : ops.read(out, count)) {
      uint32_t found = 0;
      for (uint32_t keys = 1; keys <= count; ++keys)
        if (const auto set = static_cast<uint32_t>(std::lround(mean * keys)); std::popcount(set) == static_cast<int>(keys))
          if (std::fabs(mean * keys - set) < 0.01) found = set;
      result.push_back(found);
    }
    return result;
  }
  Rows rows = nullptr;
};

uint32_t from_to(uint32_t first, uint32_t last) { return ((2u << last) - 1) & ~((1u << first) - 1); }

}  // namespace

TEST("full: a query sees every key up to its own") {
  for (const uint32_t block_tokens : {1u, 3u, 16u}) {
    const std::vector<uint32_t> seen = Seen(14, block_tokens).masks(MaskKind::full, 0, block_tokens);
    for (uint32_t p = 0; p < 14; ++p) CHECK_EQ(seen[p], from_to(0, p));
  }
}

TEST("sliding: a query sees exactly span keys with its own") {
  for (const uint32_t span : {1u, 3u, 4u, 14u, 20u}) {
    const std::vector<uint32_t> seen = Seen(14, 4).masks(MaskKind::sliding, span, 4);
    for (uint32_t p = 0; p < 14; ++p) CHECK_EQ(seen[p], from_to(p + 1 > span ? p + 1 - span : 0, p));
  }
}

TEST("chunked: the context starts again at absolute multiples of span, wherever blocks end") {
  for (const uint32_t span : {1u, 4u, 5u, 8u, 20u}) {
    const std::vector<uint32_t> seen = Seen(14, 4).masks(MaskKind::chunked, span, 4);
    for (uint32_t p = 0; p < 14; ++p) CHECK_EQ(seen[p], from_to(p / span * span, p));
  }
}

TEST("a query head reads the kv head of its group, counted from the rank's first heads") {
  const tiny::Ops ops;  // this rank: query heads 3..6 of 12, 3 for each kv head: kv heads 1 and 2
  CHECK_OK(ops->kv_init({2, 2, 1, 2, 4}));
  RopeDesc rope;
  rope.heads = 4;
  rope.kv_heads = 2;
  rope.head_dim = 1;
  rope.layer = 1;
  tiny::Tokens t{{0}, {0}, {0}, {{1}}, {}};
  const Rows rows = ops.rows({1, 1, 1, 1, 0, 0, 20, 30}), out = ops.rows(std::vector<float>(4));
  CHECK_OK(ops->rope_kv(rope, t.batch(), rows));
  AttentionDesc desc{4, 2, 1, 3, 1, 3, 1, MaskKind::full, 0, 1};
  CHECK_OK(ops->attention(desc, t.batch(), rows, out));
  check_near(ops.read(out, 4), {20, 20, 20, 30}, 0);
  desc.first_head = 5;  // heads 5..8 end in kv head 2
  CHECK_OK(ops->attention(desc, t.batch(), rows, out));
  check_near(ops.read(out, 4), {20, 30, 30, 30}, 0);
  desc.first_head = 6;  // head 9 would read kv head 3
  CHECK_EQ(ops->attention(desc, t.batch(), rows, out).field, "attention");
  desc.first_head = 2;  // head 2 reads kv head 0, which is another rank's
  CHECK_EQ(ops->attention(desc, t.batch(), rows, out).field, "attention");
}

TEST("softmax of scaled products, computed by hand for two keys") {
  const tiny::Ops ops;
  CHECK_OK(ops->kv_init({1, 1, 2, 2, 4}));
  RopeDesc rope;
  rope.heads = rope.kv_heads = 1;
  rope.head_dim = 2;
  tiny::Tokens t{{0, 0}, {0, 1}, {0, 0}, {{1}}, {}};
  const Rows rows = ops.rows({0, 0, 1, 2, 10, 0, 3, 4, 2, -1, 0, 8}), out = ops.rows(std::vector<float>(4));
  CHECK_OK(ops->rope_kv(rope, t.batch(), rows));
  AttentionDesc desc{1, 1, 2, 0, 0, 1, 0.5, MaskKind::full, 0, 0};
  CHECK_OK(ops->attention(desc, t.batch(), rows, out));
  const double a = std::exp(0.5 * (3 + 8)), b = std::exp(0.5 * (6 - 4));
  check_near(ops.read(out, 4), {10, 0, 10 * a / (a + b), 8 * b / (a + b)}, 1e-6);
}

TEST("O1: a row has the same bits alone, in one chunk, in small chunks, and on other pages beside other sequences") {
  constexpr uint32_t count = 23, width = (4 + 2 * 2) * 8;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> qkv(count * width), other(count * width);
  for (float& x : qkv) x = normal(random);
  for (float& x : other) x = normal(random);
  const float frequency[] = {1, 0.3f, 0.1f, 0.03f};
  const RopeDesc rope{4, 2, 8, RopeLayout::interleaved, 8, frequency, true, 1e-5, 0, 0, 0};
  const AttentionDesc desc{4, 2, 8, 0, 0, 2, 0.35, MaskKind::chunked, 9, 0};
  // Runs the sequence in chunks of `step` tokens, a token of another sequence before each of its own where `mates`.
  const auto run = [&](uint32_t step, bool mates) {
    const tiny::Ops ops;
    CHECK_OK(ops->kv_init({1, 2, 8, 16, 4}));
    std::vector<float> result;
    for (uint32_t first = 0; first < count; first += step) {
      tiny::Tokens t;
      if (mates) t.blocks = {{9, 3, 7, 1, 15, 2}, {4, 5, 6, 8, 10, 11}};
      else t.blocks = {{1, 2, 3, 4, 5, 6}};
      std::vector<float> in;
      for (uint32_t p = first; p < std::min(count, first + step); ++p) {
        for (uint32_t s = mates ? 2 : 1; s-- > 0;) {
          t.ids.push_back(0); t.positions.push_back(p); t.sequence.push_back(s);
          const std::vector<float>& from = s ? other : qkv;
          in.insert(in.end(), from.begin() + p * width, from.begin() + (p + 1) * width);
        }
      }
      const Rows rows = ops.rows(in), out = ops.rows(std::vector<float>(t.positions.size() * 32));
      CHECK_OK(ops->rope_kv(rope, t.batch(), rows));
      CHECK_OK(ops->attention(desc, t.batch(), rows, out));
      const std::vector<float> all = ops.read(out, t.positions.size() * 32);
      for (size_t i = 0; i < t.sequence.size(); ++i)
        if (t.sequence[i] == 0) result.insert(result.end(), all.begin() + i * 32, all.begin() + (i + 1) * 32);
    }
    return result;
  };
  const std::vector<float> whole = run(count, false);
  CHECK_EQ(whole.size(), size_t{count} * 32);
  for (const uint32_t step : {1u, 5u, count})
    for (const bool mates : {false, true}) CHECK(run(step, mates) == whole);
}

TEST("kv_copy copies a block of every layer, keys and values") {
  const tiny::Ops ops;
  CHECK_OK(ops->kv_init({2, 2, 1, 4, 2}));
  RopeDesc rope;
  rope.heads = rope.kv_heads = 2;
  rope.head_dim = 1;
  AttentionDesc desc{2, 2, 1, 0, 0, 1, 1, MaskKind::full, 0, 0};
  tiny::Tokens source{{0, 0}, {0, 1}, {0, 0}, {{1}}, {}}, copy = source;
  copy.blocks = {{3}};
  const Rows out = ops.rows(std::vector<float>(4));
  std::vector<std::vector<float>> before;
  const auto layer_rows = [&](uint32_t layer) {
    const float x = static_cast<float>(layer + 1);
    return ops.rows({1, 2, x, 2 * x, 5 * x, 6, 1, 2, -x, 3, 7, 8 * x});
  };
  for (uint32_t layer = 0; layer < 2; ++layer) {
    rope.layer = desc.layer = layer;
    const Rows rows = layer_rows(layer);
    CHECK_OK(ops->rope_kv(rope, source.batch(), rows));
    CHECK_OK(ops->attention(desc, source.batch(), rows, out));
    before.push_back(ops.read(out, 4));
  }
  CHECK_OK(ops->kv_copy(1, 3));
  for (uint32_t layer = 0; layer < 2; ++layer) {
    desc.layer = layer;
    CHECK_OK(ops->attention(desc, copy.batch(), layer_rows(layer), out));
    CHECK(ops.read(out, 4) == before[layer]);
  }
  CHECK(ops->kv_copy(1, 4).code == Status::Code::internal && ops->kv_copy(4, 1).code == Status::Code::internal);
}

MUSTER_TEST_MAIN

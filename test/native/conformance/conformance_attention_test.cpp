// Rotary positions, the KV cache and attention on every backend: near the reference, and the same bits whatever the batch, the
// chunking of the prompt, the size of a KV block, the threads and the instruction set.
#include "conformance.h"

using namespace conformance;

namespace {

struct Shape {
  uint32_t heads, kv_heads, head_dim;
  uint32_t first_head = 0, first_kv = 0, heads_per_kv = 1;
  MaskKind mask = MaskKind::full;
  uint32_t span = 0;
  RopeLayout layout = RopeLayout::half;
  uint32_t dims = 0;
  bool unit_norm = false;
  double temperature = 0;
  uint32_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};

constexpr uint32_t layers = 2, layer = 1;

// Sequences that grow side by side in one cache; their blocks are interleaved and out of order.
struct Run {
  const Machine& machine;
  const Shape& shape;
  uint32_t block_tokens;
  Floats frequencies;

  Run(const Machine& m, const Shape& s, uint32_t block) : machine(m), shape(s), block_tokens(block) {
    for (uint32_t j = 0; j < s.dims / 2; ++j) frequencies.push_back(float(std::pow(10000.0, -2.0 * j / s.dims)));
    CHECK_OK(m.ops->kv_init({layers, s.kv_heads, s.head_dim, 2 * blocks_max() + 1, block}));
  }
  static constexpr uint32_t tokens_max = 320;
  uint32_t blocks_max() const { return (tokens_max + block_tokens - 1) / block_tokens; }
  std::vector<uint32_t> table(uint32_t sequence) const {
    std::vector<uint32_t> out;
    for (uint32_t b = 0; b < blocks_max(); ++b) out.push_back(1 + 2 * (blocks_max() - 1 - b) + sequence);
    return out;
  }
  struct Token { uint32_t sequence, position; };
  // Rotated rows and attention outputs of these tokens, whose q, k, v are a function of (sequence, position).
  Floats step(const std::vector<Token>& tokens) const {
    std::vector<uint32_t> positions, sequence;
    Floats qkv;
    for (const Token& token : tokens) {
      positions.push_back(token.position);
      sequence.push_back(token.sequence);
      const Floats row = Random{token.sequence * 1000003ull + token.position}.floats(shape.width(), 2);
      qkv.insert(qkv.end(), row.begin(), row.end());
    }
    const std::vector<uint32_t> even = table(0), odd = table(1);
    const std::span<const uint32_t> tables[] = {even, odd};
    const Batch batch{uint32_t(tokens.size()), nullptr, positions.data(), sequence.data(), tables};
    const RopeDesc rope{shape.heads, shape.kv_heads, shape.head_dim, shape.layout, shape.dims, frequencies, shape.unit_norm, 1e-5,
                        shape.temperature, 4, layer};
    const AttentionDesc desc{shape.heads, shape.kv_heads, shape.head_dim, shape.first_head, shape.first_kv, shape.heads_per_kv,
                             1 / std::sqrt(double(shape.head_dim)), shape.mask, shape.span, layer};
    const Rows rows = machine.rows(qkv), out = machine.output(tokens.size() * shape.heads * shape.head_dim);
    CHECK_OK(machine.ops->rope_kv(rope, batch, rows));
    CHECK_OK(machine.ops->attention(desc, batch, rows, out));
    Floats result = machine.take(out, tokens.size() * shape.heads * shape.head_dim);
    const Floats turned = machine.read(rows, qkv.size());
    result.insert(result.end(), turned.begin(), turned.end());
    return result;
  }
  // Attention outputs of a sequence computed in chunks, by position.
  Floats sequence(uint32_t sequence, const std::vector<uint32_t>& chunks) const {
    Floats out;
    uint32_t position = 0;
    for (const uint32_t chunk : chunks) {
      std::vector<Token> tokens;
      for (uint32_t i = 0; i < chunk; ++i) tokens.push_back({sequence, position++});
      const Floats step_out = step(tokens);
      out.insert(out.end(), step_out.begin(), step_out.begin() + chunk * shape.heads * shape.head_dim);
    }
    return out;
  }
};

// Outputs are means of values in [-2, 2) and rotated rows are of that size: 4e-6 is sixteen units in the last place of 2.
// Scores of unit-normed heads reach head_dim^0.5 and their f32 rounding moves a softmax weight by as much, relatively.
constexpr double tolerance = 4e-6;

void check_shape(const Shape& shape) {
  const std::vector<Run::Token> tail = {{0, 200}, {1, 37}, {0, 201}};
  const Machine ref = reference();
  const Run ref_run(ref, shape, 16);
  const Floats want_long = ref_run.sequence(0, {200}), want_short = ref_run.sequence(1, {37});
  const Floats want_tail = ref_run.step(tail);
  Floats first_long, first_tail;
  for (const Machine& machine : machines()) {
    for (const uint32_t block_tokens : {16u, 32u, 8u, 24u, 1u}) {
      const std::string what = machine.name + ", blocks of " + std::to_string(block_tokens);
      const Run run(machine, shape, block_tokens);
      const Floats longer = run.sequence(0, {200}), shorter = run.sequence(1, {37}), last = run.step(tail);
      check_close(longer, want_long, tolerance, what);
      check_close(shorter, want_short, tolerance, what);
      check_close(last, want_tail, tolerance, what);
      if (first_long.empty()) first_long = longer, first_tail = last;
      check_same(longer, first_long, what);
      check_same(last, first_tail, what);
      if (block_tokens != 16) continue;
      check_same(run.sequence(0, {1, 1, 5, 120, 1, 2, 64, 6}), longer, what + ", other chunks");
      check_same(run.sequence(1, std::vector<uint32_t>(37, 1)), shorter, what + ", one by one");
      const Floats alone = run.step({{1, 37}});
      const size_t row = shape.heads * shape.head_dim;
      check_same({alone.begin(), alone.begin() + std::ptrdiff_t(row)},
                 {last.begin() + std::ptrdiff_t(row), last.begin() + std::ptrdiff_t(2 * row)}, what + ", alone");
    }
  }
}

}  // namespace

TEST("attention: one head for each kv head, rotated halves") { check_shape({2, 2, 16, 0, 0, 1, MaskKind::full, 0, RopeLayout::half, 16}); }
TEST("attention: grouped heads, interleaved rotation of a part, unit norm, temperature") {
  check_shape({5, 1, 64, 0, 0, 5, MaskKind::full, 0, RopeLayout::interleaved, 32, true, 0.1});
}
TEST("attention: eleven heads of one kv head") { check_shape({11, 1, 32, 0, 0, 11, MaskKind::full, 0, RopeLayout::half, 32}); }
TEST("attention: a rank's heads begin and end inside groups") { check_shape({5, 3, 16, 7, 1, 4, MaskKind::full, 0, RopeLayout::none, 0}); }
TEST("attention: a width that is no multiple of 16") { check_shape({2, 1, 20, 0, 0, 2, MaskKind::full, 0, RopeLayout::half, 20}); }
TEST("attention: sliding windows across split and block borders") {
  check_shape({2, 1, 16, 0, 0, 2, MaskKind::sliding, 67, RopeLayout::half, 16});
}
TEST("attention: windows of two splits and of three") {
  check_shape({2, 1, 16, 0, 0, 2, MaskKind::sliding, 131, RopeLayout::half, 16});
  check_shape({1, 1, 16, 0, 0, 1, MaskKind::chunked, 199, RopeLayout::half, 16});
}
TEST("attention: a window of one key") { check_shape({2, 1, 16, 0, 0, 2, MaskKind::sliding, 1, RopeLayout::half, 16}); }
TEST("attention: chunks that are no multiple of anything") { check_shape({2, 1, 16, 0, 0, 2, MaskKind::chunked, 41, RopeLayout::interleaved, 16, true}); }

// Scores far apart: the softmax must neither overflow nor divide by zero, and tiny weights vanish.
TEST("attention: scores of plus and minus a thousand") {
  const Shape shape{1, 1, 16, 0, 0, 1, MaskKind::full, 0, RopeLayout::none, 0};
  std::vector<Machine> all = machines();
  all.insert(all.begin(), reference());
  Floats want;
  for (const Machine& machine : all) {
    CHECK_OK(machine.ops->kv_init({1, 1, 16, 20, 16}));
    const uint32_t count = 300;
    std::vector<uint32_t> positions(count), sequence(count, 0), table(19);
    for (uint32_t i = 0; i < count; ++i) positions[i] = i;
    for (uint32_t i = 0; i < 19; ++i) table[i] = i + 1;
    const std::span<const uint32_t> tables[] = {table};
    Floats qkv;
    for (uint32_t i = 0; i < count; ++i) {
      Floats row = Random{i + 1}.floats(48);
      for (uint32_t d = 0; d < 32; ++d) row[d] = d % 16 ? 0.0f : d < 16 ? 1000.0f : row[d];
      qkv.insert(qkv.end(), row.begin(), row.end());
    }
    const Batch batch{count, nullptr, positions.data(), sequence.data(), tables};
    const Rows rows = machine.rows(qkv), out = machine.output(count * 16);
    CHECK_OK(machine.ops->rope_kv({1, 1, 16, RopeLayout::none, 0, {}, false, 0, 0, 0, 0}, batch, rows));
    CHECK_OK(machine.ops->attention({1, 1, 16, 0, 0, 1, 1.0, shape.mask, 0, 0}, batch, rows, out));
    const Floats got = machine.take(out, count * 16);
    if (want.empty()) want = got;
    // A score of 1000 has units of 6e-5, and so has a weight, relatively.
    check_close(got, want, 3e-4, machine.name);
  }
}

TEST("rope: positions far out turn as the f32 angle says") {
  const Shape shape{1, 1, 16, 0, 0, 1, MaskKind::sliding, 1, RopeLayout::half, 16};
  const std::vector<uint32_t> positions = {0, 1, 8191, 131071, 1048575, 10485759};
  const std::vector<uint32_t> sequence(positions.size(), 0), table(10485760 / 4096, 1);
  const std::span<const uint32_t> tables[] = {table};
  Floats frequencies;
  for (uint32_t j = 0; j < 8; ++j) frequencies.push_back(float(std::pow(500000.0, -2.0 * j / 16)));
  const Batch batch{uint32_t(positions.size()), nullptr, positions.data(), sequence.data(), tables};
  std::vector<Machine> all = machines();
  all.insert(all.begin(), reference());
  Floats want;
  for (const Machine& machine : all) {
    CHECK_OK(machine.ops->kv_init({1, 1, 16, 2, 4096}));
    const Rows rows = machine.rows(Random{5}.floats(positions.size() * 48));
    CHECK_OK(machine.ops->rope_kv({1, 1, 16, shape.layout, 16, frequencies, false, 0, 0.1, 8192, 0}, batch, rows));
    const Floats got = machine.read(rows, positions.size() * 48);
    if (want.empty()) want = got;
    check_close(got, want, 5e-7, machine.name);
  }
}

TEST("kv_copy: a copied block reads as its source in every layer, the source stays") {
  for (const Machine& machine : machines()) {
    CHECK_OK(machine.ops->kv_init({2, 1, 16, 4, 16}));
    const uint32_t first[] = {1}, copy[] = {3}, position[] = {0}, sequence[] = {0};
    const std::span<const uint32_t> from[] = {first}, to[] = {copy};
    for (uint32_t l = 0; l < 2; ++l) {
      const Batch batch{1, nullptr, position, sequence, from};
      CHECK_OK(machine.ops->rope_kv({1, 1, 16, RopeLayout::none, 0, {}, false, 0, 0, 0, l}, batch, machine.rows(Random{l + 7}.floats(48))));
    }
    CHECK_OK(machine.ops->kv_copy(1, 3));
    CHECK(!machine.ops->kv_copy(1, 4).is_ok());
    for (uint32_t l = 0; l < 2; ++l) {
      Floats read[2];
      for (int i = 0; i < 2; ++i) {
        const Batch batch{1, nullptr, position, sequence, i ? to : from};
        const Rows out = machine.output(16);
        CHECK_OK(machine.ops->attention({1, 1, 16, 0, 0, 1, 1.0, MaskKind::full, 0, l}, batch, machine.rows(Floats(48, 1)), out));
        read[i] = machine.take(out, 16);
      }
      const Floats row = Random{l + 7}.floats(48);
      check_same(read[0], {row.begin() + 32, row.end()}, machine.name);
      check_same(read[1], read[0], machine.name);
    }
  }
}

TEST("KV tables: what does not reach is refused, not read") {
  for (const Machine& machine : machines()) {
    CHECK_OK(machine.ops->kv_init({1, 1, 16, 4, 16}));
    const uint32_t short_table[] = {1}, wild[] = {9}, position[] = {16}, zero[] = {0}, two[] = {2};
    const std::span<const uint32_t> reaching[] = {short_table}, outside[] = {wild};
    const Rows rows = machine.rows(Floats(48, 1));
    const RopeDesc rope{1, 1, 16, RopeLayout::none, 0, {}, false, 0, 0, 0, 0};
    CHECK(machine.ops->rope_kv(rope, {1, nullptr, position, zero, reaching}, rows).code == Status::Code::internal);
    CHECK(machine.ops->rope_kv(rope, {1, nullptr, zero, two, reaching}, rows).code == Status::Code::internal);
    CHECK(machine.ops->rope_kv(rope, {1, nullptr, zero, zero, outside}, rows).code == Status::Code::internal);
    CHECK(!machine.ops->kv_init({1, 0, 16, 4, 16}).is_ok());
    CHECK(machine.ops->kv_init({4000000000u, 4000000000u, 4000000000u, 4000000000u, 16}).code == Status::Code::out_of_memory);
  }
}

MUSTER_TEST_MAIN

// Embedding, norm, linear, head, dense feed-forward and packing of the reference backend, on cases computed by hand.
#include <cmath>

#include "ref/tiny_ops.h"

using namespace muster;
using tiny::check_near;

TEST("embed gives the rows of a vocabulary slice and zero outside of it") {
  const tiny::Ops ops;
  const auto table = ops.weight(2, {1, 2, 3, 4, 5, 6});  // ids 10, 11, 12
  tiny::Tokens tokens{{12, 9, 10, 13, 0}, {0, 0, 0, 0, 0}, {0, 0, 0, 0, 0}, {{0}}, {}};
  const Rows out = ops.rows(std::vector<float>(10, 7));
  CHECK_OK(ops->embed(*table, 10, tokens.batch(), out));
  check_near(ops.read(out, 10), {5, 6, 0, 0, 1, 2, 0, 0, 0, 0}, 0);
}

TEST("add_norm adds the delta into x, then norms with the weight") {
  const tiny::Ops ops;
  const auto weight = ops.weight(2, {2, -1});
  const Rows x = ops.rows({1, 2, 0, 0}), delta = ops.rows({2, 2, 0, 0}), out = ops.rows(std::vector<float>(4));
  CHECK_OK(ops->add_norm(*weight, 0.0, 1, x, delta, out));
  check_near(ops.read(x, 4), {3, 4, 0, 0}, 0);
  check_near(ops.read(out, 2), {2 * 3 / std::sqrt(12.5), -4 / std::sqrt(12.5)}, 1e-7);
  CHECK_OK(ops->add_norm(*weight, 0.5, 2, x, nullptr, out));
  check_near(ops.read(x, 4), {3, 4, 0, 0}, 0);
  check_near(ops.read(out, 4), {6 / std::sqrt(13.0), -4 / std::sqrt(13.0), 0, 0}, 1e-7);
}

TEST("X1: linear sums in f64 and rounds once") {
  const tiny::Ops ops;
  const auto weight = ops.weight(3, {1, 1, 1, 0, 1, -1});
  const Rows in = ops.rows({0x1p30f, 1, -0x1p30f, 3, 5, 7}), out = ops.rows(std::vector<float>(4));
  CHECK_OK(ops->linear(*weight, 2, in, out));
  check_near(ops.read(out, 4), {1, 0x1p30 + 1, 15, -2}, 64);
  CHECK_EQ(ops.read(out, 1)[0], 1.0f);  // f32 sums give 0
}

TEST("head gives logits of the asked tokens only, in the asked order") {
  const tiny::Ops ops;
  const auto weight = ops.weight(2, {1, 0, 0, 1, 1, 1});
  const Rows in = ops.rows({1, 2, 3, 4, 5, 6});
  const std::vector<uint32_t> tokens{2, 0};
  std::vector<float> logits(6);
  CHECK_OK(ops->head(*weight, tokens, in, logits));
  check_near(logits, {5, 6, 11, 1, 2, 3}, 0);
  CHECK(ops->head(*weight, tokens, in, std::span(logits).first(5)).code == Status::Code::internal);
}

TEST("dense_ffn is down(silu(gate) * up) with the gate rows first") {
  const tiny::Ops ops;
  const auto gate_up = ops.weight(1, {1, 2, 10, 100});  // gates 1, 2; ups 10, 100
  const auto down = ops.weight(2, {1, 0, 0, 1, 1, 1});
  const Rows in = ops.rows({0.5f, -1}), out = ops.rows(std::vector<float>(6));
  CHECK_OK(ops->dense_ffn(*gate_up, *down, 2, in, out));
  const auto silu = [](double x) { return x / (1 + std::exp(-x)); };
  const double a = silu(0.5) * 5, b = silu(1) * 50, c = silu(-1) * -10, d = silu(-2) * -100;
  check_near(ops.read(out, 6), {a, b, a + b, c, d, c + d}, 1e-5);
}

TEST("a weight stacks parts of several stored types on the out dimension") {
  const tiny::Ops ops;
  std::vector<uint8_t> q8(2 * 34);
  for (uint32_t block = 0; block < 2; ++block) {
    q8[block * 34 + 1] = 0x38;  // d = 0.5
    for (uint32_t i = 0; i < 32; ++i) q8[block * 34 + 2 + i] = static_cast<uint8_t>(block * 32 + i);
  }
  const std::vector<uint16_t> bf16{0x3f80, 0xc000, 0x4040, 0, 0x3f80, 0x3f80, 0, 0};
  StoredMatrix quant{StoredType::q8_0, 1, 4, 30, 68, q8};
  StoredMatrix half{StoredType::bf16, 2, 4, 0, 8, {reinterpret_cast<const uint8_t*>(bf16.data()), 16}};
  const StoredMatrix parts[] = {quant, half};
  std::unique_ptr<Weight> weight;
  CHECK_OK(ops->pack(parts, &weight));
  CHECK(weight->rows == 3 && weight->cols == 4 && weight->bytes == 48);
  const Rows in = ops.rows({1, 10, 100, 1000}), out = ops.rows(std::vector<float>(3));
  CHECK_OK(ops->linear(*weight, 1, in, out));
  check_near(ops.read(out, 3), {0.5 * (30 + 310 + 3200 + 33000), 1 - 20 + 300, 11}, 0);
}

TEST("a vector of two rows and a matrix past its bytes are refused") {
  const tiny::Ops ops;
  const std::vector<uint8_t> bytes(16);
  std::unique_ptr<Weight> weight;
  CHECK_EQ(ops->pack_vector({StoredType::f32, 2, 2, 0, 8, bytes}, &weight).field, "rows");
  const StoredMatrix lying{StoredType::f32, 3, 2, 0, 8, bytes};
  CHECK_EQ(ops->pack({&lying, 1}, &weight).field, "data");
  CHECK(weight == nullptr);
  CHECK_OK(ops->pack_vector({StoredType::f32, 1, 4, 0, 16, bytes}, &weight));
}

TEST("zero, view and commit move exactly the rows that are named") {
  const tiny::Ops ops;
  const Rows rows = ops.rows({1, 2, 3, 4, 5, 6});
  CHECK_OK(ops->zero(2, 2, rows));
  check_near(ops.read(rows, 6), {0, 0, 0, 0, 5, 6}, 0);
  const std::vector<float> from{7, 8, 9};
  CHECK_OK(ops->commit(rows, 2, from));
  check_near(ops.read(rows, 6), {7, 8, 0, 0, 5, 6}, 0);
  CHECK(ops->commit(rows, 4, from).code == Status::Code::internal);
  std::span<float> view;
  CHECK_OK(ops->view(rows, 6, &view));
  CHECK_OK(ops->commit(rows, 6, view));  // what a collective left in the view itself
  CHECK_OK(ops->sync());
}

MUSTER_TEST_MAIN

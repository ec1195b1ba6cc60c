// Routing and experts of the reference backend: ties, gaps, weights on the expert's input, the rank's own experts only.
#include <cmath>
#include <limits>

#include "ref/tiny_ops.h"

using namespace muster;
using tiny::check_near;

namespace {

struct Routed {
  std::vector<uint32_t> expert;
  std::vector<float> weight, gap;
  Status status;
};

// Router logits by token: hidden is the count of experts, the router the identity.
Routed route(uint32_t experts, uint32_t top_k, const std::vector<float>& logits, RouterScore score = RouterScore::sigmoid_input) {
  const tiny::Ops ops;
  std::vector<float> identity(experts * experts);
  for (uint32_t e = 0; e < experts; ++e) identity[e * experts + e] = 1;
  const auto router = ops.weight(experts, identity);
  const uint32_t tokens = static_cast<uint32_t>(logits.size()) / experts;
  Routed r{std::vector<uint32_t>(tokens * top_k, 99), std::vector<float>(tokens * top_k), std::vector<float>(tokens), {}};
  r.status = ops->route(*router, score, top_k, tokens, ops.rows(logits), {r.expert, r.weight, r.gap});
  return r;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

}  // namespace

TEST("the best experts come first, ties go to the lower id") {
  const Routed r = route(4, 2, {1, 3, 3, 0, 2, 2, 2, 2, -1, -4, -2, -3});
  CHECK_OK(r.status);
  CHECK(r.expert == (std::vector<uint32_t>{1, 2, 0, 1, 0, 2}));
  check_near(r.gap, {2, 0, 1}, 0);
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  check_near(r.weight, {sigmoid(3), sigmoid(3), sigmoid(2), sigmoid(2), sigmoid(-1), sigmoid(-2)}, 1e-7);
}

TEST("top-1 gap is to the runner-up; it is infinite where nothing is left out") {
  check_near(route(3, 1, {0.25f, 5, 4.5f}).gap, {0.5}, 0);
  CHECK_EQ(route(3, 3, {0.25f, 5, 4.5f}).gap[0], std::numeric_limits<float>::infinity());
  CHECK(route(3, 3, {0.25f, 5, 4.5f}).expert == (std::vector<uint32_t>{1, 2, 0}));
}

TEST("logits that are not numbers still give ids of experts, each once") {
  const Routed r = route(3, 3, {NAN, NAN, NAN});
  CHECK(r.expert == (std::vector<uint32_t>{0, 1, 2}));
}

TEST("scores that are not implemented and impossible counts are refused by name") {
  CHECK(route(2, 1, {1, 2}, RouterScore::softmax).status.code == Status::Code::unsupported);
  CHECK(route(2, 1, {1, 2}, RouterScore::none).status.code == Status::Code::unsupported);
  CHECK(route(2, 0, {1, 2}).status.code == Status::Code::internal);
}

TEST("sigmoid_input scales the expert's input, which is not scaling its output; other experts leave no trace") {
  const tiny::Ops ops;  // hidden 2, ffn 1; expert 1 lives elsewhere
  const auto gate_up0 = ops.weight(2, {1, 0, 0, 1}), gate_up2 = ops.weight(2, {0, 2, 3, 0});
  const auto down0 = ops.weight(1, {1, -1}), down2 = ops.weight(1, {2, 5});
  const Weight* gate_ups[] = {gate_up0.get(), nullptr, gate_up2.get()};
  const Weight* downs[] = {down0.get(), nullptr, down2.get()};
  const std::vector<uint32_t> expert{0, 2, 1, 0, 1, 1};
  const std::vector<float> weight{0.5f, 0.25f, 0.75f, 1, 1, 1};
  ExpertsDesc desc{RouterScore::sigmoid_input, 2, expert, weight, gate_ups, downs};
  const std::vector<float> x{3, 4, 1, 2, 9, 9};
  const Rows in = ops.rows(x), out = ops.rows({100, 200, 0, 0, 7, 8});
  CHECK_OK(ops->experts(desc, 3, in, out));
  const double a = silu(1.5) * 2, b = silu(2 * 1.0) * 3 * 0.75, c = silu(1) * 2;
  check_near(ops.read(out, 6), {100 + a + 2 * b, 200 - a + 5 * b, c, -c, 7, 8}, 2e-5);
  CHECK(ops.read(in, 6) == x);

  desc.score = RouterScore::softmax;  // the weight scales the output
  const Rows plain = ops.rows({0, 0, 0, 0, 0, 0});
  CHECK_OK(ops->experts(desc, 1, in, plain));
  const double d = 0.5 * silu(3) * 4, e = 0.25 * silu(8) * 9;
  check_near(ops.read(plain, 2), {d + 2 * e, -d + 5 * e}, 2e-5);
}

TEST("an expert id past the model's is refused") {
  const tiny::Ops ops;
  const Weight* none[] = {nullptr};
  const std::vector<uint32_t> expert{1};
  const std::vector<float> weight{1};
  const ExpertsDesc desc{RouterScore::sigmoid_input, 1, expert, weight, none, none};
  CHECK(ops->experts(desc, 1, ops.rows({1, 1}), ops.rows({0, 0})).code == Status::Code::internal);
}

MUSTER_TEST_MAIN

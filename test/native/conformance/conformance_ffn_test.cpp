// Dense feed-forward blocks, routing and experts on every backend.
#include "conformance.h"

using namespace conformance;

namespace {

// Two products and a SiLU: 1e-6 of sum |x w| each (conformance_linear_test.cpp), seen against the largest output of the call,
// which is about a tenth of that sum here.
constexpr double relative = 2e-5;

struct Gated { std::vector<Stored> gate_up, down; };

Gated gated(StoredType type, uint32_t hidden, Range ffn, uint64_t seed, bool is_one_part = false) {
  Gated out;
  if (is_one_part) out.gate_up.emplace_back(type, 2 * ffn.size(), Range{0, hidden}, seed);
  else for (int i = 0; i < 2; ++i) out.gate_up.emplace_back(type, ffn.size(), Range{0, hidden}, seed + uint64_t(i));
  out.down.emplace_back(type, hidden, ffn, seed + 2);
  return out;
}
std::unique_ptr<Weight> pack(const Machine& machine, const std::vector<Stored>& parts) {
  std::vector<const Stored*> all;
  for (const Stored& part : parts) all.push_back(&part);
  return machine.pack(all);
}

void check_ffn(const Gated& weights, uint32_t tokens) {
  const uint32_t hidden = weights.down[0].matrix.rows;
  const std::string shape = name_of(weights.gate_up[0].matrix) + ", down " + name_of(weights.down[0].matrix);
  const Floats x = Random{71}.floats(size_t{tokens} * hidden);
  const auto run = [&](const Machine& machine, const Floats& in) {
    const Rows out = machine.output(in.size());
    const auto gate_up = pack(machine, weights.gate_up), down = pack(machine, weights.down);
    CHECK_OK(machine.ops->dense_ffn(*gate_up, *down, uint32_t(in.size() / hidden), machine.rows(in), out));
    return machine.take(out, in.size());
  };
  const Floats want = run(reference(), x);
  Floats first;
  for (const Machine& machine : machines()) {
    const Floats got = run(machine, x);
    check_close(got, want, relative * largest(want), machine.name + ", " + shape);
    if (first.empty()) first = got;
    check_same(got, first, machine.name + ", " + shape);
    const Floats last(x.end() - hidden, x.end());
    check_same(run(machine, last), {got.end() - hidden, got.end()}, machine.name + ", last row alone, " + shape);
  }
}

struct Moe {
  uint32_t hidden = 64, top_k = 2;
  RouterScore score = RouterScore::none;
  std::vector<Gated> experts;
  std::vector<bool> is_local;
  std::vector<uint32_t> chosen;  // [tokens, top_k]
  Floats weight;
};

Floats run_experts(const Machine& machine, const Moe& moe, Floats x, uint32_t first_token, uint32_t tokens) {
  std::vector<std::unique_ptr<Weight>> owned;
  std::vector<const Weight*> gate_up, down;
  for (size_t e = 0; e < moe.experts.size(); ++e) {
    if (!moe.is_local[e]) {
      gate_up.push_back(nullptr), down.push_back(nullptr);
      continue;
    }
    owned.push_back(pack(machine, moe.experts[e].gate_up)), gate_up.push_back(owned.back().get());
    owned.push_back(pack(machine, moe.experts[e].down)), down.push_back(owned.back().get());
  }
  ExpertsDesc desc;
  desc.score = moe.score;
  desc.top_k = moe.top_k;
  desc.expert = std::span(moe.chosen).subspan(size_t{first_token} * moe.top_k, size_t{tokens} * moe.top_k);
  desc.weight = std::span(moe.weight).subspan(size_t{first_token} * moe.top_k, size_t{tokens} * moe.top_k);
  desc.gate_up = gate_up;
  desc.down = down;
  x = {x.begin() + std::ptrdiff_t(first_token) * moe.hidden, x.begin() + std::ptrdiff_t(first_token + tokens) * moe.hidden};
  Floats start = x;  // experts add to what is there
  start.resize(start.size() + 64, Machine::guard);
  const Rows out = machine.rows(start);
  CHECK_OK(machine.ops->experts(desc, tokens, machine.rows(x), out));
  return machine.take(out, x.size());
}

void check_moe(const Moe& moe, const std::string& what) {
  const uint32_t tokens = uint32_t(moe.chosen.size() / moe.top_k);
  const Floats x = Random{81}.floats(size_t{tokens} * moe.hidden);
  const Floats want = run_experts(reference(), moe, x, 0, tokens);
  Floats first;
  for (const Machine& machine : machines()) {
    const Floats got = run_experts(machine, moe, x, 0, tokens);
    check_close(got, want, relative * largest(want), machine.name + ", " + what);
    if (first.empty()) first = got;
    check_same(got, first, machine.name + ", " + what);
    for (const uint32_t t : {0u, tokens - 1})
      check_same(run_experts(machine, moe, x, t, 1),
                 {got.begin() + std::ptrdiff_t(t) * moe.hidden, got.begin() + std::ptrdiff_t(t + 1) * moe.hidden},
                 machine.name + ", one token, " + what);
  }
}

Moe moe_of(StoredType type, uint32_t top_k, RouterScore score, Range ffn) {
  Moe moe;
  moe.top_k = top_k;
  moe.score = score;
  Random random{91};
  for (uint32_t e = 0; e < 5; ++e) {
    moe.experts.push_back(gated(type, moe.hidden, ffn, 100 * (e + 1)));
    moe.is_local.push_back(e != 2);
  }
  for (uint32_t t = 0; t < 33; ++t)
    for (uint32_t k = 0; k < top_k; ++k) {
      const uint32_t e = uint32_t(random.next() % 5);
      moe.chosen.push_back(k == 1 && e == moe.chosen.back() ? (e + 1) % 5 : e);
      moe.weight.push_back(0.5f + 0.4f * random.unit());
    }
  return moe;
}

}  // namespace

TEST("dense_ffn: every stored type") {
  for (const StoredType type : stored_types) check_ffn(gated(type, 64, {0, 96}, 5), 33);
}
TEST("dense_ffn: gate and up in one stored matrix, widths beside multiples of 16, cuts inside code groups") {
  check_ffn(gated(StoredType::q8_0, 64, {0, 96}, 6, true), 17);
  check_ffn(gated(StoredType::bf16, 37, {0, 23}, 7, true), 5);
  check_ffn(gated(StoredType::f32, 37, {0, 23}, 8), 5);
  check_ffn(gated(StoredType::q4_k, 288, {40, 120}, 9), 9);
  check_ffn(gated(StoredType::q6_k, 96, {224, 288}, 10), 3);
}
TEST("dense_ffn: wide enough for the pool") { check_ffn(gated(StoredType::bf16, 256, {0, 512}, 11), 70); }

TEST("experts: scaled input, one expert for a token") { check_moe(moe_of(StoredType::q4_k, 1, RouterScore::sigmoid_input, {32, 96}), "Q4_K"); }
TEST("experts: scaled output, two experts for a token, summed in slot order") {
  check_moe(moe_of(StoredType::f32, 2, RouterScore::sigmoid, {0, 48}), "F32");
}
TEST("experts: scaled input, two experts, widths that the list cannot take") {
  check_moe(moe_of(StoredType::q8_0, 2, RouterScore::sigmoid_input, {40, 63}), "Q8_0");
}
TEST("experts: many tokens on one expert, none on others") {
  Moe moe = moe_of(StoredType::q6_k, 1, RouterScore::sigmoid_input, {0, 512});
  std::fill(moe.chosen.begin(), moe.chosen.end(), 4u);
  check_moe(moe, "Q6_K");
}
TEST("experts: no local expert leaves the rows as they are") {
  Moe moe = moe_of(StoredType::f32, 1, RouterScore::sigmoid_input, {0, 32});
  std::fill(moe.chosen.begin(), moe.chosen.end(), 2u);
  for (const Machine& machine : machines()) {
    const Floats x = Random{92}.floats(33 * 64);
    check_same(run_experts(machine, moe, x, 0, 33), x, machine.name);
  }
}
TEST("experts: an id outside the list is refused") {
  Moe moe = moe_of(StoredType::f32, 1, RouterScore::sigmoid_input, {0, 32});
  const uint32_t wild[] = {5};
  const float weight[] = {1};
  const std::vector<const Weight*> nothing(5);
  for (const Machine& machine : machines()) {
    const ExpertsDesc desc{moe.score, 1, wild, weight, nothing, nothing};
    CHECK(machine.ops->experts(desc, 1, machine.rows(Floats(64)), machine.rows(Floats(64))).code == Status::Code::internal);
  }
}

TEST("route: the reference's experts, gaps and weights; ties go to the lower id") {
  const uint32_t experts = 21, tokens = 33;
  for (const uint32_t top_k : {1u, 3u, 21u}) {
    Stored stored(StoredType::f32, experts, {0, 64}, 111);
    std::memcpy(&stored.bytes[9 * 256], &stored.bytes[4 * 256], 256);    // experts 4, 9 and 15 always tie
    std::memcpy(&stored.bytes[15 * 256], &stored.bytes[4 * 256], 256);
    const Floats x = Random{112}.floats(tokens * 64);
    std::vector<Machine> all = machines();
    all.insert(all.begin(), reference());
    std::vector<uint32_t> want_chosen;
    Floats want_weight, want_gap, first_weight;
    for (const Machine& machine : all) {
      std::vector<uint32_t> chosen(tokens * top_k);
      Floats weight(tokens * top_k), gap(tokens);
      CHECK_OK(machine.ops->route(*machine.pack({&stored}), RouterScore::sigmoid_input, top_k, tokens, machine.rows(x), {chosen, weight, gap}));
      if (machine.name == "ref") want_chosen = chosen, want_weight = weight, want_gap = gap;
      else if (first_weight.empty()) first_weight = weight;
      CHECK(chosen == want_chosen);
      check_close(weight, want_weight, 1e-6, machine.name);
      if (!first_weight.empty()) check_same(weight, first_weight, machine.name);
      for (uint32_t t = 0; t < tokens; ++t) {
        if (top_k == experts) CHECK(std::isinf(gap[t]));
        else CHECK_NEAR(gap[t], want_gap[t], 1e-5);
      }
    }
  }
  for (const Machine& machine : machines()) {
    Stored stored(StoredType::f32, 4, {0, 64}, 113);
    const auto router = machine.pack({&stored});
    CHECK(machine.ops->route(*router, RouterScore::softmax, 1, 1, machine.rows(Floats(64)), {}).code == Status::Code::unsupported);
    CHECK(machine.ops->route(*router, RouterScore::sigmoid_input, 5, 1, machine.rows(Floats(64)), {}).code == Status::Code::internal);
  }
}

MUSTER_TEST_MAIN

// The sampler against a plain reading of its order, and the choice over several ranks against the choice of one.
#include <algorithm>
#include <random>
#include <thread>

#include "check.h"
#include "exec/sampler.h"
#include "muster/comm.h"

using namespace muster;

namespace {

constexpr uint32_t kVocab = 211;

// Every step in full, sorted lists, the library's exp and log.
struct Naive {
  std::vector<float> logits;
  uint32_t token = 0;
  double value = -1e300, second = -1e300;
  std::vector<double> scores;

  void run(const Sampler& s, const std::vector<uint32_t>& ids, uint32_t generated_from, const Noise& noise) {
    for (const LogitBias& b : s.bias) logits[b.id] += b.bias;
    for (uint32_t id = 0; id < kVocab; ++id) {
      const bool seen = std::find(ids.begin(), ids.end(), id) != ids.end();
      const auto count = std::count(ids.begin() + generated_from, ids.end(), id);
      if (seen && s.repetition != 1) logits[id] = logits[id] > 0 ? logits[id] / s.repetition : logits[id] * s.repetition;
      if (count) logits[id] -= s.presence + s.frequency * float(count);
    }
    std::vector<uint32_t> order(kVocab);
    for (uint32_t i = 0; i < kVocab; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; });
    if (s.temperature > 0) {
      if (s.top_k && s.top_k < order.size()) order.resize(s.top_k);
      std::vector<double> p;
      double total = 0;
      for (const uint32_t id : order) p.push_back(std::exp((double(logits[id]) - double(logits[order[0]])) / double(s.temperature))), total += p.back();
      if (s.top_p < 1) {
        double sum = 0;
        size_t kept = 0;
        while (kept < order.size() && sum < double(s.top_p) * total) sum += p[kept++];
        order.resize(kept);
      }
      if (s.min_p > 0) std::erase_if(order, [&](uint32_t id) { return std::exp((double(logits[id]) - double(logits[order[0]])) / double(s.temperature)) < double(s.min_p); });
    }
    std::sort(order.begin(), order.end());
    for (const uint32_t id : order) {
      const double score = s.temperature == 0 ? double(logits[id]) : double(logits[id]) / double(s.temperature) + gumbel(noise_bits(noise.seed, noise.index, 0, id));
      if (score > value) second = value, value = score, token = id;
      else if (score > second) second = score;
    }
  }
};

struct Case {
  std::vector<float> logits;
  std::vector<uint32_t> ids;
  uint32_t generated_from = 0;
  Sampler sampler;
  Noise noise;
};

Case random_case(std::mt19937& random, bool filters) {
  Case c;
  std::normal_distribution<float> normal(0, 3);
  const bool coarse = random() % 4 == 0;  // many ties
  for (uint32_t i = 0; i < kVocab; ++i) c.logits.push_back(coarse ? std::round(normal(random)) : normal(random));
  for (uint32_t i = 0; i < 30; ++i) c.ids.push_back(random() % kVocab);
  c.generated_from = random() % 31;
  Sampler& s = c.sampler;
  s.temperature = random() % 3 == 0 ? 0 : 0.3f + float(random() % 100) / 60;
  if (random() % 2) s.repetition = 0.8f + float(random() % 100) / 100;
  if (random() % 2) s.presence = float(random() % 100) / 50 - 1;
  if (random() % 2) s.frequency = float(random() % 100) / 50 - 1;
  for (uint32_t i = random() % 4; i > 0; --i) s.bias.push_back({uint32_t(random() % kVocab), normal(random)});
  if (filters) {
    if (random() % 2) s.top_k = 1 + random() % kVocab;
    if (random() % 2) s.top_p = 0.05f + float(random() % 95) / 100;
    if (random() % 2) s.min_p = float(random() % 50) / 100;
  }
  c.noise = {{random(), random()}, uint32_t(random() % 5000)};
  return c;
}

std::vector<float> process(const Case& c, uint32_t first, uint32_t end) {
  std::vector<float> part(c.logits.begin() + first, c.logits.begin() + end);
  apply_bias(c.sampler, first, part);
  if (!Penalties::wanted(c.sampler)) return part;
  Penalties penalties(kVocab);
  penalties.start(c.ids, c.generated_from);
  penalties.apply(c.sampler, first, part);
  return part;
}

Best choose(const Case& c) {
  const std::vector<float> logits = process(c, 0, kVocab);
  return c.sampler.has_filters() ? best_filtered(logits, c.sampler, c.noise) : best_of(logits, 0, c.sampler.temperature, c.noise, true);
}

}  // namespace

TEST("S1: 4000 random choices equal a plain reading of the order of processors and filters") {
  for (uint32_t seed = 0; seed < 4000; ++seed) {
    std::mt19937 random(seed);
    const Case c = random_case(random, seed % 2);
    Naive naive{c.logits, 0, -1e300, -1e300, {}};
    naive.run(c.sampler, c.ids, c.generated_from, c.noise);
    const Best best = choose(c);
    if (best.id != naive.token || best.value != naive.value) std::printf("  seed %u\n", seed);
    CHECK_EQ(best.id, naive.token);
    CHECK_EQ(best.value, naive.value);
    if (naive.second > -1e300) CHECK_EQ(best.second, naive.second);
    else CHECK(std::isinf(best.second));
  }
}

TEST("S2: the best over parts of the vocabulary is the best of all, on 1 to 5 ranks") {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const Case c = random_case(random, false);
    const Best whole = choose(c);
    const uint32_t world = 1 + seed % 5;
    const std::shared_ptr<Comm> comm = make_peer_comm(world, {});
    std::vector<std::thread> threads;
    std::vector<MaxPair> found(world);
    std::vector<double> seconds(world);
    for (uint32_t rank = 0; rank < world; ++rank)
      threads.emplace_back([&, rank] {
        const uint32_t first = kVocab * rank / world, end = kVocab * (rank + 1) / world;
        const Best part = best_of(process(c, first, end), first, c.sampler.temperature, c.noise, true);
        found[rank] = {part.value, part.id};
        seconds[rank] = part.second;
        comm->begin(rank, 1);
        CHECK_OK(comm->max(rank, {&found[rank], 1}, {&seconds[rank], 1}));
      });
    for (std::thread& thread : threads) thread.join();
    for (uint32_t rank = 0; rank < world; ++rank) {
      CHECK_EQ(found[rank].id, whole.id);
      CHECK_EQ(found[rank].value, whole.value);
      CHECK_EQ(seconds[rank], whole.second);
    }
  }
}

TEST("a choice without a second-best wish skips ids and still finds the same token") {
  for (uint32_t seed = 0; seed < 500; ++seed) {
    std::mt19937 random(seed);
    const Case c = random_case(random, false);
    const std::vector<float> logits = process(c, 0, kVocab);
    CHECK_EQ(best_of(logits, 0, c.sampler.temperature, c.noise, false).id, choose(c).id);
  }
}

TEST("sampled frequencies follow the softmax") {
  std::vector<float> logits = {0, 1, 2, -1, 0.5f};
  double total = 0;
  for (const float logit : logits) total += std::exp(logit / 0.7);
  std::vector<int> counts(logits.size());
  constexpr int draws = 40000;
  for (int i = 0; i < draws; ++i) ++counts[best_of(logits, 0, 0.7f, {{42, 1}, uint32_t(i)}, false).id];
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p = std::exp(logits[i] / 0.7) / total;
    CHECK_NEAR(double(counts[i]) / draws, p, 4 * std::sqrt(p * (1 - p) / draws));
  }
}

TEST("not-a-number and minus infinity are never chosen; a row of them has no choice") {
  const float nan = std::nanf(""), low = -std::numeric_limits<float>::infinity();
  for (const float temperature : {0.0f, 1.0f}) {
    CHECK_EQ(best_of(std::vector<float>{nan, low, -5, nan}, 10, temperature, {}, true).id, 12u);
    CHECK(!best_of(std::vector<float>{nan, low, nan}, 0, temperature, {}, true).found());
  }
  Sampler s;
  s.temperature = 1;
  s.top_k = 2;
  CHECK_EQ(best_filtered(std::vector<float>{nan, low, -5, nan}, s, {}).id, 2u);
}

TEST("S3: exp_exact is within two units of the last place of exp") {
  std::mt19937_64 random(3);
  for (int i = 0; i < 20000; ++i) {
    const double x = -double(random() % 7000000) / 10000;
    CHECK_NEAR(exp_exact(x) / std::exp(x), 1, 4.5e-16);
  }
  CHECK_EQ(exp_exact(0), 1.0);
  CHECK_EQ(exp_exact(-800), 0.0);
  CHECK(exp_exact(-740) > 0);
}

TEST("log-probabilities sum to one and are ordered, ties to the lower id") {
  std::vector<float> raw(kVocab, 1.5f);
  raw[7] = 3;
  TokenDetail detail;
  log_probabilities(raw, 9, 4, &detail);
  CHECK_EQ(detail.top.size(), 4u);
  CHECK_EQ(detail.top[0].id, 7u);
  CHECK_EQ(detail.top[1].id, 0u);
  CHECK_EQ(detail.top[2].id, 1u);
  CHECK_NEAR(std::exp(detail.top[0].logprob) + (kVocab - 1) * std::exp(detail.logprob), 1, 1e-6);
  TokenDetail alone;
  log_probabilities(raw, 7, 0, &alone);
  CHECK(alone.top.empty());
}

MUSTER_TEST_MAIN

// The engine over reference ops: the same tokens for any cut, batch, chunking and drafts; faults that name their cause.
#include "exec/sampler.h"
#include "tiny_model.h"

using namespace tiny;

namespace {

Sampler warm(float temperature) {
  Sampler s;
  s.temperature = temperature;
  return s;
}

struct Stream {
  std::vector<uint32_t> tokens;
  std::vector<float> gaps;          // smaller of score gap and scaled router gap
  std::vector<float> first_logits;  // of the prompt
};

// Prompt in one row, then one token a step.
Stream generate(Driver& driver, uint32_t slot, const std::vector<uint32_t>& ids, const Sampler& sampler, uint32_t count) {
  Stream out;
  SlotUpdate open = opening(slot, ids, slot * 24 - 23);
  open.sampler = sampler;
  for (uint32_t i = 0; i < count; ++i) {
    Step step;
    if (i == 0) step.updates = {open};
    step.rows = {row(slot, i == 0 ? uint32_t(ids.size()) : 1)};
    step.rows[0].logits = i == 0;
    step.rows[0].margins = true;
    const StepResult result = driver.run(step);
    CHECK_OK(result.status);
    if (!result.status.is_ok()) return out;
    const RowResult& one = result.rows[0];
    CHECK_EQ(one.tokens.size(), 1u);
    CHECK_EQ(one.computed, ids.size() + i);
    out.tokens.push_back(one.tokens[0]);
    out.gaps.push_back(one.details[0].router_gap < 1e-5f ? 0 : one.details[0].score_gap);
    if (i == 0) out.first_logits = one.logits;
  }
  Step last;
  last.updates = {closing(slot)};
  CHECK_OK(driver.run(last).status);
  return out;
}

void check_same_until_near_tie(const Stream& a, const Stream& b) {
  size_t same = 0;
  while (same < a.tokens.size() && same < b.tokens.size() && a.gaps[same] >= 1e-3f) {
    CHECK_EQ(a.tokens[same], b.tokens[same]);
    ++same;
  }
  CHECK(same >= 8);  // near ties are rare: a run that ends early compares nothing
}

}  // namespace

TEST("a model cut over 1, 2 and 4 ranks has the same logits and tokens, tied head or not") {
  for (const bool tied : {false, true}) {
    const ModelDesc m = model(tied);
    const File file(m);
    Driver one = open(m, file);
    for (const auto& [world, ep] : std::vector<std::pair<uint32_t, uint32_t>>{{2, 1}, {2, 2}, {4, 4}, {4, 2}}) {
      Driver cut = open(m, file, world, ep);
      for (const float temperature : {0.0f, 0.8f}) {
        const Stream a = generate(one, 1, prompt(19, 3), warm(temperature), 24);
        const Stream b = generate(cut, 1, prompt(19, 3), warm(temperature), 24);
        check_same_until_near_tie(a, b);
        CHECK_EQ(a.first_logits.size(), 19u * 67u);
        CHECK_EQ(b.first_logits.size(), a.first_logits.size());
        double worst = 0, largest = 0;
        for (size_t i = 0; i < a.first_logits.size() && i < b.first_logits.size(); ++i) {
          worst = std::max(worst, std::fabs(double(a.first_logits[i]) - b.first_logits[i]));
          largest = std::max(largest, std::fabs(double(a.first_logits[i])));
        }
        CHECK(largest > 0.1);
        CHECK(worst <= 2e-5 * largest);
      }
      CHECK(cut.engine->numerics_id() != one.engine->numerics_id());
    }
  }
}

TEST("E2: chunking and batch mates do not change a bit of the logits or a token") {
  const ModelDesc m = model();
  const File file(m);
  for (const auto& [backend, world] : std::vector<std::pair<const char*, uint32_t>>{{"ref", 1}, {"ref", 2}, {"cpu", 1}, {"cpu", 2}}) {
    Driver driver = open(m, file, world, world, options(backend));
    const std::vector<uint32_t> ids = prompt(23, 9);
    const Stream whole = generate(driver, 1, ids, warm(0.9f), 12);

    SlotUpdate again = opening(1, ids, 1), mate = opening(2, prompt(11, 4), 30);
    again.sampler = warm(0.9f);
    mate.sampler = warm(0.5f);
    Step step;
    step.updates = {mate, again};
    std::vector<float> logits;
    std::vector<uint32_t> tokens;
    uint32_t left = 23, mate_count = 11;
    for (uint32_t chunk : {5u, 1u, 9u, 8u}) {
      left -= chunk;
      step.rows = {row(2, mate_count), row(1, chunk, left == 0)};
      step.rows[1].logits = true;
      mate_count = 1;
      const StepResult result = driver.run(step);
      CHECK_OK(result.status);
      if (!result.status.is_ok()) return;
      logits.insert(logits.end(), result.rows[1].logits.begin(), result.rows[1].logits.end());
      tokens.insert(tokens.end(), result.rows[1].tokens.begin(), result.rows[1].tokens.end());
      step = {};
    }
    for (int i = 1; i < 12; ++i) {
      Step next;
      next.rows = {row(1, 1), row(2, 1)};
      const StepResult result = driver.run(next);
      CHECK_OK(result.status);
      tokens.push_back(result.rows[0].tokens[0]);
    }
    CHECK(logits == whole.first_logits);
    CHECK(tokens == whole.tokens);
  }
}

TEST("E2: verified drafts, right, wrong or partly right, give the tokens of one at a time") {
  const ModelDesc m = model();
  const File file(m);
  Sampler sampler = warm(0.8f);
  sampler.repetition = 1.2f;
  sampler.presence = 0.3f;
  sampler.frequency = 0.2f;
  sampler.bias = {{3, 1.5f}, {60, -2.0f}};
  for (const auto& [backend, world] : std::vector<std::pair<const char*, uint32_t>>{{"ref", 1}, {"ref", 2}, {"cpu", 1}, {"cpu", 2}}) {
    for (const bool filters : {false, true}) {
      sampler.top_k = filters ? 20 : 0;
      sampler.top_p = filters ? 0.95f : 1;
      sampler.min_p = filters ? 0.01f : 0;
      Driver driver = open(m, file, world, 1, options(backend));
      const std::vector<uint32_t> ids = prompt(9, 5);
      const std::vector<uint32_t> want = generate(driver, 1, ids, sampler, 40).tokens;
      SlotUpdate again = opening(1, ids, 1);
      again.sampler = sampler;
      std::vector<uint32_t> got;
      std::mt19937 random(8);
      uint32_t most_accepted = 0;
      for (bool first = true; got.size() < 36; first = false) {
        Step step;
        if (first) step.updates = {again};
        std::vector<uint32_t> drafts;
        for (uint32_t i = 0; i < random() % 5; ++i) drafts.push_back(random() % 4 ? want[got.size() + i] : uint32_t(random() % 67));
        step.rows = {row(1, first ? 9 : 1, true, drafts)};
        const StepResult result = driver.run(step);
        CHECK_OK(result.status);
        if (!result.status.is_ok()) return;
        const RowResult& one = result.rows[0];
        CHECK_EQ(one.tokens.size(), one.accepted + 1u);
        most_accepted = std::max(most_accepted, one.accepted);
        got.insert(got.end(), one.tokens.begin(), one.tokens.end());
        CHECK_EQ(one.computed, 9 + got.size() - 1);
      }
      CHECK_EQ(most_accepted, 4u);
      for (size_t i = 0; i < got.size() && i < want.size(); ++i) CHECK_EQ(got[i], want[i]);
    }
  }
}

TEST("margins of a verified draft are those of the choice: its own score gap, the smallest router gap of the row up to it") {
  const ModelDesc m = model();
  const File file(m);
  for (const uint32_t world : {1u, 2u}) {
    Driver driver = open(m, file, world, world);
    SlotUpdate update = opening(1, prompt(9, 5), 1);
    update.sampler = warm(0.8f);
    std::vector<uint32_t> tokens;
    std::vector<TokenDetail> single;
    Step step;
    step.updates = {update};
    for (uint32_t count : {9u, 1u, 1u, 1u}) {
      step.rows = {row(1, count)};
      step.rows[0].margins = true;
      const StepResult result = driver.run(step);
      CHECK_OK(result.status);
      tokens.push_back(result.rows.at(0).tokens.at(0));
      single.push_back(result.rows[0].details.at(0));
      step = {};
    }
    Step verify;
    verify.updates = {closing(1), update};
    verify.rows = {row(1, 9, true, {tokens[0], tokens[1], tokens[2]})};
    verify.rows[0].margins = true;
    const std::vector<TokenDetail> details = driver.run(verify).rows.at(0).details;
    CHECK_EQ(details.size(), 4u);
    float smallest = INFINITY;
    for (size_t i = 0; i < details.size(); ++i) {
      smallest = std::min(smallest, single[i].router_gap);
      CHECK(smallest > 0 && std::isfinite(smallest));
      CHECK_EQ(details[i].router_gap, smallest);
      CHECK_EQ(details[i].score_gap, single[i].score_gap);
    }
  }
}

TEST("a step may be launched before the last one is done, and both slots go on as if it were not") {
  const ModelDesc m = model();
  const File file(m);
  Driver driver = open(m, file);
  const std::vector<uint32_t> want = generate(driver, 1, prompt(7, 2), warm(0.7f), 10).tokens;
  SlotUpdate again = opening(1, prompt(7, 2), 1);
  again.sampler = warm(0.7f);
  std::vector<std::future<StepResult>> flying;
  std::vector<uint32_t> got;
  for (uint32_t i = 0; i < 10; ++i) {
    Step step;
    if (i == 0) step.updates = {again};
    step.rows = {row(1, i == 0 ? 7 : 1)};
    flying.push_back(driver.start(step));
    if (flying.size() < 2) continue;
    const StepResult result = flying.front().get();
    CHECK_OK(result.status);
    got.push_back(result.rows.at(0).tokens.at(0));
    flying.erase(flying.begin());
  }
  got.push_back(flying.front().get().rows.at(0).tokens.at(0));
  CHECK(got == want);
}

TEST("fork, copy and truncate continue a sequence as if it had been computed from the start") {
  const ModelDesc m = model();
  const File file(m);
  Driver driver = open(m, file);
  const std::vector<uint32_t> ids = prompt(14, 6);
  std::vector<uint32_t> shorter(ids.begin(), ids.begin() + 10);
  SlotUpdate as_fork = opening(2, shorter, 25);
  as_fork.seed_low = 78;  // a fork shares its source's seed (slot 1)
  Step direct;
  direct.updates = {as_fork};
  direct.rows = {row(2, 10)};
  const uint32_t want = driver.run(direct).rows.at(0).tokens.at(0);

  Step first;
  first.updates = {closing(2), opening(1, ids, 1)};
  first.rows = {row(1, 14)};
  CHECK_OK(driver.run(first).status);
  // Block 3 (tokens 8..11) is shared up to token 9, so the fork gets a copy of it.
  SlotUpdate fork, copy;
  fork.kind = SlotUpdate::Kind::fork;
  fork.slot = 3;
  fork.from = 1;
  fork.length = 10;
  fork.blocks = {1, 2, 50};
  copy.kind = SlotUpdate::Kind::copy;
  copy.from = 3;
  copy.to = 50;
  SlotUpdate cut;
  cut.kind = SlotUpdate::Kind::truncate;
  cut.slot = 1;
  cut.length = 9;
  Step second;
  second.updates = {fork, copy, cut};
  CHECK_OK(driver.run(second).status);
  SlotUpdate shorter_cut = cut;
  shorter_cut.slot = 3;
  Step third;
  third.updates = {shorter_cut};
  third.rows = {};
  CHECK_OK(driver.run(third).status);
  // Nothing is left to compute in the fork: its last id has to come again, with its blocks.
  Step refused;
  refused.rows = {row(3, 1)};
  CHECK_EQ(driver.run(refused).status.field, std::string("rows[0].count"));
  SlotUpdate reopen = opening(4, shorter, 0);
  reopen.seed_low = 78;
  reopen.length = 9;
  reopen.blocks = {1, 2, 50};
  Step fourth;
  fourth.updates = {reopen};
  fourth.rows = {row(4, 1)};
  const StepResult result = driver.run(fourth);
  CHECK_OK(result.status);
  CHECK_EQ(result.rows.at(0).tokens.at(0), want);
}

TEST("log-probabilities are those of the raw logits, and the same whichever way the head is cut") {
  const ModelDesc m = model();
  const File file(m);
  std::vector<TokenDetail> seen;
  for (const uint32_t world : {1u, 2u}) {
    Driver driver = open(m, file, world, 1);
    SlotUpdate update = opening(1, prompt(8, 8), 1);
    update.sampler.bias = {{5, 100}};
    Step step;
    step.updates = {update};
    step.rows = {row(1, 8)};
    step.rows[0].logits = true;
    step.rows[0].logprobs = 4;
    const StepResult result = driver.run(step);
    CHECK_OK(result.status);
    const RowResult& one = result.rows.at(0);
    CHECK_EQ(one.tokens.at(0), 5u);
    const float* raw = one.logits.data() + 7 * 67;
    double sum = 0;
    for (int i = 0; i < 67; ++i) sum += std::exp(double(raw[i]));
    CHECK_NEAR(one.details.at(0).logprob, raw[5] - std::log(sum), 1e-6);
    CHECK_EQ(one.details[0].top.size(), 3u);
    for (size_t i = 0; i < one.details[0].top.size(); ++i) {
      const TopLogprob& top = one.details[0].top[i];
      CHECK_NEAR(top.logprob, raw[top.id] - std::log(sum), 1e-6);
      CHECK(i == 0 || one.details[0].top[i - 1].logprob >= top.logprob);
    }
    seen.push_back(one.details[0]);
  }
  CHECK_EQ(seen[0].top[0].id, seen[1].top[0].id);
}

TEST("E2: the thread count does not change a bit on the CPU backend, and every cut agrees with the reference") {
  const ModelDesc m = model();
  const File file(m);
  EngineOptions threads = options("cpu");
  Driver reference = open(m, file), one = open(m, file, 1, 1, threads);
  threads.threads = 3;
  Driver three = open(m, file, 1, 1, threads), cut = open(m, file, 4, 2, threads);
  const Stream want = generate(reference, 1, prompt(30, 11), warm(0.8f), 20);
  const Stream a = generate(one, 1, prompt(30, 11), warm(0.8f), 20), b = generate(three, 1, prompt(30, 11), warm(0.8f), 20);
  CHECK(a.first_logits == b.first_logits);
  CHECK(a.tokens == b.tokens);
  check_same_until_near_tie(want, a);
  check_same_until_near_tie(want, generate(cut, 1, prompt(30, 11), warm(0.8f), 20));
}

TEST("memory, expert counts and the digest tell what was done") {
  const ModelDesc m = model();
  const File file(m);
  Driver one = open(m, file), two = open(m, file, 2, 2);
  CHECK_EQ(one.engine->memory().size(), 1u);
  CHECK_EQ(two.engine->memory().size(), 2u);
  CHECK_EQ(one.engine->memory()[0].kv, 64u * 4 * 3 * 2 * 2 * 8 * 4);
  CHECK_EQ(two.engine->memory()[0].kv * 2, one.engine->memory()[0].kv);
  CHECK(one.engine->memory()[0].weights > two.engine->memory()[0].weights);
  Step step;
  step.updates = {opening(1, prompt(12, 1), 1)};
  step.rows = {row(1, 12)};
  const StepResult a = one.run(step), b = two.run(step);
  CHECK_OK(a.status);
  CHECK_OK(b.status);
  CHECK_EQ(a.digest, b.digest);
  const EngineStats stats = one.engine->stats();
  CHECK(stats.expert_tokens.at(0).empty());
  uint64_t routed = 0;
  for (const uint64_t count : stats.expert_tokens.at(1)) routed += count;
  CHECK_EQ(routed, 12u);
  routed = 0;
  for (const uint64_t count : stats.expert_tokens.at(2)) routed += count;
  CHECK_EQ(routed, 24u);
  CHECK(a.step_ms > 0);
}

TEST("after close nothing but close is answered") {
  const ModelDesc m = model();
  const File file(m);
  Driver driver = open(m, file, 2, 1);
  driver.engine->close();
  driver.engine->close();
  Step step;
  step.updates = {opening(1, prompt(3, 1), 1)};
  CHECK_EQ(driver.run(step).status.field, std::string("engine"));
}

MUSTER_TEST_MAIN

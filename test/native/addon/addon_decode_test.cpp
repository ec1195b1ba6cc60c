// Words of a step: what is cut short, goes on too long or lies about its counts is refused, and nothing is read beyond the end.
#include <random>

#include "addon/decode.cpp"  // no Node in it: the addon itself is built without sanitizers
#include "check.h"

using namespace muster;
using namespace muster::addon;

namespace {

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }

// One update of every kind and two rows.
std::vector<uint32_t> good() {
  return {kStepMagic, 9, 1, 6, 2,
          1, 3, 2, 11, 12, 2, 5, 6, 7, 8, bits(0.5f), 40, bits(0.9f), bits(0.1f), bits(1.1f), bits(0.2f), bits(0.3f), 1, 44, bits(-1.5f), 1, 2, 21, 22,
          2, 3,
          3, 4, 1, 23,
          4, 5, 6,
          5, 6, 3, 2, 1, 24,
          6, 0, 21, 25,
          3, 1, 5, 2, 3, 31, 32, 33,
          4, 7, 2, 0, 0};
}

}  // namespace

TEST("every field of a step arrives where it belongs") {
  Step step;
  CHECK_OK(decode_step(good(), &step));
  CHECK_EQ(step.epoch, (uint64_t(1) << 32) + 9);
  CHECK_EQ(step.updates.size(), 6u);
  const SlotUpdate& open = step.updates[0];
  CHECK(open.kind == SlotUpdate::Kind::open && open.slot == 3 && open.ids == std::vector<uint32_t>({11, 12}));
  CHECK_EQ(open.seed_low, (uint64_t(6) << 32) + 5);
  CHECK_EQ(open.seed_high, (uint64_t(8) << 32) + 7);
  CHECK_EQ(open.sampler.temperature, 0.5f);
  CHECK_EQ(open.sampler.frequency, 0.3f);
  CHECK(open.sampler.bias.size() == 1 && open.sampler.bias[0].id == 44 && open.sampler.bias[0].bias == -1.5f);
  CHECK(open.length == 1 && open.blocks == std::vector<uint32_t>({21, 22}));
  CHECK(step.updates[2].blocks == std::vector<uint32_t>({23}));
  CHECK_EQ(step.updates[3].length, 6u);
  CHECK(step.updates[4].from == 3 && step.updates[4].length == 2 && step.updates[4].blocks == std::vector<uint32_t>({24}));
  CHECK(step.updates[5].from == 21 && step.updates[5].to == 25);
  CHECK(step.rows[0].sample && !step.rows[0].logits && step.rows[0].margins && step.rows[0].logprobs == 2);
  CHECK(step.rows[0].drafts == std::vector<uint32_t>({31, 32, 33}));
  CHECK(!step.rows[1].sample && step.rows[1].logits && step.rows[1].count == 7);
}

TEST("every prefix of a step is refused, and so is a word too many or another mark") {
  std::vector<uint32_t> words = good();
  for (size_t length = 0; length < words.size(); ++length) {
    Step step;
    CHECK(!decode_step(std::vector<uint32_t>(words.begin(), words.begin() + std::ptrdiff_t(length)), &step).is_ok());
  }
  Step step;
  words.push_back(0);
  CHECK(!decode_step(words, &step).is_ok());
  words.pop_back();
  words[0] ^= 1;
  CHECK(!decode_step(words, &step).is_ok());
}

TEST("any words at all are decoded or refused, and allocate no more than they are long") {
  for (uint32_t seed = 0; seed < 20000; ++seed) {
    std::mt19937 random(seed);
    std::vector<uint32_t> words = good();
    for (uint32_t i = 1 + random() % 6; i > 0; --i) words[1 + random() % (words.size() - 1)] = random() % 3 ? random() % 12 : random();
    Step step;
    (void)decode_step(words, &step);
    size_t held = 0;
    for (const SlotUpdate& update : step.updates) held += update.ids.size() + update.blocks.size() + update.sampler.bias.size();
    for (const Row& row : step.rows) held += row.drafts.size();
    CHECK(held <= words.size());
    CHECK(step.updates.size() + step.rows.size() <= words.size());
  }
}

MUSTER_TEST_MAIN

// What the collectives compute: the same bits as plain loops over ranks 0, 1, 2, ..., for every distribution of ranks.
#include <limits>
#include <random>

#include "comm/fold.h"
#include "harness.h"

using namespace harness;
using muster::MaxPair;

namespace {

// Values that tell one order of additions from another: denormals, huge ones that cancel, ordinary ones, both zeros.
float wild(std::mt19937_64& random) {
  const uint64_t bits = random();
  const float ordinary = static_cast<float>(static_cast<int32_t>(bits >> 32)) * 1e-7f;
  switch (bits & 7) {
    case 0: return (bits & 8 ? 1.f : -1.f) * 1e30f;
    case 1: return static_cast<float>((bits >> 8) & 0xff) * std::numeric_limits<float>::denorm_min();
    case 2: return bits & 8 ? 0.f : -0.f;
    case 3: return ordinary * 1e-38f;
    default: return ordinary;
  }
}

std::vector<std::vector<float>> inputs(uint32_t world, size_t length, uint64_t seed) {
  std::vector<std::vector<float>> all(world, std::vector<float>(length));
  for (uint32_t rank = 0; rank < world; ++rank) {
    std::mt19937_64 random(seed * 1000 + rank);
    for (float& value : all[rank]) value = wild(random);
  }
  return all;
}

std::vector<float> sequential_sum(const std::vector<std::vector<float>>& all, size_t length) {
  std::vector<float> sum(all[0].begin(), all[0].begin() + static_cast<ptrdiff_t>(length));
  for (size_t rank = 1; rank < all.size(); ++rank)
    for (size_t i = 0; i < sum.size(); ++i) sum[i] = sum[i] + all[rank][i];
  return sum;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

uint8_t byte_of(uint32_t rank, size_t i, uint64_t salt) { return static_cast<uint8_t>(rank * 101 + i * 7 + (i >> 8) + salt); }

Status check_gather(Group& group, uint32_t rank, size_t bytes, uint64_t salt) {
  std::vector<uint8_t> mine(bytes), all(bytes * group.shape.world());
  for (size_t i = 0; i < bytes; ++i) mine[i] = byte_of(rank, i, salt);
  MUSTER_TRY(group.of(rank).gather(rank, mine, all));
  for (size_t k = 0; k < all.size(); ++k)
    if (all[k] != byte_of(static_cast<uint32_t>(k / bytes), k % bytes, salt)) return Status::internal("gather", "byte " + std::to_string(k));
  return Status::ok();
}

struct Offers { std::vector<MaxPair> best; std::vector<double> second; };
Offers offers(uint32_t rank, size_t count, uint64_t salt) {
  Offers out;
  std::mt19937_64 random(salt * 64 + rank);
  for (size_t i = 0; i < count; ++i) {
    const double value = static_cast<double>(random() % 5);  // few values: many ties
    out.best.push_back({value, static_cast<uint32_t>(random() % 1000)});
    out.second.push_back(value - static_cast<double>(random() % 3));
  }
  return out;
}

Status check_max(Group& group, uint32_t rank, size_t count, uint64_t salt) {
  const bool seconds = salt % 2 == 0;
  Offers mine = offers(rank, count, salt);
  if (!seconds) mine.second.clear();
  MUSTER_TRY(group.of(rank).max(rank, mine.best, mine.second));
  std::vector<Offers> all;
  for (uint32_t r = 0; r < group.shape.world(); ++r) all.push_back(offers(r, count, salt));
  for (size_t i = 0; i < count; ++i) {
    MaxPair best = all[0].best[i];
    size_t winner = 0;
    for (size_t r = 1; r < all.size(); ++r) {
      const MaxPair& other = all[r].best[i];
      if (other.value > best.value || (other.value == best.value && other.id < best.id)) { best = other; winner = r; }
    }
    double second = all[winner].second[i];
    for (size_t r = 0; r < all.size(); ++r)
      if (r != winner) second = std::max(second, all[r].best[i].value);
    if (mine.best[i].value != best.value || mine.best[i].id != best.id) return Status::internal("max", "element " + std::to_string(i));
    if (seconds && mine.second[i] != second) return Status::internal("max", "runner-up " + std::to_string(i));
  }
  return Status::ok();
}

// Over the first `length` values of each rank.
Status check_sum(Group& group, uint32_t rank, const std::vector<std::vector<float>>& all, size_t length) {
  std::vector<float> data(all[rank].begin(), all[rank].begin() + static_cast<ptrdiff_t>(length));
  MUSTER_TRY(group.of(rank).sum(rank, data));
  return same_bits(data, sequential_sum(all, length)) ? Status::ok() : Status::internal("sum", "other bits at length " + std::to_string(data.size()));
}

}  // namespace

TEST("a sum has the bits of a sequential sum in rank order, for every distribution and length") {
  for (const Shape& shape : all_shapes()) {
    Group group = form(shape);
    for (size_t length : {0ul, 1ul, 7ul, 4096ul, 100001ul, 300000ul}) {
      const auto all = inputs(shape.world(), length, length + 1);
      if (!all_ok(group.run([&](uint32_t rank) { return check_sum(group, rank, all, length); }))) std::printf("  in %s\n", shape.name.c_str());
    }
  }
}

TEST("the data of the sum test can tell an order of additions from another") {
  auto all = inputs(4, 4096, 4097);
  const auto forward = sequential_sum(all, 4096);
  std::swap(all[0], all[3]);
  CHECK(!same_bits(forward, sequential_sum(all, 4096)));
}

TEST("gather puts every rank's bytes at its place, max finds the best pair and the runner-up") {
  for (const Shape& shape : all_shapes()) {
    Group group = form(shape);
    for (size_t count : {0ul, 1ul, 13ul, 1000ul, 50000ul}) {
      const bool good = all_ok(group.run([&](uint32_t rank) {
        MUSTER_TRY(check_gather(group, rank, count * 27, count));
        MUSTER_TRY(check_max(group, rank, count, count));
        return check_max(group, rank, count, count + 1);
      }));
      if (!good) std::printf("  in %s, %zu elements\n", shape.name.c_str(), count);
    }
  }
}

TEST("a NaN never wins a max, and equal values go to the lower id") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const muster::comm::Candidate number{-5, -7, 9, 0}, bad{nan, nan, 1, 0}, tie{-5, -6, 3, 0};
  CHECK_EQ(muster::comm::better_of(number, bad).id, 9u);
  CHECK_EQ(muster::comm::better_of(bad, number).id, 9u);
  CHECK_EQ(muster::comm::better_of(bad, number).second, -7.0);
  CHECK_EQ(muster::comm::better_of(number, tie).id, 3u);
  CHECK_EQ(muster::comm::better_of(number, tie).second, -5.0);
}

TEST("no rank leaves a barrier before the last has come") {
  for (const Shape& shape : {peers(5), workers({2, 2}), workers({3, 1, 2})}) {
    Group group = form(shape);
    std::atomic<uint32_t> came{0};
    std::atomic<uint32_t> early{0};
    CHECK(all_ok(group.run([&](uint32_t rank) {
      for (uint32_t round = 1; round <= 50; ++round) {
        came.fetch_add(1);
        MUSTER_TRY(group.of(rank).barrier(rank));
        if (came.load() < round * shape.world()) early.fetch_add(1);
        MUSTER_TRY(group.of(rank).barrier(rank));
      }
      return Status::ok();
    })));
    CHECK_EQ(early.load(), 0u);
  }
}

TEST("two thousand mixed operations in lock step") {
  for (const Shape& shape : {peers(4), workers({1, 1}), workers({2, 2}), workers({3, 1, 2})}) {
    Group group = form(shape);
    std::vector<std::vector<std::vector<float>>> data;  // a few inputs, taken in turn at varying lengths
    for (uint64_t seed = 0; seed < 4; ++seed) data.push_back(inputs(shape.world(), 60000, seed));
    const bool good = all_ok(group.run([&](uint32_t rank) {
      std::mt19937_64 random(7);  // the same on every rank
      for (uint64_t step = 1; step <= 2000; ++step) {
        if (step % 5 == 1) group.of(rank).begin(rank, step);
        const uint64_t kind = random() % 8, size = random() % (kind == 0 ? 60000 : 900);
        if (kind < 4) MUSTER_TRY(check_sum(group, rank, data[step % 4], size));
        else if (kind == 4) MUSTER_TRY(check_gather(group, rank, size, step));
        else if (kind < 7) MUSTER_TRY(check_max(group, rank, size, step));
        else MUSTER_TRY(group.of(rank).barrier(rank));
      }
      return Status::ok();
    }));
    if (!good) std::printf("  in %s\n", shape.name.c_str());
  }
}

TEST("waited_ms counts the wait for a slow rank, and begin() clears it") {
  for (const Shape& shape : {peers(2), workers({1, 1}), workers({2, 1})}) {
    Group group = form(shape);
    CHECK(all_ok(group.run([&](uint32_t rank) {
      group.of(rank).begin(rank, 1);
      if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(60));
      return group.of(rank).barrier(rank);
    })));
    CHECK(group.of(0).waited_ms(0) >= 40);
    CHECK(group.of(1).waited_ms(1) < group.of(0).waited_ms(0));
    group.of(0).begin(0, 2);
    CHECK_EQ(group.of(0).waited_ms(0), 0.0);
  }
}

MUSTER_TEST_MAIN

// The arithmetic that kernels bring along instead of libm, and the thread pool.
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/cpu_ops.h"

using namespace muster;
using namespace muster::cpu;

TEST("C4: exp is within 2 units in the last place, and the same bits in every variant") {
  std::vector<float> x;
  for (float v = -86.4f; v < 88.0f; v += 0.0137f) x.push_back(v);
  for (const float v : {0.0f, -0.0f, 1e-30f, -1e-30f, 88.0f, -86.5f}) x.push_back(v);
  std::vector<float> first;
  for (const Kernels* kernels : kernels_of_this_cpu()) {
    std::vector<float> y = x;
    kernels->exp(y.data(), y.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp(double{x[i]});
      CHECK_NEAR(y[i] / exact, 1, 2.4e-7);
    }
    if (first.empty()) first = y;
    for (size_t i = 0; i < x.size(); ++i) CHECK_EQ(std::bit_cast<uint32_t>(y[i]), std::bit_cast<uint32_t>(first[i]));
    float ends[4] = {-86.6f, -INFINITY, 1000.0f, -1e30f};
    kernels->exp(ends, 4);
    CHECK_EQ(ends[0], 0.0f);
    CHECK_EQ(ends[1], 0.0f);
    CHECK(std::isfinite(ends[2]) && ends[2] > 1e38f);
    CHECK_EQ(ends[3], 0.0f);
  }
}

TEST("silu: near its definition, finite at both ends") {
  for (const Kernels* kernels : kernels_of_this_cpu())
    for (const size_t count : {1, 15, 16, 17, 50}) {
      std::vector<float> gate(count + 1, 777), up(count + 1, 2);
      for (size_t i = 0; i < count; ++i) gate[i] = float(i) * 3.1f - 70;
      const std::vector<float> before = gate;
      kernels->silu_mul(gate.data(), up.data(), count);
      for (size_t i = 0; i < count; ++i) {
        const double exact = 2 * before[i] / (1 + std::exp(-double{before[i]}));
        CHECK_NEAR(gate[i], exact, 5e-7 * std::fabs(exact));
      }
      CHECK_EQ(gate[count], 777.0f);
      float ends[2] = {-1e30f, 1e30f}, ones[2] = {1, 1};
      kernels->silu_mul(ends, ones, 2);
      CHECK(std::fabs(ends[0]) < 1e-7f);
      CHECK_EQ(ends[1], 1e30f);
    }
}

TEST("sin_cos: within 1e-15 of libm where rotary angles are small, 1e-8 at ten million") {
  const auto check_at = [](double angle, double tolerance) {
    const SinCos turn = sin_cos(angle);
    CHECK_NEAR(turn.sine, std::sin(angle), tolerance);
    CHECK_NEAR(turn.cosine, std::cos(angle), tolerance);
  };
  for (double angle = 0; angle < 1000; angle += 0.0371) check_at(angle, 1e-15);
  for (double angle = 500000; angle < 500100; angle += 0.0371) check_at(angle, 1e-12);
  for (double angle = 10485000; angle < 10485100; angle += 0.0371) check_at(angle, 1e-8);
}

TEST("P1: every task runs once, with any number of threads and lists of any length") {
  for (const uint32_t threads : {1u, 2u, 3u, 8u}) {
    Pool pool(threads);
    CHECK_EQ(pool.threads(), threads);
    for (uint32_t round = 0; round < 3000; ++round) {
      const uint32_t count = round % 97;
      std::vector<std::atomic<uint32_t>> ran(count);
      std::atomic<uint32_t> wild{0};
      pool.run(count, uint64_t{1} << 40, [&](uint32_t task, uint32_t thread) {
        if (thread >= threads || task >= count) wild.fetch_add(1);
        else ran[task].fetch_add(1);
      });
      for (const auto& times : ran) CHECK_EQ(times.load(), 1u);
      CHECK_EQ(wild.load(), 0u);
    }
  }
}

TEST("P4: threads that went to sleep wake up for the next list") {
  Pool pool(3);
  for (int round = 0; round < 5; ++round) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(3);  // many times the spin
    while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
    std::atomic<uint32_t> ran{0};
    pool.run(64, uint64_t{1} << 40, [&](uint32_t, uint32_t) { ran.fetch_add(1); });
    CHECK_EQ(ran.load(), 64u);
  }
}

TEST("pool: a list of less work than a hand-over costs stays with the caller") {
  Pool pool(2);
  pool.run(50, 1000, [&](uint32_t, uint32_t thread) { CHECK_EQ(thread, 0u); });
}

MUSTER_TEST_MAIN

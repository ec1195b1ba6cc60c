// Sampling noise against test/fixtures/noise.txt and the known answers of Random123.
#include <bit>
#include <cmath>
#include <fstream>
#include <random>

#include "check.h"
#include "muster/noise.h"

using namespace muster;

namespace {

uint64_t hex(const std::string& text) { return std::stoull(text, nullptr, 16); }

struct Lines { int noise = 0, gumbel = 0, choice = 0, digest = 0; };

void check_line(std::ifstream& file, const std::string& kind, Lines* lines) {
  std::string low, high, bits, value;
  uint32_t index, domain, id, count;
  if (kind == "noise" && file >> low >> high >> index >> domain >> id >> bits >> value) {
    ++lines->noise;
    CHECK_EQ(noise_bits({hex(low), hex(high)}, index, domain, id), hex(bits));
    CHECK_EQ(std::bit_cast<uint64_t>(gumbel(hex(bits))), hex(value));
  } else if (kind == "gumbel" && file >> bits >> value) {
    ++lines->gumbel;
    CHECK_EQ(std::bit_cast<uint64_t>(gumbel(hex(bits))), hex(value));
    CHECK(gumbel(hex(bits)) <= gumbel_bound(hex(bits)));
  } else if (kind == "choice" && file >> low >> high >> index >> bits >> value) {
    ++lines->choice;
    const Seed seed = seed_of_choice({hex(low), hex(high)}, index);
    CHECK_EQ(seed.low, hex(bits));
    CHECK_EQ(seed.high, hex(value));
  } else if (kind == "digest" && file >> low >> high >> index >> count >> value) {
    ++lines->digest;
    uint64_t sum = 0;
    for (id = 0; id < count; ++id) sum += std::bit_cast<uint64_t>(gumbel(noise_bits({hex(low), hex(high)}, index, 0, id)));
    CHECK_EQ(sum, hex(value));
  } else {
    check::fail(__FILE__, __LINE__, "unreadable line of noise.txt: " + kind);
  }
}

}  // namespace

TEST("noise, gumbel and choice seeds equal the vectors to the bit") {
  std::ifstream file(MUSTER_ROOT "/test/fixtures/noise.txt");
  Lines lines;
  for (std::string kind; file >> kind;) check_line(file, kind, &lines);
  CHECK(lines.noise >= 200 && lines.gumbel >= 50 && lines.choice >= 40 && lines.digest >= 2);
}

TEST("Philox gives the known answers of Random123") {
  CHECK_EQ(noise_bits({0, 0}, 0, 0, 0), 0xe169c58d6627e8d5u);
  CHECK_EQ(noise_bits({0, 0}, 0, 0, 1), 0x9b00dbd8bc57ac4cu);
  const Seed ones{UINT64_MAX, UINT64_MAX};
  CHECK_EQ(noise_bits(ones, UINT32_MAX, 255, 0x1fffffe), 0x41c83b0e408f276du);
  CHECK_EQ(noise_bits(ones, UINT32_MAX, 255, 0x1ffffff), 0x6d5451fda20bc7c6u);
  const Seed pi{0x299f31d0a4093822u, 0x0370734413198a2eu};
  CHECK_EQ(noise_bits(pi, 0x243f6a88, 0x85, 2 * 0xa308d3), 0x94fdccebd16cfe09u);
}

TEST("the uniform is inside (0, 1) at both ends") {
  CHECK_EQ(noise_uniform(0), 0x1p-53);
  CHECK_EQ(noise_uniform(UINT64_MAX), 1 - 0x1p-53);
  CHECK_EQ(noise_uniform(0xfff), noise_uniform(0));  // the low 12 bits do not count
  CHECK(std::isfinite(gumbel(0)) && std::isfinite(gumbel(UINT64_MAX)));
}

TEST("the logarithm is within 2 ulp over the whole range of normal doubles") {
  CHECK_EQ(log_exact(1.0), 0.0);
  std::mt19937_64 random(5);
  double worst = 0;
  for (int i = 0; i < 300000; ++i) {
    const double x = std::bit_cast<double>(random() % (0x7ff0000000000000u - 0x0010000000000000u) + 0x0010000000000000u);
    const double near_one = 1 + std::ldexp(static_cast<double>(static_cast<int64_t>(random())), -64 - static_cast<int>(random() % 40));
    for (const double value : {x, near_one}) {
      const long double truth = std::log(static_cast<long double>(value));
      const double size = std::fabs(static_cast<double>(truth)), ulp = std::nextafter(size, INFINITY) - size;
      if (value != 1) worst = std::max(worst, static_cast<double>(std::fabs(log_exact(value) - truth)) / ulp);
    }
  }
  CHECK(worst < 2);
}

TEST("the bound is never below the noise, and within e-fold steps of it") {
  std::mt19937_64 random(9);
  for (int i = 0; i < 500000; ++i) {
    const uint64_t any = random();
    const int shift = static_cast<int>(any & 63);
    for (const uint64_t bits : {any, any | ~uint64_t{0} << shift, ~uint64_t{0} << shift, ~(uint64_t{1} << shift), any >> shift})
      if (!(gumbel(bits) <= gumbel_bound(bits))) { CHECK_EQ(bits, 0u); return; }
  }
  // Where the noise is large the bound is tight: less than one factor of two of 1 - u above it.
  CHECK(gumbel_bound(UINT64_MAX) - gumbel(UINT64_MAX) < 1e-9);
  CHECK(gumbel_bound(~(uint64_t{1} << 40)) - gumbel(~(uint64_t{1} << 40)) < 0.7);
}

TEST("choice 0 keeps the seed; other choices and other seeds differ") {
  const Seed seed{123, 456};
  CHECK(seed_of_choice(seed, 0).low == 123 && seed_of_choice(seed, 0).high == 456);
  for (uint32_t i = 0; i < 8; ++i)
    for (uint32_t j = 0; j < i; ++j) CHECK(seed_of_choice(seed, i).low != seed_of_choice(seed, j).low);
  CHECK(seed_of_choice({124, 456}, 1).low != seed_of_choice(seed, 1).low);
}

MUSTER_TEST_MAIN

#include "comm/fold.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace muster::comm {

void add_in_order(std::span<const float* const> sources, std::span<float> out) {
  constexpr size_t block = 1024;  // 4 KiB of partial sums stay in L1 while the sources stream by
  float sum[block];
  for (size_t first = 0; first < out.size(); first += block) {
    const size_t count = std::min(block, out.size() - first);
    std::memcpy(sum, sources[0] + first, count * sizeof(float));
    for (const float* source : sources.subspan(1))
      for (size_t i = 0; i < count; ++i) sum[i] += source[first + i];
    std::memcpy(out.data() + first, sum, count * sizeof(float));
  }
}

namespace {
double larger(double a, double b) { return std::isnan(a) || b > a ? b : a; }
}  // namespace

Candidate better_of(const Candidate& a, const Candidate& b) {
  const bool tie = a.value == b.value || (std::isnan(a.value) && std::isnan(b.value));
  const bool b_wins = tie ? b.id < a.id : std::isnan(a.value) || b.value > a.value;
  const Candidate& winner = b_wins ? b : a;
  const Candidate& loser = b_wins ? a : b;
  return {winner.value, larger(larger(winner.second, loser.second), loser.value), winner.id, 0};
}

}  // namespace muster::comm

// Sines and cosines of rotary positions, and the query temperature. Owns the small table of the running step; the same step asks
// once for each layer. No libm: additions, multiplications and divisions in a stated order, the same bits on every machine.
#pragma once
#include <span>
#include <vector>

#include "cpu/memory.h"
#include "cpu/pool.h"
#include "exec/op_table.h"

namespace muster::cpu {

struct SinCos { double sine, cosine; };
// Within 1e-9 for |angle| < 2^24, 1e-15 for |angle| < 2^19.
SinCos sin_cos(double angle);

// 1 + scale * ln(1 + floor((p + 1) / floor_scale)); 1 where it is off.
double temperature(const RopeDesc& desc, uint32_t position);

class Rotations {
 public:
  // Of all tokens: [tokens][dims / 2] pairs (cosine, sine). Kept until a batch or a layer with other positions or frequencies asks.
  Status table(const RopeDesc& desc, const Batch& batch, Pool& pool, const float** out);

 private:
  struct Entry {
    std::vector<uint32_t> positions;
    std::vector<float> frequencies;
    Buffer values;
  };
  static constexpr size_t entries_max = 2;  // models have at most two rotary bases (global and local layers)
  Entry entries_[entries_max];
  size_t next_ = 0;
};

}  // namespace muster::cpu

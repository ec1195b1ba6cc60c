#include "cpu/rotation.h"

#include <algorithm>
#include <cmath>

#include "muster/noise.h"

namespace muster::cpu {

// fdlibm's kernels after a three-part Cody-Waite reduction by pi/2; the first part has 33 bits, so its product with a quotient
// below 2^20 is exact.
SinCos sin_cos(double angle) {
  constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer
  const double shifted = angle * 6.36619772367581382433e-01 + shift;
  const double quotient = shifted - shift;
  const double x = ((angle - quotient * 1.57079632673412561417e+00) - quotient * 6.07710050630396597660e-11) - quotient * 2.02226624871116645580e-21;
  const double z = x * x;
  const double s = x + x * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 +
                   z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double c = 1.0 - 0.5 * z + z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 +
                   z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  switch (static_cast<int64_t>(quotient) & 3) {
    case 0: return {s, c};
    case 1: return {c, -s};
    case 2: return {-s, -c};
    default: return {-c, s};
  }
}

double temperature(const RopeDesc& desc, uint32_t position) {
  if (desc.temperature_scale == 0 || desc.temperature_floor == 0) return 1;
  const uint64_t steps = (uint64_t{position} + 1) / desc.temperature_floor;
  return steps == 0 ? 1 : 1 + desc.temperature_scale * log_exact(static_cast<double>(1 + steps));
}

Status Rotations::table(const RopeDesc& desc, const Batch& batch, Pool& pool, const float** out) {
  const std::span<const uint32_t> positions(batch.positions, batch.tokens);
  const std::span<const float> frequencies = desc.frequencies.first(desc.dims / 2);
  for (const Entry& entry : entries_) {
    if (!std::ranges::equal(entry.positions, positions) || !std::ranges::equal(entry.frequencies, frequencies)) continue;
    *out = entry.values.floats();
    return Status::ok();
  }
  Entry& entry = entries_[next_];
  next_ = (next_ + 1) % entries_max;
  const size_t pairs = frequencies.size();
  MUSTER_TRY(entry.values.reserve("rotary table", std::max<uint64_t>(1, batch.tokens * pairs) * 2 * sizeof(float)));
  entry.positions.assign(positions.begin(), positions.end());  // vectors keep their room: no allocation after the widest step
  entry.frequencies.assign(frequencies.begin(), frequencies.end());
  float* values = entry.values.floats();
  pool.run(batch.tokens, uint64_t{batch.tokens} * pairs * 64, [&](uint32_t t, uint32_t) {
    for (size_t j = 0; j < pairs; ++j) {
      const float angle = static_cast<float>(positions[t]) * frequencies[j];  // the f32 product that checkpoints were trained with
      const SinCos turn = sin_cos(angle);
      values[(t * pairs + j) * 2] = static_cast<float>(turn.cosine);
      values[(t * pairs + j) * 2 + 1] = static_cast<float>(turn.sine);
    }
  });
  *out = values;
  return Status::ok();
}

}  // namespace muster::cpu

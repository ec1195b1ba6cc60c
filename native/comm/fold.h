// The arithmetic of the collectives: how values of several ranks become one. Element by element, in rank order, so that
// pieces, slices and transports cannot change a bit.
#pragma once
#include <cstdint>
#include <span>

namespace muster::comm {

// out[i] = ((sources[0][i] + sources[1][i]) + sources[2][i]) + ..., in f32. `out` overlaps no source.
void add_in_order(std::span<const float* const> sources, std::span<float> out);

// A rank's candidate with its runner-up: what a max sends. Padding is a field, so that no stray byte leaves the process.
struct Candidate { double value, second; uint32_t id, zero; };

// Better value first, ties to the lower id; a NaN loses to every number. The runner-up is the best value of all that did
// not win.
Candidate better_of(const Candidate& a, const Candidate& b);

}  // namespace muster::comm

// From logits to a token: processors, noise, filters, log-probabilities. Host code that every backend shares; pure functions
// of logits, ids and seed. Order: bias, repetition, presence and frequency, temperature, top_k, top_p, min_p.
//
//   S1  score = (double)processed / (double)temperature + gumbel(noise_bits(seed, index, 0, id)), compared in f64; ties go to
//       the lower id. Temperature 0: the largest processed logit.
//   S2  what a part of the vocabulary contributes depends on that part alone, unless there are filters: so the best over
//       parts is the best of all.
//   S3  no library exponential or logarithm: the same bits on every machine.
#pragma once
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "muster/engine.h"
#include "muster/noise.h"

namespace muster {

// Which ids a sequence holds, for the penalties. Reused over sequences: start() forgets the last one.
class Penalties {
 public:
  explicit Penalties(uint32_t vocab) : mark_(vocab, 0), count_(vocab, 0) {}
  void start(std::span<const uint32_t> ids, uint32_t generated_from);
  void add(uint32_t id, bool generated);
  // In place on logits of ids [first, first + logits.size()).
  void apply(const Sampler& sampler, uint32_t first, std::span<float> logits) const;
  static bool wanted(const Sampler& s) { return s.repetition != 1 || s.presence != 0 || s.frequency != 0; }

 private:
  std::vector<uint8_t> mark_;     // the id is in the sequence
  std::vector<uint32_t> count_;   // times it was generated
  std::vector<uint32_t> touched_;
};

void apply_bias(const Sampler& sampler, uint32_t first, std::span<float> logits);

struct Noise { Seed seed; uint32_t index = 0; };  // index of the token being chosen, in its sequence

struct Best {
  double value = -std::numeric_limits<double>::infinity();
  uint32_t id = std::numeric_limits<uint32_t>::max();
  double second = -std::numeric_limits<double>::infinity();
  bool found() const { return id != std::numeric_limits<uint32_t>::max(); }
};
// Over processed logits of ids [first, first + logits.size()), without filters. `second` is exact only where asked.
Best best_of(std::span<const float> logits, uint32_t first, float temperature, const Noise& noise, bool wants_second);
// The same with top_k, top_p and min_p; needs the whole vocabulary. The sampler's temperature is above 0.
Best best_filtered(std::span<const float> logits, const Sampler& sampler, const Noise& noise);

// Natural logarithm of the softmax of raw logits: of `id`, and of the `count` best (ties to the lower id).
void log_probabilities(std::span<const float> raw, uint32_t id, uint32_t count, TokenDetail* out);

double exp_exact(double x);  // x <= 0

}  // namespace muster

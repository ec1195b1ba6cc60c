#include "exec/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace muster {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kGumbelMax = 36.75;  // above -log(-log(1 - 2^-53)) = 36.7368

void offer(double value, uint32_t id, Best* best) {
  if (value > best->value || (value == best->value && id < best->id)) {
    best->second = best->value;
    best->value = value;
    best->id = id;
  } else if (value > best->second) {
    best->second = value;
  }
}

// Evaluates the noise of an id only where its bound can reach what has to be beaten.
class NoisyBest {
 public:
  NoisyBest(float temperature, const Noise& noise, bool wants_second) : temperature_(temperature), noise_(noise), wants_second_(wants_second) {}
  void try_id(float logit, uint32_t id) {
    const double base = double(logit) / temperature_;
    const double reach = wants_second_ ? best.second : best.value;
    if (!(base > -kInfinity) || !(base + kGumbelMax >= reach)) return;  // NaN as well
    const uint64_t bits = noise_bits(noise_.seed, noise_.index, 0, id);
    if (base + gumbel_bound(bits) >= reach) offer(base + gumbel(bits), id, &best);
  }
  Best best;

 private:
  double temperature_;
  const Noise& noise_;
  bool wants_second_;
};

uint32_t largest(std::span<const float> logits) {
  uint32_t at = 0;
  float value = -std::numeric_limits<float>::infinity();
  for (uint32_t i = 0; i < logits.size(); ++i)
    if (logits[i] > value) value = logits[i], at = i;
  return at;
}

struct Candidates {
  std::span<const float> logits;
  std::vector<uint32_t> ids;
  bool better(uint32_t a, uint32_t b) const { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); }

  void keep_best(uint32_t count) {
    if (count == 0 || count >= ids.size()) return;
    std::nth_element(ids.begin(), ids.begin() + count, ids.end(), [this](uint32_t a, uint32_t b) { return better(a, b); });
    ids.resize(count);
    std::sort(ids.begin(), ids.end());  // sums below run in id order
  }
  double weight(uint32_t id, float top, double temperature) const { return exp_exact((double(logits[id]) - double(top)) / temperature); }

  // The shortest prefix, best first, whose share of the weights reaches p.
  void keep_nucleus(double p, float top, double temperature) {
    double total = 0;
    for (const uint32_t id : ids) total += weight(id, top, temperature);
    const auto worse = [this](uint32_t a, uint32_t b) { return better(b, a); };
    std::make_heap(ids.begin(), ids.end(), worse);
    double sum = 0;
    size_t kept = 0;
    while (kept < ids.size() && !(sum >= p * total)) {
      std::pop_heap(ids.begin(), ids.end() - std::ptrdiff_t(kept), worse);
      ++kept;
      sum += weight(ids[ids.size() - kept], top, temperature);
    }
    ids.erase(ids.begin(), ids.end() - std::ptrdiff_t(std::max<size_t>(kept, 1)));
  }
  void keep_likely(double share, float top, double temperature) {
    std::erase_if(ids, [&](uint32_t id) { return !(weight(id, top, temperature) >= share); });
  }
};

}  // namespace

void Penalties::start(std::span<const uint32_t> ids, uint32_t generated_from) {
  for (const uint32_t id : touched_) mark_[id] = 0, count_[id] = 0;
  touched_.clear();
  for (size_t i = 0; i < ids.size(); ++i) add(ids[i], i >= generated_from);
}

void Penalties::add(uint32_t id, bool generated) {
  if (!mark_[id]) touched_.push_back(id);
  mark_[id] = 1;
  count_[id] += generated;
}

void Penalties::apply(const Sampler& sampler, uint32_t first, std::span<float> logits) const {
  for (const uint32_t id : touched_) {
    if (id < first || id - first >= logits.size()) continue;
    float& logit = logits[id - first];
    if (sampler.repetition != 1) logit = logit > 0 ? logit / sampler.repetition : logit * sampler.repetition;
    if (count_[id]) logit -= sampler.presence + sampler.frequency * float(count_[id]);
  }
}

void apply_bias(const Sampler& sampler, uint32_t first, std::span<float> logits) {
  for (const LogitBias& entry : sampler.bias)
    if (entry.id >= first && entry.id - first < logits.size()) logits[entry.id - first] += entry.bias;
}

Best best_of(std::span<const float> logits, uint32_t first, float temperature, const Noise& noise, bool wants_second) {
  if (logits.empty()) return {};
  if (temperature == 0) {
    Best best;
    for (uint32_t i = 0; i < logits.size(); ++i)
      if (double(logits[i]) > -kInfinity) offer(double(logits[i]), first + i, &best);
    return best;
  }
  NoisyBest search(temperature, noise, wants_second);
  // The largest logit first: its score lets most of the others be refused unseen.
  const uint32_t top = largest(logits);
  search.try_id(logits[top], first + top);
  for (uint32_t i = 0; i < logits.size(); ++i)
    if (i != top) search.try_id(logits[i], first + i);
  return search.best;
}

Best best_filtered(std::span<const float> logits, const Sampler& sampler, const Noise& noise) {
  Candidates candidates{logits, {}};
  for (uint32_t id = 0; id < logits.size(); ++id)
    if (double(logits[id]) > -kInfinity) candidates.ids.push_back(id);
  if (candidates.ids.empty()) return {};
  const float top = logits[largest(logits)];
  const double temperature = sampler.temperature;
  candidates.keep_best(sampler.top_k);
  if (sampler.top_p < 1) candidates.keep_nucleus(sampler.top_p, top, temperature);
  if (sampler.min_p > 0) candidates.keep_likely(sampler.min_p, top, temperature);
  NoisyBest search(sampler.temperature, noise, true);
  for (const uint32_t id : candidates.ids) search.try_id(logits[id], id);
  return search.best;
}

void log_probabilities(std::span<const float> raw, uint32_t id, uint32_t count, TokenDetail* out) {
  const double top = raw[largest(raw)];
  double sum = 0;
  for (const float logit : raw)
    if (double(logit) > -kInfinity) sum += exp_exact(double(logit) - top);
  const double norm = top + log_exact(sum);
  out->logprob = float(double(raw[id]) - norm);
  Candidates candidates{raw, {}};
  for (uint32_t i = 0; i < raw.size(); ++i)
    if (double(raw[i]) > -kInfinity) candidates.ids.push_back(i);
  candidates.keep_best(count);
  if (count < candidates.ids.size()) candidates.ids.resize(count);  // count 0
  std::sort(candidates.ids.begin(), candidates.ids.end(), [&](uint32_t a, uint32_t b) { return candidates.better(a, b); });
  for (const uint32_t best : candidates.ids) out->top.push_back({best, float(double(raw[best]) - norm)});
}

double exp_exact(double x) {
  if (!(x > -745)) return 0;
  // x = k ln 2 + r with |r| <= ln 2 / 2; the two parts of ln 2 keep k * high exact.
  constexpr double high = 0x1.62e42fee00000p-1, low = 0x1.a39ef35793c76p-33, inverse = 0x1.71547652b82fep+0;
  const double k = std::nearbyint(x * inverse);
  const double r = (x - k * high) - k * low;
  double sum = 1;
  for (int n = 14; n >= 1; --n) sum = 1 + sum * r / n;
  const int exponent = int(k);
  if (exponent >= -1022) return sum * std::bit_cast<double>(uint64_t(1023 + exponent) << 52);
  return sum * std::bit_cast<double>(uint64_t(1023 + exponent + 128) << 52) * 0x1p-128;
}

}  // namespace muster

// Feed-forward blocks and expert routing of the reference backend.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ref/ref_ops.h"

namespace muster::ref {
namespace {

double silu(double x) { return x / (1 + std::exp(-x)); }

// out[i] = silu(gate . in) * (up . in); gate rows come first.
void activate(const RefWeight& gate_up, const float* in, float* out) {
  const uint64_t ffn = gate_up.rows / 2;
  for (uint64_t i = 0; i < ffn; ++i) {
    const float gate = static_cast<float>(dot(gate_up.row(i), in, gate_up.cols));
    const float up = static_cast<float>(dot(gate_up.row(ffn + i), in, gate_up.cols));
    out[i] = static_cast<float>(silu(gate) * up);
  }
}

// The k best of `logits` in order, ties to the lower id; the gap from the k-th to the best that was left out.
void choose(std::span<const float> logits, std::span<uint32_t> chosen, float* gap) {
  const auto is_better = [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; };
  const auto is_chosen = [&](uint32_t id, size_t count) {
    const auto end = chosen.begin() + static_cast<std::ptrdiff_t>(count);
    return std::find(chosen.begin(), end, id) != end;
  };
  const uint32_t none = static_cast<uint32_t>(logits.size());
  uint32_t best = none;
  for (size_t k = 0; k <= chosen.size(); ++k) {
    best = none;
    for (uint32_t id = 0; id < logits.size(); ++id)
      if (!is_chosen(id, k) && (best == none || is_better(id, best))) best = id;
    if (k < chosen.size()) chosen[k] = best;
  }
  *gap = best == none ? std::numeric_limits<float>::infinity() : logits[chosen.back()] - logits[best];
}

}  // namespace

Status RefOps::dense_ffn(const Weight& gate_up, const Weight& down, uint32_t tokens, Rows in, Rows out) {
  const RefWeight& w = as_ref(gate_up);
  const RefWeight& d = as_ref(down);
  if (w.rows != 2 * uint64_t{d.cols})
    return Status::internal("dense_ffn", "gate and up have " + std::to_string(w.rows) + " rows for " + std::to_string(d.cols) + " down columns");
  for (uint64_t t = 0; t < tokens; ++t) {
    activate(w, static_cast<const float*>(in) + t * w.cols, activation_.get());
    float* to = static_cast<float*>(out) + t * d.rows;
    for (uint64_t r = 0; r < d.rows; ++r) to[r] = static_cast<float>(dot(d.row(r), activation_.get(), d.cols));
  }
  return Status::ok();
}

Status RefOps::route(const Weight& router, RouterScore score, uint32_t top_k, uint32_t tokens, Rows in, const RouteResult& out) {
  if (score != RouterScore::sigmoid_input)
    return Status::unsupported("router score", "number " + std::to_string(static_cast<int>(score)) + "; only sigmoid_input is implemented");
  const RefWeight& w = as_ref(router);
  if (top_k == 0 || top_k > w.rows)
    return Status::internal("route", "chooses " + std::to_string(top_k) + " of " + std::to_string(w.rows) + " experts");
  for (uint64_t t = 0; t < tokens; ++t) {
    const std::span<float> logits(scaled_.get(), w.rows);
    const float* from = static_cast<const float*>(in) + t * w.cols;
    for (uint64_t e = 0; e < w.rows; ++e) logits[e] = static_cast<float>(dot(w.row(e), from, w.cols));
    const std::span<uint32_t> chosen = out.expert.subspan(t * top_k, top_k);
    choose(logits, chosen, &out.gap[t]);
    for (uint32_t k = 0; k < top_k; ++k) out.weight[t * top_k + k] = static_cast<float>(1 / (1 + std::exp(-double{logits[chosen[k]]})));
  }
  return Status::ok();
}

// sum += what one expert adds for a token.
void RefOps::add_expert(const ExpertsDesc& desc, uint64_t choice, const float* in) {
  const RefWeight& gate_up = as_ref(*desc.gate_up[desc.expert[choice]]);
  const RefWeight& down = as_ref(*desc.down[desc.expert[choice]]);
  const double weight = desc.weight[choice];
  const bool on_input = desc.score == RouterScore::sigmoid_input;
  for (uint64_t c = 0; c < gate_up.cols; ++c) scaled_[c] = static_cast<float>((on_input ? weight : 1) * in[c]);
  activate(gate_up, scaled_.get(), activation_.get());
  for (uint64_t r = 0; r < down.rows; ++r) {
    const float output = static_cast<float>(dot(down.row(r), activation_.get(), down.cols));
    sum_[r] += (on_input ? 1 : weight) * output;
  }
}

Status RefOps::experts(const ExpertsDesc& desc, uint32_t tokens, Rows in, Rows out) {
  for (uint64_t t = 0; t < tokens; ++t) {
    uint64_t hidden = 0;  // 0 until the token meets an expert of this rank
    for (uint64_t choice = t * desc.top_k; choice < (t + 1) * desc.top_k; ++choice) {
      const uint32_t expert = desc.expert[choice];
      if (expert >= desc.gate_up.size())
        return Status::internal("experts", "expert " + std::to_string(expert) + " of " + std::to_string(desc.gate_up.size()));
      if (!desc.gate_up[expert]) continue;
      if (hidden == 0) {
        hidden = desc.gate_up[expert]->cols;
        std::fill_n(sum_.get(), hidden, 0.0);
      }
      add_expert(desc, choice, static_cast<const float*>(in) + t * hidden);
    }
    float* to = static_cast<float*>(out) + t * hidden;
    for (uint64_t r = 0; r < hidden; ++r) to[r] = static_cast<float>(to[r] + sum_[r]);
  }
  return Status::ok();
}

}  // namespace muster::ref

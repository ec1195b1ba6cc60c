// Products of weights and rows: linear, head, the dense FFN and the experts.
//
//   M1  a list of tasks is (panel group, slice of tokens), for experts (expert, panel group): two lists in a MoE layer, one for
//       gate and up, one for down, no barrier between experts.
//   M2  expert outputs are added in slot order, first to each other, then to `out`.
#include <algorithm>
#include <limits>

#include "cpu/cpu_ops.h"

namespace muster::cpu {
namespace {

constexpr uint32_t none = std::numeric_limits<uint32_t>::max();
constexpr uint32_t slice_tokens_min = 32;  // below it unpacking the weights again costs more than a core gains

uint64_t work_of(const CpuWeight& weight, uint64_t tokens) { return tokens * weight.rows * weight.cols; }

// The i-th of `cut` nearly equal runs of tokens.
struct Cut { uint32_t begin, end; };
Cut cut_of(uint32_t tokens, uint32_t i, uint32_t cut) {
  return {uint32_t(uint64_t{tokens} * i / cut), uint32_t(uint64_t{tokens} * (i + 1) / cut)};
}

// Fills `chosen`, best first; returns the gap from its last to the best that was left out.
float choose(std::span<const float> logits, std::span<uint32_t> chosen) {
  uint32_t best = none;
  for (size_t k = 0; k <= chosen.size(); ++k) {
    const auto taken = chosen.begin() + std::ptrdiff_t(k);
    best = none;
    for (uint32_t e = 0; e < logits.size(); ++e)
      if ((best == none || logits[e] > logits[best]) && std::find(chosen.begin(), taken, e) == taken) best = e;
    if (k < chosen.size()) chosen[k] = best;
  }
  return best == none ? std::numeric_limits<float>::infinity() : logits[chosen.back()] - logits[best];
}

Status bad_expert(uint32_t id, size_t experts) {
  return Status::internal("experts", "expert " + std::to_string(id) + " of " + std::to_string(experts));
}

}  // namespace

void CpuOps::multiply_group(const Product& product, uint32_t group, Slice slice, uint32_t thread) {
  const CpuWeight& weight = *product.weight;
  const PanelGroup& panels = weight.groups[group];
  kernels_.linear({&weight.parts[panels.part].layout, &weight.panels[panels.first], panels.count, slice.end - slice.begin,
                   product.x + slice.begin * product.x_stride, product.x_stride, product.out + slice.begin * product.out_stride,
                   product.out_stride, thread_scratch(thread)});
}

uint32_t CpuOps::slices(uint32_t groups, uint32_t tokens) const {
  const uint32_t wanted = 4 * pool_.threads();
  if (pool_.threads() == 1 || groups >= wanted || tokens < 2 * slice_tokens_min) return 1;
  return std::min(tokens / slice_tokens_min, (wanted + groups - 1) / groups);
}

Status CpuOps::multiply(const Product& product) {
  if (product.weight->padded) return multiply_padded(product);
  const uint32_t groups = uint32_t(product.weight->groups.size()), cut = slices(groups, product.tokens);
  pool_.run(groups * cut, work_of(*product.weight, product.tokens), [&](uint32_t task, uint32_t thread) {
    const Cut tokens = cut_of(product.tokens, task / groups, cut);
    multiply_group(product, task % groups, {tokens.begin, tokens.end}, thread);
  });
  return Status::ok();
}

// Cuts inside a code group: x is written with zeros around it, once for each part that wants it differently.
Status CpuOps::multiply_padded(const Product& product) {
  const CpuWeight& weight = *product.weight;
  for (uint32_t index = 0; index < weight.parts.size(); ++index) {
    const Part& part = weight.parts[index];
    const size_t k = part.layout.k;
    MUSTER_TRY(padded_.reserve("padded input", product.tokens * k * sizeof(float)));
    for (uint32_t t = 0; t < product.tokens; ++t) {
      float* to = padded_.floats() + t * k;
      std::fill_n(to, part.lead, 0.0f);
      std::copy_n(product.x + t * product.x_stride, weight.cols, to + part.lead);
      std::fill(to + part.lead + weight.cols, to + k, 0.0f);
    }
    Product padded = product;
    padded.x = padded_.floats();
    padded.x_stride = k;
    const uint32_t groups = uint32_t(weight.groups.size());
    pool_.run(groups, work_of(weight, product.tokens), [&](uint32_t group, uint32_t thread) {
      if (weight.groups[group].part == index) multiply_group(padded, group, {0, product.tokens}, thread);
    });
  }
  return Status::ok();
}

Status CpuOps::linear(const Weight& weight, uint32_t tokens, Rows in, Rows out) {
  const float* x = static_cast<const float*>(in);
  return multiply({static_cast<const CpuWeight*>(&weight), tokens, x, static_cast<float*>(out), weight.cols, weight.rows});
}

Status CpuOps::head(const Weight& head, std::span<const uint32_t> tokens, Rows in, std::span<float> logits) {
  const size_t cols = head.cols, count = tokens.size();
  if (logits.size() != count * head.rows)
    return Status::internal("head", "room for " + std::to_string(logits.size()) + " logits, not " + std::to_string(count * head.rows));
  if (count == 0) return Status::ok();
  const float* x = static_cast<const float*>(in);
  bool consecutive = true;
  for (size_t i = 0; i < count; ++i) consecutive = consecutive && tokens[i] == tokens[0] + i;
  if (consecutive) {
    x += tokens[0] * cols;
  } else {
    MUSTER_TRY(picked_.reserve("head input", count * cols * sizeof(float)));
    for (size_t i = 0; i < count; ++i) std::copy_n(x + tokens[i] * cols, cols, picked_.floats() + i * cols);
    x = picked_.floats();
  }
  return multiply({static_cast<const CpuWeight*>(&head), uint32_t(count), x, logits.data(), cols, head.rows});
}

// Gate and up of one panel group, then silu(gate) * up while both are near.
void CpuOps::gate_group(const Product& product, uint32_t group, Slice slice, uint32_t thread) {
  const CpuWeight& weight = *product.weight;
  multiply_group(product, group, slice, thread);
  multiply_group(product, group + uint32_t(weight.groups.size() / 2), slice, thread);
  const PanelGroup& panels = weight.groups[group];
  const Panel &first = weight.panels[panels.first], &last = weight.panels[panels.first + panels.count - 1];
  for (uint32_t t = slice.begin; t < slice.end; ++t) {
    float* gate = product.out + t * product.out_stride + first.row;
    kernels_.silu_mul(gate, gate + weight.rows / 2, last.row + last.rows - first.row);
  }
}

Status CpuOps::gate_up(const Product& product) {
  const CpuWeight& weight = *product.weight;
  if (weight.padded || !weight.paired) {
    MUSTER_TRY(multiply(product));
    pool_.run(product.tokens, uint64_t{product.tokens} * weight.rows * 8, [&](uint32_t t, uint32_t) {
      float* gate = product.out + t * product.out_stride;
      kernels_.silu_mul(gate, gate + weight.rows / 2, weight.rows / 2);
    });
    return Status::ok();
  }
  const uint32_t groups = uint32_t(weight.groups.size() / 2), cut = slices(groups, product.tokens);
  pool_.run(groups * cut, work_of(weight, product.tokens), [&](uint32_t task, uint32_t thread) {
    const Cut tokens = cut_of(product.tokens, task / groups, cut);
    gate_group(product, task % groups, {tokens.begin, tokens.end}, thread);
  });
  return Status::ok();
}

Status CpuOps::dense_ffn(const Weight& gate_up_weight, const Weight& down, uint32_t tokens, Rows in, Rows out) {
  const size_t both = gate_up_weight.rows;
  if (both != 2 * size_t{down.cols})
    return Status::internal("dense_ffn", std::to_string(both) + " gate and up rows for " + std::to_string(down.cols) + " down columns");
  MUSTER_TRY(gated_.reserve("ffn rows", tokens * both * sizeof(float)));
  float* gated = gated_.floats();
  const float* x = static_cast<const float*>(in);
  MUSTER_TRY(gate_up({static_cast<const CpuWeight*>(&gate_up_weight), tokens, x, gated, gate_up_weight.cols, both}));
  return multiply({static_cast<const CpuWeight*>(&down), tokens, gated, static_cast<float*>(out), both, down.rows});
}

// Sorts slots by expert: runs_, slot_row_, and the (scaled) inputs side by side.
Status CpuOps::gather(const ExpertsDesc& desc, uint32_t tokens, const float* in) {
  const size_t slots = size_t{tokens} * desc.top_k, experts = desc.gate_up.size();
  expert_rows_.assign(experts, 0);
  for (size_t slot = 0; slot < slots; ++slot) {
    if (desc.expert[slot] >= experts) return bad_expert(desc.expert[slot], experts);
    if (desc.gate_up[desc.expert[slot]]) ++expert_rows_[desc.expert[slot]];
  }
  runs_.clear();
  uint32_t first = 0;
  for (size_t e = 0; e < experts; ++e) {
    const uint32_t count = expert_rows_[e];
    if (count) runs_.push_back({static_cast<const CpuWeight*>(desc.gate_up[e]), static_cast<const CpuWeight*>(desc.down[e]), first, count});
    expert_rows_[e] = first;
    first += count;
  }
  slot_row_.assign(slots, none);
  if (runs_.empty()) return Status::ok();
  const size_t hidden = runs_[0].gate_up->cols, both = runs_[0].gate_up->rows;
  MUSTER_TRY(expert_in_.reserve("expert input", first * hidden * sizeof(float)));
  MUSTER_TRY(expert_out_.reserve("expert output", first * hidden * sizeof(float)));
  MUSTER_TRY(gated_.reserve("ffn rows", first * both * sizeof(float)));
  for (size_t slot = 0; slot < slots; ++slot)
    if (desc.gate_up[desc.expert[slot]]) slot_row_[slot] = expert_rows_[desc.expert[slot]]++;
  pool_.run(uint32_t(slots), slots * hidden * 2, [&](uint32_t slot, uint32_t) {
    if (slot_row_[slot] == none) return;
    const float* x = in + slot / desc.top_k * hidden;
    float* to = expert_in_.floats() + slot_row_[slot] * hidden;
    const float scale = desc.score == RouterScore::sigmoid_input ? desc.weight[slot] : 1.0f;
    for (size_t c = 0; c < hidden; ++c) to[c] = scale * x[c];
  });
  return Status::ok();
}

CpuOps::Product CpuOps::expert_product(const ExpertRun& run, Half half) const {
  const size_t hidden = run.gate_up->cols, both = run.gate_up->rows;
  float* gated = gated_.floats() + run.first * both;
  if (half == Half::gate_up) return {run.gate_up, run.count, expert_in_.floats() + run.first * hidden, gated, hidden, both};
  return {run.down, run.count, gated, expert_out_.floats() + run.first * hidden, both, hidden};
}

Status CpuOps::run_experts(Half half) {
  uint32_t tasks = 0;
  uint64_t work = 0;
  run_tasks_.clear();
  for (const ExpertRun& run : runs_) {
    const CpuWeight& weight = half == Half::down ? *run.down : *run.gate_up;
    run_tasks_.push_back(tasks);
    if (weight.padded || (half == Half::gate_up && !weight.paired)) {  // rare shapes: expert by expert, no task in the list
      MUSTER_TRY(half == Half::down ? multiply(expert_product(run, half)) : gate_up(expert_product(run, half)));
      continue;
    }
    tasks += uint32_t(weight.groups.size()) / (half == Half::gate_up ? 2 : 1);
    work += work_of(weight, run.count);
  }
  pool_.run(tasks, work, [&](uint32_t task, uint32_t thread) {
    const size_t i = size_t(std::upper_bound(run_tasks_.begin(), run_tasks_.end(), task) - run_tasks_.begin()) - 1;
    const Product product = expert_product(runs_[i], half);
    if (half == Half::down) multiply_group(product, task - run_tasks_[i], {0, product.tokens}, thread);
    else gate_group(product, task - run_tasks_[i], {0, product.tokens}, thread);
  });
  return Status::ok();
}

void CpuOps::combine(const ExpertsDesc& desc, uint32_t tokens, float* out) {
  const size_t hidden = runs_[0].gate_up->cols;
  const bool on_input = desc.score == RouterScore::sigmoid_input;
  pool_.run(tokens, uint64_t{tokens} * desc.top_k * hidden * 2, [&](uint32_t t, uint32_t) {
    float* sum = nullptr;  // the first slot's row takes the others in
    for (size_t slot = size_t{t} * desc.top_k; slot < size_t{t + 1} * desc.top_k; ++slot) {
      if (slot_row_[slot] == none) continue;
      float* row = expert_out_.floats() + slot_row_[slot] * hidden;
      const float scale = on_input ? 1.0f : desc.weight[slot];
      if (!sum) {
        for (size_t c = 0; c < hidden; ++c) row[c] = scale * row[c];
        sum = row;
      } else {
        for (size_t c = 0; c < hidden; ++c) sum[c] += scale * row[c];
      }
    }
    if (!sum) return;
    float* to = out + t * hidden;
    for (size_t c = 0; c < hidden; ++c) to[c] += sum[c];
  });
}

Status CpuOps::experts(const ExpertsDesc& desc, uint32_t tokens, Rows in, Rows out) {
  MUSTER_TRY(gather(desc, tokens, static_cast<const float*>(in)));
  if (runs_.empty()) return Status::ok();
  MUSTER_TRY(run_experts(Half::gate_up));
  MUSTER_TRY(run_experts(Half::down));
  combine(desc, tokens, static_cast<float*>(out));
  return Status::ok();
}

// Top-k of the logits, best first, ties to the lower id; the weights are sigmoids of the chosen logits.
Status CpuOps::route(const Weight& router, RouterScore score, uint32_t top_k, uint32_t tokens, Rows in, const RouteResult& out) {
  if (score != RouterScore::sigmoid_input)
    return Status::unsupported("router score", "only sigmoid on the expert input is implemented, not number " + std::to_string(int(score)));
  const size_t experts = router.rows;
  if (top_k == 0 || top_k > experts)
    return Status::internal("route", "chooses " + std::to_string(top_k) + " of " + std::to_string(experts) + " experts");
  MUSTER_TRY(logits_.reserve("router logits", tokens * experts * sizeof(float)));
  MUSTER_TRY(linear(router, tokens, in, logits_.data()));
  for (size_t t = 0; t < tokens; ++t) {
    const std::span<const float> logits(logits_.floats() + t * experts, experts);
    const std::span<uint32_t> chosen = out.expert.subspan(t * top_k, top_k);
    out.gap[t] = choose(logits, chosen);
    for (uint32_t k = 0; k < top_k; ++k) out.weight[t * top_k + k] = -logits[chosen[k]];
  }
  const std::span<float> weights = out.weight.first(size_t{tokens} * top_k);
  kernels_.exp(weights.data(), weights.size());
  for (float& weight : weights) weight = 1 / (1 + weight);
  return Status::ok();
}

}  // namespace muster::cpu

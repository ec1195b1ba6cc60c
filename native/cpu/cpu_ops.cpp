// Making the table; memory, weights and the small dense ops.
#include "cpu/cpu_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace muster {
namespace cpu {

std::vector<const Kernels*> kernels_of_this_cpu() {
  std::vector<const Kernels*> out;
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    out.push_back(&avx512_kernels());
  if (fma) out.push_back(&avx2_kernels());
  out.push_back(&scalar_kernels());
  return out;
}

CpuOps::CpuOps(const DeviceOptions& options, const Kernels& kernels) : kernels_(kernels), pool_(std::max(1u, options.threads)) {}

Status CpuOps::reserve(const DeviceOptions& options) {
  const uint64_t slots = uint64_t{options.tokens_max} * std::max(1u, options.top_k_max);
  thread_stride_ = linear_scratch;
  MUSTER_TRY(thread_scratch_.allocate("kernel scratch", pool_.threads() * thread_stride_ * sizeof(float)));
  MUSTER_TRY(gated_.allocate("ffn rows", slots * 2 * options.ffn_max * sizeof(float)));
  if (options.top_k_max > 0) {
    MUSTER_TRY(expert_in_.allocate("expert input", slots * options.hidden * sizeof(float)));
    MUSTER_TRY(expert_out_.allocate("expert output", slots * options.hidden * sizeof(float)));
    slot_row_.reserve(slots);
  }
  return picked_.allocate("head input", uint64_t{std::max(options.rows_max, options.tokens_max)} * options.hidden * sizeof(float));
}

Status CpuOps::alloc_rows(uint32_t rows, uint32_t cols, Rows* out) {
  Buffer memory;
  MUSTER_TRY(memory.allocate("activation rows", uint64_t{rows} * cols * sizeof(float)));
  *out = memory.data();
  rows_.push_back(std::move(memory));
  return Status::ok();
}

Status CpuOps::pack(std::span<const StoredMatrix> parts, std::unique_ptr<Weight>* out) {
  auto weight = std::make_unique<CpuWeight>();
  MUSTER_TRY(weight->pack(parts, pool_));
  *out = std::move(weight);
  return Status::ok();
}

Status CpuOps::pack_vector(const StoredMatrix& vector, std::unique_ptr<Weight>* out) {
  auto weight = std::make_unique<CpuWeight>();
  MUSTER_TRY(weight->pack_vector(vector));
  *out = std::move(weight);
  return Status::ok();
}

Status CpuOps::embed(const Weight& table, uint32_t first, const Batch& batch, Rows out) {
  const auto& weight = static_cast<const CpuWeight&>(table);
  float* to = static_cast<float*>(out);
  pool_.run(batch.tokens, uint64_t{batch.tokens} * weight.cols * lanes, [&](uint32_t t, uint32_t thread) {
    float* row = to + size_t{t} * weight.cols;
    const uint32_t id = batch.ids[t];
    if (id < first || id - first >= weight.rows) return std::fill_n(row, weight.cols, 0.0f), void();
    const auto part = std::find_if(weight.parts.begin(), weight.parts.end(), [&](const Part& p) { return id - first - p.row < p.rows; });
    const uint32_t inside = id - first - part->row;
    const Panel& panel = weight.panels[part->panel_first + inside / lanes];
    float* columns = thread_scratch(thread);  // a chunk of the panel's 16 rows; one lane is the token's
    for (uint32_t k = 0; k < part->layout.k; k += chunk_k) {
      const uint32_t count = std::min(chunk_k, part->layout.k - k);
      kernels_.unpack({&part->layout, panel.data, k, count, columns});
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t column = k + i - part->lead;  // wraps before the first kept column
        if (column < weight.cols) row[column] = columns[size_t{i} * lanes + inside % lanes];
      }
    }
  });
  return Status::ok();
}

namespace {

// Sum of squares in f64: eight sums by column mod 8, then a tree. The order is fixed, and two at a time fit any x86-64.
double square_sum(const float* x, uint32_t count) {
  double sum[8] = {};
  uint32_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (uint32_t j = 0; j < 8; ++j) sum[j] += double{x[i + j]} * double{x[i + j]};
  for (uint32_t j = 0; i < count; ++i, ++j) sum[j] += double{x[i]} * double{x[i]};
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

}  // namespace

Status CpuOps::add_norm(const Weight& weight, double eps, uint32_t tokens, Rows x, Rows delta, Rows out) {
  const auto& scale = static_cast<const CpuWeight&>(weight);
  const uint32_t cols = scale.cols;
  const float* w = scale.values();
  pool_.run(tokens, uint64_t{tokens} * cols * 16, [&](uint32_t t, uint32_t) {
    float* row = static_cast<float*>(x) + size_t{t} * cols;
    float* to = static_cast<float*>(out) + size_t{t} * cols;
    if (delta) {
      const float* add = static_cast<const float*>(delta) + size_t{t} * cols;
      for (uint32_t c = 0; c < cols; ++c) row[c] += add[c];
    }
    const double inverse = 1 / std::sqrt(square_sum(row, cols) / cols + eps);
    for (uint32_t c = 0; c < cols; ++c) to[c] = static_cast<float>(row[c] * inverse * w[c]);
  });
  return Status::ok();
}

Status CpuOps::zero(uint32_t rows, uint32_t cols, Rows rows_out) {
  std::fill_n(static_cast<float*>(rows_out), uint64_t{rows} * cols, 0.0f);
  return Status::ok();
}

Status CpuOps::view(Rows rows, uint64_t count, std::span<float>* out) {
  *out = {static_cast<float*>(rows), count};
  return Status::ok();
}

Status CpuOps::commit(Rows rows, uint64_t count, std::span<const float> from) {
  if (from.size() < count) return Status::internal("commit", "given " + std::to_string(from.size()) + " values of " + std::to_string(count));
  if (count != 0) std::memmove(rows, from.data(), count * sizeof(float));  // `from` may be the view of the same rows
  return Status::ok();
}

}  // namespace cpu

Status make_cpu_ops(const DeviceOptions& options, std::unique_ptr<OpTable>* out) {
  const std::vector<const cpu::Kernels*> have = cpu::kernels_of_this_cpu();
  const auto is_asked = [&](const cpu::Kernels* k) { return options.isa.empty() || options.isa == k->isa; };
  const auto chosen = std::find_if(have.begin(), have.end(), is_asked);  // best first
  if (chosen == have.end()) {
    std::string names;
    for (const cpu::Kernels* k : have) names += (names.empty() ? "" : ", ") + std::string(k->isa);
    return Status::unsupported("isa", "\"" + options.isa + "\" does not run here; this CPU has " + names);
  }
  auto ops = std::make_unique<cpu::CpuOps>(options, **chosen);
  MUSTER_TRY(ops->reserve(options));
  *out = std::move(ops);
  return Status::ok();
}

}  // namespace muster

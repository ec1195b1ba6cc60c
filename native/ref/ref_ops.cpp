// Memory, weights and the dense ops of the reference backend.
#include "ref/ref_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats/stored_matrix.h"

namespace muster {
namespace ref {

double dot(const float* a, const float* b, uint64_t count) {
  double sum = 0;
  for (uint64_t i = 0; i < count; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

Status RefOps::alloc_rows(uint32_t rows, uint32_t cols, Rows* out) {
  const uint64_t count = uint64_t{rows} * cols;
  Memory<float> memory = allocate<float>(count);
  if (!memory) return Status::out_of_memory("activation rows", count * sizeof(float), 0);
  *out = memory.get();
  rows_.push_back(std::move(memory));
  return Status::ok();
}

Status RefOps::pack(std::span<const StoredMatrix> parts, std::unique_ptr<Weight>* out) {
  MUSTER_TRY(check_parts(parts));
  auto weight = std::make_unique<RefWeight>();
  weight->cols = parts[0].cols;
  for (const StoredMatrix& part : parts) weight->rows += part.rows;
  const uint64_t count = uint64_t{weight->rows} * weight->cols;
  weight->values = allocate<float>(count);
  if (!weight->values) return Status::out_of_memory("weight", count * sizeof(float), 0);
  weight->bytes = count * sizeof(float);
  float* at = weight->values.get();
  for (const StoredMatrix& part : parts)
    for (uint32_t r = 0; r < part.rows; ++r, at += part.cols) read_row(part, r, at);
  MUSTER_TRY(reserve_scratch(std::max(weight->rows, weight->cols)));
  *out = std::move(weight);
  return Status::ok();
}

Status RefOps::pack_vector(const StoredMatrix& vector, std::unique_ptr<Weight>* out) {
  if (vector.rows != 1) return Status::invalid("rows", "a vector has one row, not " + std::to_string(vector.rows));
  return pack({&vector, 1}, out);
}

Status RefOps::reserve_scratch(uint64_t count) {
  if (count <= scratch_count_) return Status::ok();
  Memory<float> scaled = allocate<float>(count), activation = allocate<float>(count);
  Memory<double> sum = allocate<double>(count);
  if (!scaled || !activation || !sum) return Status::out_of_memory("scratch", count * (2 * sizeof(float) + sizeof(double)), 0);
  scaled_ = std::move(scaled);
  activation_ = std::move(activation);
  sum_ = std::move(sum);
  scratch_count_ = count;
  return Status::ok();
}

Status RefOps::embed(const Weight& table, uint32_t first, const Batch& batch, Rows out) {
  const RefWeight& rows = as_ref(table);
  float* to = static_cast<float*>(out);
  for (uint32_t t = 0; t < batch.tokens; ++t, to += rows.cols) {
    const uint32_t id = batch.ids[t];
    if (id >= first && id - first < rows.rows) std::copy_n(rows.row(id - first), rows.cols, to);
    else std::fill_n(to, rows.cols, 0.0f);
  }
  return Status::ok();
}

Status RefOps::add_norm(const Weight& weight, double eps, uint32_t tokens, Rows x, Rows delta, Rows out) {
  const RefWeight& scale = as_ref(weight);
  const uint64_t cols = scale.cols;
  for (uint64_t t = 0; t < tokens; ++t) {
    float* row = static_cast<float*>(x) + t * cols;
    float* to = static_cast<float*>(out) + t * cols;
    if (delta)
      for (uint64_t c = 0; c < cols; ++c) row[c] += static_cast<const float*>(delta)[t * cols + c];
    const double inverse = 1 / std::sqrt(dot(row, row, cols) / static_cast<double>(cols) + eps);
    for (uint64_t c = 0; c < cols; ++c) to[c] = static_cast<float>(row[c] * inverse * scale.values[c]);
  }
  return Status::ok();
}

Status RefOps::linear(const Weight& weight, uint32_t tokens, Rows in, Rows out) {
  const RefWeight& w = as_ref(weight);
  for (uint64_t t = 0; t < tokens; ++t) {
    const float* from = static_cast<const float*>(in) + t * w.cols;
    float* to = static_cast<float*>(out) + t * w.rows;
    for (uint64_t r = 0; r < w.rows; ++r) to[r] = static_cast<float>(dot(w.row(r), from, w.cols));
  }
  return Status::ok();
}

Status RefOps::head(const Weight& head, std::span<const uint32_t> tokens, Rows in, std::span<float> logits) {
  const RefWeight& w = as_ref(head);
  if (logits.size() != tokens.size() * w.rows)
    return Status::internal("head", "room for " + std::to_string(logits.size()) + " logits, not " + std::to_string(tokens.size() * w.rows));
  float* to = logits.data();
  for (const uint32_t token : tokens) {
    const float* from = static_cast<const float*>(in) + uint64_t{token} * w.cols;
    for (uint64_t r = 0; r < w.rows; ++r) *to++ = static_cast<float>(dot(w.row(r), from, w.cols));
  }
  return Status::ok();
}

Status RefOps::zero(uint32_t rows, uint32_t cols, Rows rows_out) {
  std::fill_n(static_cast<float*>(rows_out), uint64_t{rows} * cols, 0.0f);
  return Status::ok();
}

Status RefOps::view(Rows rows, uint64_t count, std::span<float>* out) {
  *out = {static_cast<float*>(rows), count};
  return Status::ok();
}

Status RefOps::commit(Rows rows, uint64_t count, std::span<const float> from) {
  if (from.size() < count) return Status::internal("commit", "given " + std::to_string(from.size()) + " values of " + std::to_string(count));
  if (count != 0) std::memmove(rows, from.data(), count * sizeof(float));  // `from` may be the view of the same rows
  return Status::ok();
}

}  // namespace ref

// One thread, every shape: the options bound other backends' buffers.
Status make_ref_ops(const DeviceOptions&, std::unique_ptr<OpTable>* out) {
  *out = std::make_unique<ref::RefOps>();
  return Status::ok();
}

}  // namespace muster

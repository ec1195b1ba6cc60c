// The KV cache, rotary positions and attention.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_ops.h"

namespace muster::cpu {
namespace {

// First key position that a query at `position` sees; the last is its own.
//   full      0
//   sliding   position - span + 1: span keys with its own
//   chunked   the start of its chunk, aligned to absolute multiples of span
uint32_t first_key(MaskKind mask, uint32_t span, uint32_t position) {
  if (mask == MaskKind::sliding) return position >= span ? position - span + 1 : 0;
  if (mask == MaskKind::chunked) return position / span * span;
  return 0;
}

void rotate(const RopeDesc& desc, const float* turns, float* x) {
  const bool halves = desc.layout == RopeLayout::half;
  const uint32_t half = desc.dims / 2, step = halves ? 1 : 2, other = halves ? half : 1;
  for (uint32_t j = 0; j < half; ++j) {
    float &a = x[j * step], &b = x[j * step + other];
    const float cosine = turns[2 * j], sine = turns[2 * j + 1];
    const float turned = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = turned;
  }
}

void scale_head(float* x, uint32_t count, double by) {
  for (uint32_t i = 0; i < count; ++i) x[i] = static_cast<float>(x[i] * by);
}

double unit_norm_scale(const float* x, uint32_t count, double eps) {
  double sum = 0;
  for (uint32_t i = 0; i < count; ++i) sum += double{x[i]} * double{x[i]};
  return 1 / std::sqrt(sum / count + eps);
}

}  // namespace

Status CpuOps::kv_init(const KvDesc& desc) {
  const uint64_t groups = (uint64_t{desc.block_tokens} + lanes - 1) / lanes;
  uint64_t elements = 1;  // of keys, whose block is padded to whole groups; values take no more
  for (const uint64_t factor : {uint64_t{desc.layers}, uint64_t{desc.blocks}, uint64_t{desc.kv_heads}, uint64_t{desc.head_dim}, groups * lanes}) {
    if (factor == 0)
      return Status::invalid("blocks", "the KV cache has no element: layers, blocks, kv heads, block tokens and head_dim are at least 1");
    if (elements > UINT64_MAX / 16 / factor) return Status::out_of_memory("KV cache", UINT64_MAX, 0);
    elements *= factor;
  }
  kv_.desc = desc;
  kv_.k_head = groups * lanes * desc.head_dim;
  kv_.v_head = size_t{desc.block_tokens} * desc.head_dim;
  kv_.v_at = kv_.k_head * desc.kv_heads;
  kv_.block = kv_.v_at + kv_.v_head * desc.kv_heads;
  MUSTER_TRY(cache_.allocate("KV cache", kv_bytes() + lanes * sizeof(float)));  // a value row may be read as whole lanes
  thread_stride_ = (std::max(linear_scratch, attend_scratch(desc.head_dim)) + lanes - 1) / lanes * lanes;
  return thread_scratch_.allocate("kernel scratch", pool_.threads() * thread_stride_ * sizeof(float));
}

Status CpuOps::kv_copy(uint32_t from, uint32_t to) {
  if (from >= kv_.desc.blocks || to >= kv_.desc.blocks)
    return Status::internal("kv_copy", "block " + std::to_string(std::max(from, to)) + " of " + std::to_string(kv_.desc.blocks));
  if (from == to) return Status::ok();
  for (uint32_t layer = 0; layer < kv_.desc.layers; ++layer) {
    float* base = cache_.floats() + layer * kv_.layer();
    std::copy_n(base + from * kv_.block, kv_.block, base + to * kv_.block);
  }
  return Status::ok();
}

Status CpuOps::check_cache(const char* op, uint32_t layer, uint32_t kv_heads, uint32_t head_dim) const {
  if (layer < kv_.desc.layers && kv_heads == kv_.desc.kv_heads && head_dim == kv_.desc.head_dim) return Status::ok();
  return Status::internal(op, "layer " + std::to_string(layer) + " does not have the shape of the KV cache");
}

// That every token's own position has a block; block ids of earlier positions are the executor's word (O2).
Status CpuOps::check_tables(const Batch& batch) const {
  for (uint32_t t = 0; t < batch.tokens; ++t) {
    const uint32_t sequence = batch.sequence[t], index = batch.positions[t] / kv_.desc.block_tokens;
    if (sequence >= batch.tables.size())
      return Status::internal("KV table", "sequence " + std::to_string(sequence) + " of " + std::to_string(batch.tables.size()));
    if (index >= batch.tables[sequence].size())
      return Status::internal("KV table", "position " + std::to_string(batch.positions[t]) + " lies past the " +
                                              std::to_string(batch.tables[sequence].size()) + " blocks of its sequence");
    if (batch.tables[sequence][index] >= kv_.desc.blocks)
      return Status::internal("KV table", "block " + std::to_string(batch.tables[sequence][index]) + " of " + std::to_string(kv_.desc.blocks));
  }
  return Status::ok();
}

void CpuOps::rope_token(const RopeDesc& desc, uint32_t position, const float* turns, float* row) const {
  const double warm = temperature(desc, position);
  for (uint32_t h = 0; h < desc.heads + desc.kv_heads; ++h) {  // queries, then keys
    float* x = row + size_t{h} * desc.head_dim;
    if (turns) rotate(desc, turns, x);
    double by = desc.unit_norm ? unit_norm_scale(x, desc.head_dim, desc.norm_eps) : 1;
    if (h < desc.heads) by *= warm;
    if (by != 1) scale_head(x, desc.head_dim, by);
  }
}

void CpuOps::write_kv(uint32_t layer, uint32_t block, uint32_t inside, const float* kv) {
  const uint32_t dim = kv_.desc.head_dim, heads = kv_.desc.kv_heads;
  float* base = cache_.floats() + layer * kv_.layer() + block * kv_.block;
  for (uint32_t h = 0; h < heads; ++h) {
    float* keys = base + h * kv_.k_head + size_t{inside / lanes} * dim * lanes + inside % lanes;
    for (uint32_t d = 0; d < dim; ++d) keys[size_t{d} * lanes] = kv[size_t{h} * dim + d];
    std::copy_n(kv + (size_t{heads} + h) * dim, dim, base + kv_.v_at + h * kv_.v_head + size_t{inside} * dim);
  }
}

Status CpuOps::rope_kv(const RopeDesc& desc, const Batch& batch, Rows qkv) {
  MUSTER_TRY(check_cache("rope_kv", desc.layer, desc.kv_heads, desc.head_dim));
  MUSTER_TRY(check_tables(batch));
  const bool rotates = desc.layout != RopeLayout::none && desc.dims > 0;
  if (rotates && (desc.dims > desc.head_dim || desc.frequencies.size() < desc.dims / 2))
    return Status::internal("rope_kv", "rotates " + std::to_string(desc.dims) + " of " + std::to_string(desc.head_dim) + " dimensions");
  const float* turns = nullptr;
  if (rotates) MUSTER_TRY(rotations_.table(desc, batch, pool_, &turns));
  const size_t width = (desc.heads + 2 * size_t{desc.kv_heads}) * desc.head_dim;
  pool_.run(batch.tokens, batch.tokens * width * 8, [&](uint32_t t, uint32_t) {
    float* row = static_cast<float*>(qkv) + t * width;
    const uint32_t position = batch.positions[t];
    rope_token(desc, position, turns ? turns + size_t{t} * (desc.dims / 2) * 2 : nullptr, row);
    const uint32_t block = batch.tables[batch.sequence[t]][position / kv_.desc.block_tokens];
    write_kv(desc.layer, block, position % kv_.desc.block_tokens, row + size_t{desc.heads} * desc.head_dim);
  });
  return Status::ok();
}

Status CpuOps::attention(const AttentionDesc& desc, const Batch& batch, Rows qkv, Rows out) {
  MUSTER_TRY(check_cache("attention", desc.layer, desc.kv_heads, desc.head_dim));
  if (desc.heads_per_kv == 0 || desc.heads == 0 || desc.first_head / desc.heads_per_kv < desc.first_kv ||
      (desc.first_head + desc.heads - 1) / desc.heads_per_kv - desc.first_kv >= desc.kv_heads)
    return Status::internal("attention", "query heads of this rank read kv heads that it does not have");
  if (desc.mask != MaskKind::full && desc.mask_span == 0) return Status::internal("attention", "a sliding or chunked mask has a span");
  MUSTER_TRY(check_tables(batch));
  const uint32_t dim = desc.head_dim, per = desc.heads_per_kv;
  const uint32_t kv_first = desc.first_head / per, kv_count = (desc.first_head + desc.heads - 1) / per - kv_first + 1;
  const size_t width = (desc.heads + 2 * size_t{desc.kv_heads}) * dim;
  const float* base = cache_.floats() + desc.layer * kv_.layer();
  uint64_t keys = 0;
  for (uint32_t t = 0; t < batch.tokens; ++t) keys += batch.positions[t] + 1 - first_key(desc.mask, desc.mask_span, batch.positions[t]);
  pool_.run(batch.tokens * kv_count, keys * desc.heads * dim * 2, [&](uint32_t task, uint32_t thread) {
    const uint32_t t = task / kv_count, kv_head = kv_first + task % kv_count;
    const uint32_t begin = std::max(desc.first_head, kv_head * per) - desc.first_head;
    const uint32_t end = std::min(desc.first_head + desc.heads, (kv_head + 1) * per) - desc.first_head;
    const uint32_t position = batch.positions[t], local = kv_head - desc.first_kv;
    AttendArgs args;
    args.q = static_cast<const float*>(qkv) + t * width + size_t{begin} * dim;
    args.heads = end - begin;
    args.dim = dim;
    args.scale = static_cast<float>(desc.scale);
    args.k = base + local * kv_.k_head;
    args.v = base + kv_.v_at + local * kv_.v_head;
    args.block_stride = kv_.block;
    args.table = batch.tables[batch.sequence[t]].data();
    args.block_tokens = kv_.desc.block_tokens;
    args.begin = first_key(desc.mask, desc.mask_span, position);
    args.end = position + 1;
    args.out = static_cast<float*>(out) + (size_t{t} * desc.heads + begin) * dim;
    args.scratch = thread_scratch(thread);
    kernels_.attend(args);
  });
  return Status::ok();
}

}  // namespace muster::cpu

// KV cache, rotary positions and attention of the reference backend.
#include <algorithm>
#include <cmath>

#include "ref/ref_ops.h"

namespace muster::ref {
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

// The angle is the f32 product that checkpoints were trained with; its sine and cosine are taken in f64.
void rotate(const RopeDesc& desc, uint32_t position, double* x) {
  for (uint32_t j = 0; j < desc.dims / 2; ++j) {
    const float angle = static_cast<float>(position) * desc.frequencies[j];
    const double cosine = std::cos(double{angle}), sine = std::sin(double{angle});
    const bool half = desc.layout == RopeLayout::half;
    double& a = x[half ? j : 2 * j];
    double& b = x[half ? j + desc.dims / 2 : 2 * j + 1];
    const double turned = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = turned;
  }
}

void unit_norm(double* x, uint32_t count, double eps) {
  double sum = 0;
  for (uint32_t i = 0; i < count; ++i) sum += x[i] * x[i];
  const double inverse = 1 / std::sqrt(sum / count + eps);
  for (uint32_t i = 0; i < count; ++i) x[i] *= inverse;
}

// 1 + scale * ln(1 + floor((p + 1) / floor_scale)); 1 where it is off.
double temperature(const RopeDesc& desc, uint32_t position) {
  if (desc.temperature_scale == 0 || desc.temperature_floor == 0) return 1;
  const uint64_t steps = (uint64_t{position} + 1) / desc.temperature_floor;
  return 1 + desc.temperature_scale * std::log1p(static_cast<double>(steps));
}

}  // namespace

Status RefOps::kv_init(const KvDesc& desc) {
  KvCache cache;
  cache.desc = desc;
  // Checked in 128 bits: the product of five counts may pass 2^64.
  const auto pages = static_cast<unsigned __int128>(uint64_t{desc.layers} * desc.blocks);
  const auto wide = pages * (uint64_t{desc.kv_heads} * desc.block_tokens) * desc.head_dim;
  if (wide == 0) return Status::invalid("blocks", "the KV cache has no element: layers, blocks, kv heads, block tokens and head_dim are at least 1");
  if (wide > UINT64_MAX / (2 * sizeof(float))) return Status::out_of_memory("KV cache", UINT64_MAX, 0);
  cache.keys = allocate<float>(cache.count());
  cache.values = allocate<float>(cache.count());
  Memory<double> scores = allocate<double>(cache.tokens_max()), rotated = allocate<double>(desc.head_dim);
  if (!cache.keys || !cache.values || !scores || !rotated)
    return Status::out_of_memory("KV cache", 2 * cache.count() * sizeof(float), 0);
  cache_ = std::move(cache);
  scores_ = std::move(scores);
  rotated_ = std::move(rotated);
  return Status::ok();
}

Status RefOps::kv_copy(uint32_t from, uint32_t to) {
  if (from >= cache_.desc.blocks || to >= cache_.desc.blocks)
    return Status::internal("kv_copy", "block " + std::to_string(std::max(from, to)) + " of " + std::to_string(cache_.desc.blocks));
  if (from == to) return Status::ok();
  const uint64_t count = cache_.offset(0, 1, 0, 0);  // elements of a block of one layer
  for (uint32_t layer = 0; layer < cache_.desc.layers; ++layer) {
    std::copy_n(&cache_.keys[cache_.offset(layer, from, 0, 0)], count, &cache_.keys[cache_.offset(layer, to, 0, 0)]);
    std::copy_n(&cache_.values[cache_.offset(layer, from, 0, 0)], count, &cache_.values[cache_.offset(layer, to, 0, 0)]);
  }
  return Status::ok();
}

Status RefOps::find(const Batch& batch, uint32_t token, uint32_t position, uint32_t* block) const {
  if (batch.sequence[token] >= batch.tables.size())
    return Status::internal("KV table", "sequence " + std::to_string(batch.sequence[token]) + " of " + std::to_string(batch.tables.size()));
  const std::span<const uint32_t> table = batch.tables[batch.sequence[token]];
  const uint32_t index = position / cache_.desc.block_tokens;
  if (index >= table.size())
    return Status::internal("KV table", "position " + std::to_string(position) + " lies past the " + std::to_string(table.size()) +
                                            " blocks of its sequence");
  if (table[index] >= cache_.desc.blocks)
    return Status::internal("KV table", "block " + std::to_string(table[index]) + " of " + std::to_string(cache_.desc.blocks));
  *block = table[index];
  return Status::ok();
}

Status RefOps::rope_kv(const RopeDesc& desc, const Batch& batch, Rows qkv) {
  if (desc.layer >= cache_.desc.layers || desc.kv_heads != cache_.desc.kv_heads || desc.head_dim != cache_.desc.head_dim)
    return Status::internal("rope_kv", "layer " + std::to_string(desc.layer) + " does not have the shape of the KV cache");
  if (desc.layout != RopeLayout::none && (desc.dims > desc.head_dim || desc.frequencies.size() < desc.dims / 2))
    return Status::internal("rope_kv", "rotates " + std::to_string(desc.dims) + " of " + std::to_string(desc.head_dim) + " dimensions");
  const uint64_t dim = desc.head_dim, row_width = (desc.heads + 2 * uint64_t{desc.kv_heads}) * dim;
  for (uint32_t t = 0; t < batch.tokens; ++t) {
    float* row = static_cast<float*>(qkv) + t * row_width;
    const uint32_t position = batch.positions[t];
    const double scale = temperature(desc, position);
    for (uint32_t h = 0; h < desc.heads + desc.kv_heads; ++h) {  // queries, then keys
      float* x = row + h * dim;
      std::copy_n(x, dim, rotated_.get());
      if (desc.layout != RopeLayout::none) rotate(desc, position, rotated_.get());
      if (desc.unit_norm) unit_norm(rotated_.get(), desc.head_dim, desc.norm_eps);
      for (uint64_t i = 0; i < dim; ++i) x[i] = static_cast<float>(h < desc.heads ? rotated_[i] * scale : rotated_[i]);
    }
    uint32_t block = 0;
    MUSTER_TRY(find(batch, t, position, &block));
    for (uint32_t h = 0; h < desc.kv_heads; ++h) {
      const uint64_t to = cache_.offset(desc.layer, block, h, position % cache_.desc.block_tokens);
      std::copy_n(row + (desc.heads + uint64_t{h}) * dim, dim, &cache_.keys[to]);
      std::copy_n(row + (desc.heads + uint64_t{desc.kv_heads} + h) * dim, dim, &cache_.values[to]);
    }
  }
  return Status::ok();
}

// The table was walked by attention() before.
void RefOps::attend(const AttentionDesc& desc, const Query& query, float* out) {
  const uint32_t block_tokens = cache_.desc.block_tokens, count = query.position - query.first + 1;
  const auto at = [&](uint32_t i) {
    const uint32_t p = query.first + i;
    return cache_.offset(desc.layer, query.table[p / block_tokens], query.kv_head, p % block_tokens);
  };
  double best = -INFINITY, sum = 0;
  for (uint32_t i = 0; i < count; ++i) {
    scores_[i] = desc.scale * dot(query.values, &cache_.keys[at(i)], desc.head_dim);
    best = std::max(best, scores_[i]);
  }
  for (uint32_t i = 0; i < count; ++i) sum += scores_[i] = std::exp(scores_[i] - best);
  for (uint32_t c = 0; c < desc.head_dim; ++c) {
    double mixed = 0;
    for (uint32_t i = 0; i < count; ++i) mixed += scores_[i] * double{cache_.values[at(i) + c]};
    out[c] = static_cast<float>(mixed / sum);
  }
}

Status RefOps::attention(const AttentionDesc& desc, const Batch& batch, Rows qkv, Rows out) {
  if (desc.layer >= cache_.desc.layers || desc.kv_heads != cache_.desc.kv_heads || desc.head_dim != cache_.desc.head_dim)
    return Status::internal("attention", "layer " + std::to_string(desc.layer) + " does not have the shape of the KV cache");
  if (desc.heads_per_kv == 0 || desc.first_head / desc.heads_per_kv < desc.first_kv ||
      (desc.heads != 0 && (desc.first_head + desc.heads - 1) / desc.heads_per_kv - desc.first_kv >= desc.kv_heads))
    return Status::internal("attention", "query heads of this rank read kv heads that it does not have");
  if (desc.mask != MaskKind::full && desc.mask_span == 0) return Status::internal("attention", "a sliding or chunked mask has a span");
  const uint64_t dim = desc.head_dim, row_width = (desc.heads + 2 * uint64_t{desc.kv_heads}) * dim;
  for (uint32_t t = 0; t < batch.tokens; ++t) {
    const uint32_t position = batch.positions[t], first = first_key(desc.mask, desc.mask_span, position);
    if (position - first >= cache_.tokens_max())
      return Status::internal("attention", "position " + std::to_string(position) + " is past the KV cache");
    uint32_t block = 0;
    for (uint64_t p = first / cache_.desc.block_tokens; p <= position / cache_.desc.block_tokens; ++p)
      MUSTER_TRY(find(batch, t, static_cast<uint32_t>(p * cache_.desc.block_tokens), &block));
    const float* row = static_cast<const float*>(qkv) + t * row_width;
    float* to = static_cast<float*>(out) + t * uint64_t{desc.heads} * dim;
    for (uint32_t h = 0; h < desc.heads; ++h) {
      const uint32_t kv_head = (desc.first_head + h) / desc.heads_per_kv - desc.first_kv;
      attend(desc, {batch.tables[batch.sequence[t]], first, position, kv_head, row + h * dim}, to + h * dim);
    }
  }
  return Status::ok();
}

}  // namespace muster::ref

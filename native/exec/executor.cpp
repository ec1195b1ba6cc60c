#include "exec/executor.h"

#include <algorithm>
#include <limits>

namespace muster {

Status Executor::alloc_rows(uint32_t tokens, uint32_t cols, Rows* out) {
  bytes_ += uint64_t(tokens) * cols * sizeof(float);
  return rank_.ops->alloc_rows(tokens, cols, out);
}

Status Executor::alloc(uint32_t tokens_max) {
  const ModelDesc& model = *rank_.model;
  const RankShard& shard = *rank_.shard;
  uint32_t qkv = 0, attended = 0;
  for (const BlockSpec& block : model.blocks) {
    const uint32_t dim = block.attention.head_dim;
    qkv = std::max(qkv, (shard.heads.size() + 2 * shard.kv_heads.size()) * dim);
    attended = std::max(attended, shard.heads.size() * dim);
    top_k_max_ = std::max(top_k_max_, block.moe.top_k);
  }
  tokens_max_ = tokens_max;
  MUSTER_TRY(alloc_rows(tokens_max, model.hidden, &x_));
  MUSTER_TRY(alloc_rows(tokens_max, model.hidden, &h_));
  MUSTER_TRY(alloc_rows(tokens_max, model.hidden, &d_));
  MUSTER_TRY(alloc_rows(tokens_max, qkv, &qkv_));
  MUSTER_TRY(alloc_rows(tokens_max, attended, &attended_));
  expert_.resize(model.blocks.size() * tokens_max * top_k_max_);
  weight_.resize(size_t(tokens_max) * top_k_max_);
  own_.resize(size_t(tokens_max) * top_k_max_);
  gap_.resize(tokens_max);
  gaps_.resize(tokens_max);
  bytes_ += (expert_.size() + own_.size() + weight_.size() + gap_.size() + gaps_.size()) * 4;
  return Status::ok();
}

Status Executor::forward(const Batch& batch, bool wants_head) {
  tokens_ = batch.tokens;
  std::fill(gaps_.begin(), gaps_.end(), std::numeric_limits<float>::infinity());
  MUSTER_TRY(rank_.ops->embed(*weights_.embedding, rank_.shard->vocab.begin, batch, x_));
  MUSTER_TRY(sum(x_, batch.tokens));
  Rows delta = nullptr;
  for (size_t layer = 0; layer < rank_.model->blocks.size(); ++layer) {
    MUSTER_TRY(attention_half(layer, batch, delta));
    MUSTER_TRY(mlp_half(layer, batch));
    delta = d_;
  }
  if (!wants_head) return rank_.ops->sync();
  return rank_.ops->add_norm(*weights_.final_norm, rank_.model->norm_eps, batch.tokens, x_, delta, h_);
}

Status Executor::attention_half(size_t layer, const Batch& batch, Rows delta) {
  OpTable& ops = *rank_.ops;
  const BlockWeights& weights = weights_.blocks[layer];
  const AttentionSpec& spec = rank_.model->blocks[layer].attention;
  const RankShard& shard = *rank_.shard;
  RopeDesc rope;
  rope.heads = shard.heads.size();
  rope.kv_heads = shard.kv_heads.size();
  rope.head_dim = spec.head_dim;
  rope.layout = spec.rope;
  rope.dims = spec.rope_dims;
  rope.frequencies = spec.rope_frequencies;
  rope.unit_norm = spec.qk_unit_norm;
  rope.norm_eps = rank_.model->norm_eps;
  rope.temperature_scale = spec.temperature_scale;
  rope.temperature_floor = spec.temperature_floor;
  rope.layer = uint32_t(layer);
  AttentionDesc attention;
  attention.heads = rope.heads;
  attention.kv_heads = rope.kv_heads;
  attention.head_dim = spec.head_dim;
  attention.first_head = shard.heads.begin;
  attention.first_kv = shard.kv_heads.begin;
  attention.heads_per_kv = spec.heads / spec.kv_heads;
  attention.scale = spec.scale;
  attention.mask = spec.mask;
  attention.mask_span = spec.mask_span;
  attention.layer = uint32_t(layer);

  MUSTER_TRY(ops.add_norm(*weights.attention_norm, rank_.model->norm_eps, batch.tokens, x_, delta, h_));
  MUSTER_TRY(ops.linear(*weights.qkv, batch.tokens, h_, qkv_));
  MUSTER_TRY(ops.rope_kv(rope, batch, qkv_));
  MUSTER_TRY(ops.attention(attention, batch, qkv_, attended_));
  MUSTER_TRY(ops.linear(*weights.output, batch.tokens, attended_, d_));
  return sum(d_, batch.tokens);
}

Status Executor::mlp_half(size_t layer, const Batch& batch) {
  const uint32_t tokens = batch.tokens;
  OpTable& ops = *rank_.ops;
  const BlockWeights& weights = weights_.blocks[layer];
  MUSTER_TRY(ops.add_norm(*weights.mlp_norm, rank_.model->norm_eps, tokens, x_, d_, h_));
  if (weights.ffn.gate_up) {
    MUSTER_TRY(ops.dense_ffn(*weights.ffn.gate_up, *weights.ffn.down, tokens, h_, d_));
  } else {
    MUSTER_TRY(ops.zero(tokens, rank_.model->hidden, d_));
  }
  if (weights.router) MUSTER_TRY(moe(layer, batch));
  return sum(d_, tokens);
}

// The router is replicated, so every rank finds the same experts and computes those it holds.
Status Executor::moe(size_t layer, const Batch& batch) {
  const uint32_t tokens = batch.tokens;
  const BlockWeights& weights = weights_.blocks[layer];
  const MoeSpec& spec = rank_.model->blocks[layer].moe;
  const size_t chosen = size_t(tokens) * spec.top_k;
  const std::span<uint32_t> expert = std::span(expert_).subspan(layer * tokens_max_ * top_k_max_, chosen);
  const std::span<float> weight = std::span(weight_).first(chosen), gap = std::span(gap_).first(tokens);
  MUSTER_TRY(rank_.ops->route(*weights.router, spec.score, spec.top_k, tokens, h_, {expert, weight, gap}));
  for (uint32_t t = 0; t < tokens; ++t) gaps_[t] = std::min(gaps_[t], gap[t]);
  ExpertsDesc desc;
  desc.score = spec.score;
  desc.top_k = spec.top_k;
  desc.expert = own_choices(layer, batch, expert);
  desc.weight = weight;
  desc.gate_up = weights.expert_gate_up;
  desc.down = weights.expert_down;
  return rank_.ops->experts(desc, tokens, h_, d_);
}

// Where an expert has copies, its token belongs to the one that the position picks; the others see an id that nobody holds.
std::span<const uint32_t> Executor::own_choices(size_t layer, const Batch& batch, std::span<const uint32_t> chosen) {
  const std::vector<ExpertCopy>& copies = weights_.blocks[layer].copies;
  if (copies.empty()) return chosen;
  const MoeSpec& spec = rank_.model->blocks[layer].moe;
  for (size_t i = 0; i < chosen.size(); ++i) {
    const ExpertCopy& own = copies[chosen[i]];
    const uint32_t turn = batch.positions[i / spec.top_k] * 2654435761u >> 16;
    own_[i] = turn % own.copies == own.copy ? chosen[i] : spec.experts;
  }
  return std::span(own_).first(chosen.size());
}

Status Executor::sum(Rows rows, uint32_t tokens) {
  if (!rank_.comm) return Status::ok();
  const uint64_t count = uint64_t(tokens) * rank_.model->hidden;
  std::span<float> host;
  MUSTER_TRY(rank_.ops->view(rows, count, &host));
  MUSTER_TRY(rank_.comm->sum(rank_.shard->rank, host));
  return rank_.ops->commit(rows, count, host);
}

void Executor::count_experts(std::vector<std::vector<uint64_t>>* counts) const {
  for (size_t layer = 0; layer < rank_.model->blocks.size(); ++layer) {
    if (!weights_.blocks[layer].router) continue;
    const uint32_t* expert = expert_.data() + layer * tokens_max_ * top_k_max_;
    for (size_t i = 0; i < size_t(tokens_) * rank_.model->blocks[layer].moe.top_k; ++i) ++(*counts)[layer][expert[i]];
  }
}

}  // namespace muster

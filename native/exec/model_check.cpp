#include "exec/model_check.h"

#include <cmath>

namespace muster {
namespace {

std::string text(uint64_t value) { return std::to_string(value); }

Status check_attention(const AttentionSpec& spec, const std::string& at) {
  if (spec.heads == 0 || spec.kv_heads == 0 || spec.heads % spec.kv_heads)
    return Status::invalid(at + ".kv_heads", text(spec.heads) + " heads do not share " + text(spec.kv_heads) + " kv heads evenly");
  if (spec.head_dim == 0 || spec.heads > 65536 || spec.head_dim > 65536) return Status::invalid(at + ".head_dim", text(spec.head_dim) + " is not a width of a head");
  if (!std::isfinite(spec.scale)) return Status::invalid(at + ".scale", "is not a number");
  if (spec.rope != RopeLayout::none && spec.rope != RopeLayout::half && spec.rope != RopeLayout::interleaved)
    return Status::unsupported(at + ".rope", "layout " + text(uint64_t(spec.rope)));
  if (spec.rope != RopeLayout::none) {
    if (spec.rope_dims == 0 || spec.rope_dims % 2 || spec.rope_dims > spec.head_dim)
      return Status::invalid(at + ".rope_dims", text(spec.rope_dims) + " is not an even width within " + text(spec.head_dim));
    if (spec.rope_frequencies.size() != spec.rope_dims / 2)
      return Status::invalid(at + ".rope_frequencies", text(spec.rope_frequencies.size()) + " frequencies for " + text(spec.rope_dims) + " dimensions");
  }
  if (spec.mask != MaskKind::full && spec.mask != MaskKind::sliding && spec.mask != MaskKind::chunked)
    return Status::unsupported(at + ".mask", "kind " + text(uint64_t(spec.mask)));
  if (spec.mask != MaskKind::full && spec.mask_span == 0) return Status::invalid(at + ".mask_span", "is 0");
  if (!std::isfinite(spec.temperature_scale)) return Status::invalid(at + ".temperature_scale", "is not a number");
  if (spec.temperature_scale != 0 && spec.temperature_floor == 0) return Status::invalid(at + ".temperature_floor", "is 0");
  return Status::ok();
}

Status check_moe(const MoeSpec& spec, const std::string& at) {
  if (spec.experts == 0 || spec.expert_ffn == 0) return Status::invalid(at, "a block needs a dense FFN or experts");
  if (spec.top_k == 0 || spec.top_k > spec.experts) return Status::invalid(at + ".top_k", text(spec.top_k) + " of " + text(spec.experts) + " experts");
  if (spec.score != RouterScore::sigmoid_input)
    return Status::unsupported(at + ".score", "router score " + text(uint64_t(spec.score)) + "; supported is the sigmoid that scales an expert's input");
  return Status::ok();
}

Status check_range(const Range& range, uint32_t whole, const std::string& field, bool may_be_empty) {
  if (range.begin <= range.end && range.end <= whole && (may_be_empty || range.size())) return Status::ok();
  return Status::invalid(field, "[" + text(range.begin) + ", " + text(range.end) + ") is not a part of " + text(whole));
}

Status check_shard(const ModelDesc& model, const RankShard& shard, const std::string& at) {
  MUSTER_TRY(check_range(shard.vocab, model.vocab, at + ".vocab", false));
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    const BlockSpec& block = model.blocks[i];
    const std::string where = at + " in layer " + text(i);
    MUSTER_TRY(check_range(shard.heads, block.attention.heads, where + ".heads", false));
    MUSTER_TRY(check_range(shard.kv_heads, block.attention.kv_heads, where + ".kv_heads", false));
    const uint32_t per_kv = block.attention.heads / block.attention.kv_heads;
    if (shard.heads.begin / per_kv < shard.kv_heads.begin || (shard.heads.end - 1) / per_kv >= shard.kv_heads.end)
      return Status::invalid(where + ".kv_heads", "does not hold the kv heads that query heads " + text(shard.heads.begin) + ".." + text(shard.heads.end) + " read");
    if (block.dense_ffn) {
      MUSTER_TRY(check_range(shard.dense_ffn, block.dense_ffn, where + ".dense_ffn", true));
      continue;
    }
    if (block.moe.shared_ffn) MUSTER_TRY(check_range(shard.shared_ffn, block.moe.shared_ffn, where + ".shared_ffn", true));
    MUSTER_TRY(check_range(shard.expert_ffn, block.moe.expert_ffn, where + ".expert_ffn", true));
    for (size_t e = 0; e < shard.experts.size(); ++e)
      if (shard.experts[e] >= block.moe.experts || (e && shard.experts[e] <= shard.experts[e - 1]))
        return Status::invalid(where + ".experts[" + text(e) + "]", text(shard.experts[e]) + " is not an ascending expert id below " + text(block.moe.experts));
  }
  return Status::ok();
}

}  // namespace

Status check_model(const ModelDesc& model) {
  if (model.vocab == 0) return Status::invalid("model.vocab", "is 0");
  if (model.hidden == 0) return Status::invalid("model.hidden", "is 0");
  if (model.context_tokens == 0) return Status::invalid("model.context_tokens", "is 0");
  if (!(model.norm_eps >= 0) || !std::isfinite(model.norm_eps)) return Status::invalid("model.norm_eps", "is not a number that is at least 0");
  if (model.blocks.empty()) return Status::invalid("model.blocks", "is empty");
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    const std::string at = "model.blocks[" + text(i) + "]";
    MUSTER_TRY(check_attention(model.blocks[i].attention, at + ".attention"));
    if (!model.blocks[i].dense_ffn) MUSTER_TRY(check_moe(model.blocks[i].moe, at + ".moe"));
  }
  if (model.kv_groups.size() != 1) return Status::unsupported("model.kv_groups", text(model.kv_groups.size()) + " KV groups; one is supported");
  const KvGroupSpec& group = model.kv_groups[0];
  if (group.blocks.size() != model.blocks.size()) return Status::invalid("model.kv_groups[0].blocks", "must name every layer once");
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    const AttentionSpec& attention = model.blocks[i].attention;
    if (group.blocks[i] != i) return Status::invalid("model.kv_groups[0].blocks", "must name every layer once, in order");
    if (attention.kv_heads != group.kv_heads || attention.head_dim != group.head_dim)
      return Status::unsupported("model.kv_groups[0]", "layer " + text(i) + " has another KV shape than its group");
  }
  return Status::ok();
}

Status check_group(const ModelDesc& model, const GroupDesc& group) {
  if (group.world == 0 || group.worker_of_rank.size() != group.world)
    return Status::invalid("group.worker_of_rank", text(group.worker_of_rank.size()) + " entries for " + text(group.world) + " ranks");
  if (group.local.empty()) return Status::invalid("group.local", "this worker has no rank");
  size_t mine = 0;
  for (uint32_t rank = 0; rank < group.world; ++rank) {
    if (group.worker_of_rank[rank] >= group.workers) return Status::invalid("group.worker_of_rank[" + text(rank) + "]", "is not below " + text(group.workers));
    if (group.worker_of_rank[rank] != group.worker) continue;
    if (mine >= group.local.size() || group.local[mine].rank != rank) return Status::invalid("group.local", "rank " + text(rank) + " of this worker is missing or out of order");
    ++mine;
  }
  if (mine != group.local.size()) return Status::invalid("group.local", "holds a rank of another worker");
  for (size_t i = 0; i < group.local.size(); ++i) MUSTER_TRY(check_shard(model, group.local[i], "group.local[" + text(i) + "]"));
  return Status::ok();
}

Status check_options(const EngineOptions& options) {
  struct Bound { const char* name; uint64_t value, low, high; };
  const Bound bounds[] = {
      {"options.kv_block_tokens", options.kv_block_tokens, 1, 4096}, {"options.rows_max", options.rows_max, 1, 65536},
      {"options.tokens_max", options.tokens_max, 1, 1 << 20},        {"options.verify_max", options.verify_max, 0, 1024},
      {"options.slots_max", options.slots_max, 1, 1 << 20},          {"options.logprobs_max", options.logprobs_max, 0, 1024},
      {"options.logit_bias_max", options.logit_bias_max, 0, 1 << 20}, {"options.in_flight_max", options.in_flight_max, 1, 16},
      {"options.threads", options.threads, 0, 4096},
  };
  for (const Bound& bound : bounds)
    if (bound.value < bound.low || bound.value > bound.high)
      return Status::invalid(bound.name, text(bound.value) + " is not within " + text(bound.low) + " and " + text(bound.high));
  return Status::ok();
}

}  // namespace muster

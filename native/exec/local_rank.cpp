#include "exec/local_rank.h"

#include <algorithm>

namespace muster {

Status LocalRank::create(const ModelDesc& model, const RankShard& shard, const EngineOptions& options, std::unique_ptr<LocalRank>* out) {
  DeviceOptions device;
  device.threads = options.threads;
  device.tokens_max = options.tokens_max;
  device.rows_max = std::max(options.rows_max, std::min(options.tokens_max, kHeadRowsMax));
  device.hidden = model.hidden;
  device.isa = options.isa;
  for (const BlockSpec& block : model.blocks) {
    device.qkv_max = std::max(device.qkv_max, (shard.heads.size() + 2 * shard.kv_heads.size()) * block.attention.head_dim);
    if (block.dense_ffn) {
      device.ffn_max = std::max(device.ffn_max, shard.dense_ffn.size());
    } else {
      device.ffn_max = std::max({device.ffn_max, shard.shared_ffn.size(), shard.expert_ffn.size()});
      device.top_k_max = std::max(device.top_k_max, block.moe.top_k);
    }
  }
  std::unique_ptr<LocalRank> rank(new LocalRank(model, shard, options));
  MUSTER_TRY(make_ops(options, device, &rank->ops_));
  *out = std::move(rank);
  return Status::ok();
}

Status LocalRank::make_ops(const EngineOptions& options, const DeviceOptions& device, std::unique_ptr<OpTable>* out) {
  if (options.backend == "cpu") return make_cpu_ops(device, out);
  if (options.backend == "ref") return make_ref_ops(device, out);
  return Status::unsupported("options.backend", "\"" + options.backend + "\"; supported are cpu and ref");
}

Status LocalRank::load(const ModelFiles& files, std::span<const TensorSlice> slices, const LoadWatch& watch) {
  return load_rank({&model_, &shard_, &files, slices, watch}, *ops_, &weights_);
}

Status LocalRank::kv_init(const Start& start) {
  const RankClaim claim{&model_, &shard_, ops_->numerics(), start.world, options_.kv_block_tokens, start.kv_blocks, weights_.layout_digest};
  MUSTER_TRY(agree(claim, comm_, &agreement_));
  const Rank rank{&model_, &shard_, ops_.get(), comm_};
  KvDesc kv;
  kv.layers = uint32_t(model_.blocks.size());
  kv.kv_heads = shard_.kv_heads.size();
  kv.head_dim = model_.kv_groups[0].head_dim;
  kv.blocks = start.kv_blocks;
  kv.block_tokens = options_.kv_block_tokens;
  MUSTER_TRY(ops_->kv_init(kv));
  executor_ = std::make_unique<Executor>(rank, weights_);
  MUSTER_TRY(executor_->alloc(options_.tokens_max));
  chooser_ = std::make_unique<Chooser>(rank, weights_.head_or_tied(), ChooserOptions{options_.tokens_max, start.keeper, agreement_.vocab_of_rank});
  return comm_ ? comm_->barrier(shard_.rank) : Status::ok();
}

Status LocalRank::step(const StepWork& work, std::vector<RowChoices>* choices) {
  if (comm_) comm_->begin(shard_.rank, work.epoch);
  if (work.experts) MUSTER_TRY(switch_experts(work.experts));
  for (const auto& [from, to] : work.copies) MUSTER_TRY(ops_->kv_copy(from, to));
  if (work.ids.empty()) {
    choices->assign(work.rows.size(), {});
    return Status::ok();
  }
  Batch batch;
  batch.tokens = uint32_t(work.ids.size());
  batch.ids = work.ids.data();
  batch.positions = work.positions.data();
  batch.sequence = work.sequence.data();
  batch.tables = work.tables;
  MUSTER_TRY(executor_->forward(batch, !work.head.empty()));
  return chooser_->run(work, executor_->normed(), executor_->router_gaps(), choices);
}

Status LocalRank::begin_stage(const ExpertMap& map, StagedExperts* out) {
  staged_ = {};
  *out = {map.version, {}, {}, {}};
  std::vector<std::vector<bool>> named(model_.blocks.size());
  for (size_t i = 0; i < map.shares.size(); ++i) {
    const ExpertShare& share = map.shares[i];
    if (share.rank != shard_.rank) continue;
    const std::string at = "shares[" + std::to_string(i) + "]";
    if (share.block >= model_.blocks.size() || model_.blocks[share.block].dense_ffn)
      return Status::invalid(at + ".block", std::to_string(share.block) + " is no layer with experts");
    const uint32_t experts = model_.blocks[share.block].moe.experts;
    if (share.expert >= experts) return Status::invalid(at + ".expert", std::to_string(share.expert) + " of " + std::to_string(experts) + " experts");
    if (share.copies == 0 || share.copy >= share.copies)
      return Status::invalid(at + ".copy", std::to_string(share.copy) + " of " + std::to_string(share.copies) + " copies");
    std::vector<bool>& layer = named[share.block];
    layer.resize(experts);
    if (layer[share.expert]) return Status::invalid(at + ".expert", "rank " + std::to_string(shard_.rank) + " would hold it twice in this layer");
    layer[share.expert] = true;
    out->shares.push_back(share);
    if (shard_.expert_ffn.size() && !weights_.blocks[share.block].expert_gate_up[share.expert]) out->added.push_back({share.block, share.expert});
  }
  if (packer_) return Status::ok();
  DeviceOptions device;
  device.isa = options_.isa;
  return make_ops(options_, device, &packer_);
}

Status LocalRank::read_stage(const ModelFiles& files, std::span<const TensorSlice> slices, const LoadWatch& watch, StagedExperts* stage) {
  return load_experts({&model_, &shard_, &files, slices, watch}, stage->added, *packer_, &stage->weights);
}

Status LocalRank::switch_experts(uint32_t version) {
  if (version != staged_.version) return Status::internal("experts", "map " + std::to_string(version) + " is not staged");
  StagedExperts stage = std::move(staged_);
  staged_ = {};
  for (size_t i = 0; i < stage.added.size(); ++i) {
    weights_.bytes += stage.weights[i].bytes();
    weights_.blocks[stage.added[i].block].experts[stage.added[i].expert] = std::move(stage.weights[i]);
  }
  for (BlockWeights& block : weights_.blocks) {
    std::ranges::fill(block.expert_gate_up, nullptr);
    std::ranges::fill(block.expert_down, nullptr);
    block.copies.clear();
  }
  for (const ExpertShare& share : stage.shares) {
    BlockWeights& block = weights_.blocks[share.block];
    block.expert_gate_up[share.expert] = block.experts[share.expert].gate_up.get();
    block.expert_down[share.expert] = block.experts[share.expert].down.get();
    if (share.copies == 1) continue;
    block.copies.resize(block.experts.size());
    block.copies[share.expert] = {share.copy, share.copies};
  }
  for (BlockWeights& block : weights_.blocks) {
    for (size_t expert = 0; expert < block.experts.size(); ++expert) {
      if (block.expert_gate_up[expert]) continue;
      weights_.bytes -= block.experts[expert].bytes();
      block.experts[expert] = {};
    }
  }
  return Status::ok();
}

Memory LocalRank::memory() const {
  Memory out;
  out.weights = weights_.bytes;
  out.kv = ops_->kv_bytes();
  out.activations = executor_ ? executor_->activation_bytes() + chooser_->activation_bytes() : 0;
  out.communication = chooser_ ? chooser_->communication_bytes() : 0;
  return out;
}

}  // namespace muster

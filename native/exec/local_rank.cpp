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
  if (options.backend == "cpu") {
    MUSTER_TRY(make_cpu_ops(device, &rank->ops_));
  } else if (options.backend == "ref") {
    MUSTER_TRY(make_ref_ops(device, &rank->ops_));
  } else {
    return Status::unsupported("options.backend", "\"" + options.backend + "\"; supported are cpu and ref");
  }
  *out = std::move(rank);
  return Status::ok();
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

Memory LocalRank::memory() const {
  Memory out;
  out.weights = weights_.bytes;
  out.kv = ops_->kv_bytes();
  out.activations = executor_ ? executor_->activation_bytes() + chooser_->activation_bytes() : 0;
  out.communication = chooser_ ? chooser_->communication_bytes() : 0;
  return out;
}

}  // namespace muster

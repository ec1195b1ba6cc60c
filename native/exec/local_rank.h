// One rank of this worker: its device, weights, activations and logit buffers, and the steps of its life.
#pragma once
#include "exec/agreement.h"
#include "exec/chooser.h"
#include "exec/loader.h"

namespace muster {

class LocalRank {
 public:
  static Status create(const ModelDesc& model, const RankShard& shard, const EngineOptions& options, std::unique_ptr<LocalRank>* out);
  void connect(Comm* comm) { comm_ = comm; }

  Status load(const ModelFiles& files, std::span<const TensorSlice> slices, const LoadWatch& watch);
  // `keeper`: the one that assembles the worker's results.
  struct Start { uint32_t world = 1, kv_blocks = 0; bool keeper = false; };
  Status kv_init(const Start& start);
  Status step(const StepWork& work, std::vector<RowChoices>* choices);

  uint32_t rank() const { return shard_.rank; }
  const RankShard& shard() const { return shard_; }
  const std::string& numerics_id() const { return agreement_.numerics_id; }
  Memory memory() const;
  void count_experts(std::vector<std::vector<uint64_t>>* counts) const { executor_->count_experts(counts); }

 private:
  LocalRank(const ModelDesc& model, const RankShard& shard, const EngineOptions& options) : model_(model), shard_(shard), options_(options) {}
  const ModelDesc& model_;
  const RankShard& shard_;
  const EngineOptions& options_;
  Comm* comm_ = nullptr;
  std::unique_ptr<OpTable> ops_;
  RankWeights weights_;   // freed before the device
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Chooser> chooser_;
  Agreement agreement_;
};

}  // namespace muster

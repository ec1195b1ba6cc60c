// One rank of this worker: its device, weights, activations and logit buffers, and the steps of its life.
//
//   R1  a map of experts is staged beside the steps: what it adds is packed by a table of its own, and no step sees it before
//       the one that switches. Only the engine's thread touches what steps use: it drops, takes over and switches.
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

  // What a map adds to what this rank holds, ready to be switched to.
  struct StagedExperts {
    uint32_t version = 0;
    std::vector<ExpertShare> shares;           // of this rank, the whole map
    std::vector<ExpertPlace> added;
    std::vector<GatedWeights> weights;         // of `added`
  };
  // On the engine's thread: what of the map is not here yet.
  Status begin_stage(const ExpertMap& map, StagedExperts* out);
  // On the caller's thread, beside steps.
  Status read_stage(const ModelFiles& files, std::span<const TensorSlice> slices, const LoadWatch& watch, StagedExperts* stage);
  // On the engine's thread.
  void take_stage(StagedExperts stage) { staged_ = std::move(stage); }

  uint32_t rank() const { return shard_.rank; }
  const RankShard& shard() const { return shard_; }
  const std::string& numerics_id() const { return agreement_.numerics_id; }
  Memory memory() const;
  void count_experts(std::vector<std::vector<uint64_t>>* counts) const { executor_->count_experts(counts); }

 private:
  static Status make_ops(const EngineOptions& options, const DeviceOptions& device, std::unique_ptr<OpTable>* out);
  Status switch_experts(uint32_t version);
  LocalRank(const ModelDesc& model, const RankShard& shard, const EngineOptions& options) : model_(model), shard_(shard), options_(options) {}
  const ModelDesc& model_;
  const RankShard& shard_;
  const EngineOptions& options_;
  Comm* comm_ = nullptr;
  std::unique_ptr<OpTable> ops_;
  std::unique_ptr<OpTable> packer_;  // of staged experts: one thread, no rows
  RankWeights weights_;   // freed before the device
  StagedExperts staged_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Chooser> chooser_;
  Agreement agreement_;
};

}  // namespace muster

// The walk over a model's blocks, written once for every backend. Owns one rank's activations; does not own weights, KV
// contents, slots or the choice of tokens.
//
//   X1  every rank of the group runs the same ops on the same rows in the same order; only `sum` speaks to others.
//   X2  a row's bits depend on its own tokens and tables alone (O1 of the op table, rank-ordered sums of comm.h).
#pragma once
#include <vector>

#include "exec/weights.h"
#include "muster/comm.h"

namespace muster {

struct Rank {                 // what one rank is made of; borrowed
  const ModelDesc* model = nullptr;
  const RankShard* shard = nullptr;
  OpTable* ops = nullptr;
  Comm* comm = nullptr;       // null where the group is one rank
};

class Executor {
 public:
  Executor(const Rank& rank, const RankWeights& weights) : rank_(rank), weights_(weights) {}
  Status alloc(uint32_t tokens_max);
  uint64_t activation_bytes() const { return bytes_; }

  // Runs all blocks. Afterwards normed() holds the final norm's rows, if `wants_head`.
  Status forward(const Batch& batch, bool wants_head);
  Rows normed() const { return h_; }
  // By token of the last forward: the smallest router gap over the MoE blocks (infinity without any).
  std::span<const float> router_gaps() const { return gaps_; }
  // Adds the tokens that the last forward sent to each expert: [block][expert].
  void count_experts(std::vector<std::vector<uint64_t>>* counts) const;

 private:
  Status attention_half(size_t layer, const Batch& batch, Rows delta);
  Status mlp_half(size_t layer, const Batch& batch);
  Status moe(size_t layer, const Batch& batch);
  std::span<const uint32_t> own_choices(size_t layer, const Batch& batch, std::span<const uint32_t> chosen);
  Status sum(Rows rows, uint32_t tokens);
  Status alloc_rows(uint32_t tokens, uint32_t cols, Rows* out);

  Rank rank_;
  const RankWeights& weights_;
  Rows x_ = nullptr, h_ = nullptr, d_ = nullptr, qkv_ = nullptr, attended_ = nullptr;
  std::vector<uint32_t> own_;         // [tokens, top_k] of one layer, where experts have copies
  std::vector<uint32_t> expert_;      // [blocks of MoE kind, tokens, top_k] of the last forward
  std::vector<float> weight_, gap_, gaps_;
  uint32_t top_k_max_ = 0, tokens_max_ = 0, tokens_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace muster

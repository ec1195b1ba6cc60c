// The weights of one rank in the backend's layout, stacked the way the executor multiplies them.
#pragma once
#include <memory>
#include <vector>

#include "exec/op_table.h"

namespace muster {

using WeightPtr = std::unique_ptr<Weight>;

struct GatedWeights {           // gate rows first, then up rows; down. Null where the rank holds no part of it.
  WeightPtr gate_up, down;
  uint64_t bytes() const { return (gate_up ? gate_up->bytes : 0) + (down ? down->bytes : 0); }
};

struct ExpertCopy { uint32_t copy = 0, copies = 1; };

struct BlockWeights {
  WeightPtr attention_norm, qkv, output, mlp_norm;
  GatedWeights ffn;             // the dense FFN, or the shared expert of a MoE block
  WeightPtr router;
  std::vector<GatedWeights> experts;                         // by global id
  // Views into `experts`, as ExpertsDesc wants them, and one more that is always null: the id of what other copies compute.
  std::vector<const Weight*> expert_gate_up, expert_down;
  std::vector<ExpertCopy> copies;                            // by global id; empty where every expert has one copy
};

struct RankWeights {
  WeightPtr embedding, final_norm, head;  // head is null where the embedding is tied
  std::vector<BlockWeights> blocks;
  uint64_t bytes = 0;
  uint64_t layout_digest = 0;             // over role, place and stored type of every slice: part of the numerics id

  const Weight& head_or_tied() const { return head ? *head : *embedding; }
};

}  // namespace muster

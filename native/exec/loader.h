// Turns a worker's tensor slices into weights: reads the kept bytes of every plane that the model and the rank's shard ask
// for, stacks them (query, key, value; gate, up) and packs them through the op table.
//
//   L1  every plane is there exactly once, with the shape that ModelDesc and RankShard give; else invalid names it.
//   L2  host memory is bounded by one stacked weight at a time (besides what the backend keeps).
#pragma once
#include "exec/slice_reader.h"
#include "exec/weights.h"

namespace muster {

struct PlaneKey {
  Role role;
  int32_t block, expert;  // -1 where there is none
  auto operator<=>(const PlaneKey&) const = default;
};

// The planes a rank needs and what each must look like, in load order.
struct PlaneNeed { PlaneKey key; uint32_t rows, cols; Range keep_rows, keep_cols; };
std::vector<PlaneNeed> planes_of(const ModelDesc& model, const RankShard& shard);

struct LoadRequest {
  const ModelDesc* model = nullptr;
  const RankShard* shard = nullptr;
  const ModelFiles* files = nullptr;
  std::span<const TensorSlice> slices;  // of all ranks of the worker; the shard's are picked
  LoadWatch watch;
};
// Checks all slices of the rank before a byte is read; `bytes` gets what will be read.
Status check_slices(const LoadRequest& request, uint64_t* bytes);
Status load_rank(const LoadRequest& request, OpTable& ops, RankWeights* out);

// Experts of single layers, for a map that is staged; in the order asked. L1 and L2 hold.
struct ExpertPlace { uint32_t block = 0, expert = 0; };
Status load_experts(const LoadRequest& request, std::span<const ExpertPlace> places, OpTable& ops, std::vector<GatedWeights>* out);

}  // namespace muster

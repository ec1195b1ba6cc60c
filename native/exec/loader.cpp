#include "exec/loader.h"

#include <map>

#include "exec/digest.h"

namespace muster {
namespace {

const char* role_name(Role role) {
  static const char* const names[] = {"?", "embedding", "final_norm", "head", "attention_norm", "query", "key", "value",
                                      "output", "mlp_norm", "gate", "up", "down", "router", "expert_gate", "expert_up",
                                      "expert_down", "shared_gate", "shared_up", "shared_down", "rope_factors"};
  const auto index = size_t(role);
  return index < std::size(names) ? names[index] : names[0];
}

std::string describe(const PlaneKey& key, uint32_t rank) {
  std::string text = role_name(key.role);
  if (key.block >= 0) text += " of layer " + std::to_string(key.block);
  if (key.expert >= 0) text += ", expert " + std::to_string(key.expert);
  return text + ", rank " + std::to_string(rank);
}

std::string shape(uint32_t rows, uint32_t cols) { return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]"; }
std::string kept(const Range& rows, const Range& cols) {
  return "rows " + std::to_string(rows.begin) + ".." + std::to_string(rows.end) + ", columns " + std::to_string(cols.begin) + ".." +
         std::to_string(cols.end);
}
bool same(const Range& a, const Range& b) { return a.begin == b.begin && a.end == b.end; }
Range scaled(const Range& range, uint32_t by) { return {range.begin * by, range.end * by}; }

struct NeedList {
  std::vector<PlaneNeed> needs;
  int32_t block = -1, expert = -1;

  void whole(Role role, uint32_t rows, uint32_t cols) { add(role, rows, cols, {0, rows}, {0, cols}); }
  void add(Role role, uint32_t rows, uint32_t cols, Range keep_rows, Range keep_cols) {
    needs.push_back({{role, block, expert}, rows, cols, keep_rows, keep_cols});
  }
  // gate and up lose rows, down loses columns; nothing where the rank holds none of it
  void gated(Role gate, uint32_t ffn, uint32_t hidden, Range keep) {
    if (keep.size() == 0) return;
    add(gate, ffn, hidden, keep, {0, hidden});
    add(Role(uint8_t(gate) + 1), ffn, hidden, keep, {0, hidden});
    add(Role(uint8_t(gate) + 2), hidden, ffn, {0, hidden}, keep);
  }
};
static_assert(uint8_t(Role::gate) + 2 == uint8_t(Role::down) && uint8_t(Role::expert_gate) + 2 == uint8_t(Role::expert_down) &&
              uint8_t(Role::shared_gate) + 2 == uint8_t(Role::shared_down));

void add_block(const BlockSpec& block, uint32_t hidden, const RankShard& shard, NeedList* list) {
  const AttentionSpec& attention = block.attention;
  const Range heads = scaled(shard.heads, attention.head_dim), kv = scaled(shard.kv_heads, attention.head_dim);
  list->whole(Role::attention_norm, 1, hidden);
  list->add(Role::query, attention.heads * attention.head_dim, hidden, heads, {0, hidden});
  list->add(Role::key, attention.kv_heads * attention.head_dim, hidden, kv, {0, hidden});
  list->add(Role::value, attention.kv_heads * attention.head_dim, hidden, kv, {0, hidden});
  list->add(Role::output, hidden, attention.heads * attention.head_dim, {0, hidden}, heads);
  list->whole(Role::mlp_norm, 1, hidden);
  if (block.dense_ffn) return list->gated(Role::gate, block.dense_ffn, hidden, shard.dense_ffn);
  list->whole(Role::router, block.moe.experts, hidden);
  if (block.moe.shared_ffn) list->gated(Role::shared_gate, block.moe.shared_ffn, hidden, shard.shared_ffn);
  for (const uint32_t expert : shard.experts) {
    list->expert = int32_t(expert);
    list->gated(Role::expert_gate, block.moe.expert_ffn, hidden, shard.expert_ffn);
  }
  list->expert = -1;
}

using SliceMap = std::map<PlaneKey, const TensorSlice*>;

Status collect(const LoadRequest& request, SliceMap* out) {
  const uint32_t rank = request.shard->rank;
  for (const TensorSlice& slice : request.slices) {
    // The frequencies of RopeSpec already hold these factors.
    if (slice.rank != rank || slice.role == Role::rope_factors) continue;
    const PlaneKey key{slice.role, slice.block, slice.expert};
    if (!out->emplace(key, &slice).second) return Status::invalid(slice.name, describe(key, rank) + " is given twice");
  }
  return Status::ok();
}

Status match(const LoadRequest& request, const std::vector<PlaneNeed>& needs, const SliceMap& slices, uint64_t* bytes) {
  const uint32_t rank = request.shard->rank;
  for (const PlaneNeed& need : needs) {
    const auto found = slices.find(need.key);
    if (found == slices.end()) return Status::invalid(describe(need.key, rank), "is missing");
    const TensorSlice& slice = *found->second;
    const std::string what = slice.name + " (" + describe(need.key, rank) + ")";
    if (slice.rows != need.rows || slice.cols != need.cols)
      return Status::invalid(what, "is " + shape(slice.rows, slice.cols) + ", the model asks for " + shape(need.rows, need.cols));
    if (!same(slice.keep_rows, need.keep_rows) || !same(slice.keep_cols, need.keep_cols))
      return Status::invalid(what, "keeps " + kept(slice.keep_rows, slice.keep_cols) + ", the shard asks for " + kept(need.keep_rows, need.keep_cols));
    if (slice.file >= request.files->size())
      return Status::invalid(what, "names file " + std::to_string(slice.file) + " of " + std::to_string(request.files->size()));
    SlicePlan plan;
    MUSTER_TRY(plan_slice(slice, request.files->length(slice.file), &plan));
    *bytes += plan.bytes();
  }
  if (slices.size() == needs.size()) return Status::ok();
  for (const auto& [key, slice] : slices) {
    bool wanted = false;
    for (const PlaneNeed& need : needs) wanted = wanted || need.key == key;
    if (!wanted) return Status::invalid(slice->name, describe(key, rank) + " has no place in this model");
  }
  return Status::ok();
}

class RankLoader {
 public:
  RankLoader(const LoadRequest& request, OpTable& ops, RankWeights* out) : request_(request), ops_(ops), out_(out) {}

  Status run() {
    MUSTER_TRY(collect(request_, &slices_));
    uint64_t bytes = 0;
    MUSTER_TRY(match(request_, planes_of(*request_.model, *request_.shard), slices_, &bytes));
    const ModelDesc& model = *request_.model;
    MUSTER_TRY(stack({{Role::embedding, -1, -1}}, &out_->embedding));
    MUSTER_TRY(vector({Role::final_norm, -1, -1}, &out_->final_norm));
    if (!model.tied_head) MUSTER_TRY(stack({{Role::head, -1, -1}}, &out_->head));
    out_->blocks.resize(model.blocks.size());
    for (size_t i = 0; i < model.blocks.size(); ++i) MUSTER_TRY(block(int32_t(i)));
    out_->layout_digest = digest_.value;
    return Status::ok();
  }

  Status run(std::span<const ExpertPlace> places, std::vector<GatedWeights>* out) {
    NeedList list;
    for (const ExpertPlace& place : places) {
      list.block = int32_t(place.block);
      list.expert = int32_t(place.expert);
      list.gated(Role::expert_gate, request_.model->blocks[place.block].moe.expert_ffn, request_.model->hidden, request_.shard->expert_ffn);
    }
    MUSTER_TRY(collect(request_, &slices_));
    uint64_t bytes = 0;
    MUSTER_TRY(match(request_, list.needs, slices_, &bytes));
    out->clear();
    for (const ExpertPlace& place : places)
      MUSTER_TRY(gated(Role::expert_gate, int32_t(place.block), int32_t(place.expert), &out->emplace_back()));
    return Status::ok();
  }

 private:
  Status block(int32_t index) {
    const BlockSpec& spec = request_.model->blocks[size_t(index)];
    const RankShard& shard = *request_.shard;
    BlockWeights& weights = out_->blocks[size_t(index)];
    MUSTER_TRY(vector({Role::attention_norm, index, -1}, &weights.attention_norm));
    MUSTER_TRY(stack({{Role::query, index, -1}, {Role::key, index, -1}, {Role::value, index, -1}}, &weights.qkv));
    MUSTER_TRY(stack({{Role::output, index, -1}}, &weights.output));
    MUSTER_TRY(vector({Role::mlp_norm, index, -1}, &weights.mlp_norm));
    if (spec.dense_ffn) return shard.dense_ffn.size() ? gated(Role::gate, index, -1, &weights.ffn) : Status::ok();
    MUSTER_TRY(stack({{Role::router, index, -1}}, &weights.router));
    if (spec.moe.shared_ffn && shard.shared_ffn.size()) MUSTER_TRY(gated(Role::shared_gate, index, -1, &weights.ffn));
    weights.experts.resize(spec.moe.experts);
    weights.expert_gate_up.assign(spec.moe.experts + 1, nullptr);
    weights.expert_down.assign(spec.moe.experts + 1, nullptr);
    for (const uint32_t expert : shard.experts) {
      if (!shard.expert_ffn.size()) break;
      MUSTER_TRY(gated(Role::expert_gate, index, int32_t(expert), &weights.experts[expert]));
      weights.expert_gate_up[expert] = weights.experts[expert].gate_up.get();
      weights.expert_down[expert] = weights.experts[expert].down.get();
    }
    return Status::ok();
  }

  Status gated(Role gate, int32_t block, int32_t expert, GatedWeights* out) {
    MUSTER_TRY(stack({{gate, block, expert}, {Role(uint8_t(gate) + 1), block, expert}}, &out->gate_up));
    return stack({{Role(uint8_t(gate) + 2), block, expert}}, &out->down);
  }

  Status stack(const std::vector<PlaneKey>& keys, WeightPtr* out) {
    std::vector<HostMatrix> parts(keys.size());
    std::vector<StoredMatrix> views;
    for (size_t i = 0; i < keys.size(); ++i) {
      MUSTER_TRY(read(keys[i], &parts[i]));
      views.push_back(parts[i].view);
    }
    MUSTER_TRY(ops_.pack(views, out));
    out_->bytes += (*out)->bytes;
    return Status::ok();
  }

  Status vector(const PlaneKey& key, WeightPtr* out) {
    HostMatrix part;
    MUSTER_TRY(read(key, &part));
    MUSTER_TRY(ops_.pack_vector(part.view, out));
    out_->bytes += (*out)->bytes;
    return Status::ok();
  }

  Status read(const PlaneKey& key, HostMatrix* out) {
    const TensorSlice& slice = *slices_.at(key);
    for (const uint32_t value : {uint32_t(key.role), uint32_t(key.block), uint32_t(key.expert), uint32_t(slice.type)}) digest_.add(value);
    return read_slice(*request_.files, slice, request_.watch, out);
  }

  const LoadRequest& request_;
  OpTable& ops_;
  RankWeights* out_;
  SliceMap slices_;
  Digest digest_;
};

}  // namespace

std::vector<PlaneNeed> planes_of(const ModelDesc& model, const RankShard& shard) {
  NeedList list;
  list.add(Role::embedding, model.vocab, model.hidden, shard.vocab, {0, model.hidden});
  list.whole(Role::final_norm, 1, model.hidden);
  if (!model.tied_head) list.add(Role::head, model.vocab, model.hidden, shard.vocab, {0, model.hidden});
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    list.block = int32_t(i);
    add_block(model.blocks[i], model.hidden, shard, &list);
  }
  return std::move(list.needs);
}

Status check_slices(const LoadRequest& request, uint64_t* bytes) {
  SliceMap slices;
  MUSTER_TRY(collect(request, &slices));
  return match(request, planes_of(*request.model, *request.shard), slices, bytes);
}

Status load_rank(const LoadRequest& request, OpTable& ops, RankWeights* out) { return RankLoader(request, ops, out).run(); }

Status load_experts(const LoadRequest& request, std::span<const ExpertPlace> places, OpTable& ops, std::vector<GatedWeights>* out) {
  RankWeights counted;
  return RankLoader(request, ops, &counted).run(places, out);
}

}  // namespace muster

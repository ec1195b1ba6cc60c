// The reference backend: every op of exec/op_table.h in plain loops, the specification that other backends are held to.
// Owns its rows, weights (dequantised to f32, row-major) and KV memory; does not own batching, tables or sampling.
//
//   X1  every reduction runs in f64 in ascending order and is rounded once to f32; so are the elementwise ops.
//   X2  no index of a batch leaves its table or the cache: a batch that would is refused with internal.
//   X3  nothing is allocated after pack and kv_init.
#pragma once
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "exec/op_table.h"

namespace muster::ref {

struct Free { void operator()(void* memory) const { std::free(memory); } };
template <class T> using Memory = std::unique_ptr<T[], Free>;
// Zeroed, untouched until written; null when there is none.
template <class T> Memory<T> allocate(uint64_t count) { return Memory<T>(static_cast<T*>(std::calloc(count ? count : 1, sizeof(T)))); }

struct RefWeight : Weight {
  Memory<float> values;  // [rows, cols]
  const float* row(uint64_t r) const { return values.get() + r * cols; }
};
inline const RefWeight& as_ref(const Weight& weight) { return static_cast<const RefWeight&>(weight); }

double dot(const float* a, const float* b, uint64_t count);

// K and V of every layer: [layer][block][kv head][token of the block][head_dim].
struct KvCache {
  KvDesc desc;
  Memory<float> keys, values;
  uint64_t tokens_max() const { return uint64_t{desc.blocks} * desc.block_tokens; }
  uint64_t count() const { return uint64_t{desc.layers} * desc.blocks * desc.kv_heads * desc.block_tokens * desc.head_dim; }
  uint64_t offset(uint32_t layer, uint32_t block, uint32_t head, uint32_t token) const {
    return (((uint64_t{layer} * desc.blocks + block) * desc.kv_heads + head) * desc.block_tokens + token) * desc.head_dim;
  }
};

class RefOps final : public OpTable {
 public:
  std::string numerics() const override { return "ref-exact-1"; }

  Status alloc_rows(uint32_t rows, uint32_t cols, Rows* out) override;
  Status pack(std::span<const StoredMatrix> parts, std::unique_ptr<Weight>* out) override;
  Status pack_vector(const StoredMatrix& vector, std::unique_ptr<Weight>* out) override;
  Status kv_init(const KvDesc& desc) override;
  uint64_t kv_bytes() const override { return 2 * cache_.count() * sizeof(float); }
  Status kv_copy(uint32_t from, uint32_t to) override;

  Status embed(const Weight& table, uint32_t first, const Batch& batch, Rows out) override;
  Status add_norm(const Weight& weight, double eps, uint32_t tokens, Rows x, Rows delta, Rows out) override;
  Status linear(const Weight& weight, uint32_t tokens, Rows in, Rows out) override;
  Status rope_kv(const RopeDesc& desc, const Batch& batch, Rows qkv) override;
  Status attention(const AttentionDesc& desc, const Batch& batch, Rows qkv, Rows out) override;
  Status dense_ffn(const Weight& gate_up, const Weight& down, uint32_t tokens, Rows in, Rows out) override;
  Status route(const Weight& router, RouterScore score, uint32_t top_k, uint32_t tokens, Rows in, const RouteResult& out) override;
  Status experts(const ExpertsDesc& desc, uint32_t tokens, Rows in, Rows out) override;
  Status head(const Weight& head, std::span<const uint32_t> tokens, Rows in, std::span<float> logits) override;
  Status zero(uint32_t rows, uint32_t cols, Rows rows_out) override;
  Status view(Rows rows, uint64_t count, std::span<float>* out) override;
  Status commit(Rows rows, uint64_t count, std::span<const float> from) override;
  Status sync() override { return Status::ok(); }

 private:
  // Room for one vector as wide as the widest weight, in either direction; grown by pack.
  Status reserve_scratch(uint64_t count);
  // Where the position of a batch's token lies; internal where its table does not reach, or the block is none of the cache.
  Status find(const Batch& batch, uint32_t token, uint32_t position, uint32_t* block) const;
  struct Query {                               // one head of one token
    std::span<const uint32_t> table;
    uint32_t first = 0, position = 0, kv_head = 0;  // keys [first, position]
    const float* values = nullptr;
  };
  void attend(const AttentionDesc& desc, const Query& query, float* out);
  void add_expert(const ExpertsDesc& desc, uint64_t choice, const float* in);

  std::vector<Memory<float>> rows_;
  KvCache cache_;
  Memory<double> scores_;                      // [tokens_max]
  Memory<double> rotated_;                     // [head_dim]
  uint64_t scratch_count_ = 0;
  Memory<float> scaled_, activation_;          // [scratch_count_]
  Memory<double> sum_;                         // [scratch_count_]
};

}  // namespace muster::ref

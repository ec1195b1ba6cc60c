// The CPU backend: exec/op_table.h over panels, a thread pool and one kernel variant. Owns activation rows, KV memory, threads
// and scratch; does not own the order of sums (kernels.h) nor the meaning of ops (ref/).
//
//   D1  the bits of a row depend on its own input alone: not on batch mates, tiles, threads or instruction set. numerics()
//       therefore names neither.
//   D2  nothing is allocated after pack and kv_init for batches within DeviceOptions; where options say nothing, scratch grows
//       at first use and stays.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/panels.h"
#include "cpu/pool.h"
#include "cpu/rotation.h"
#include "exec/op_table.h"

namespace muster::cpu {

// Best first; only those that this CPU has.
std::vector<const Kernels*> kernels_of_this_cpu();

// [layer][block][ K: [kv head][key group][head_dim][16 keys]   V: [kv head][token][head_dim] ]
struct KvLayout {
  KvDesc desc;
  size_t k_head = 0, v_head = 0;     // floats of a head
  size_t v_at = 0, block = 0;        // floats: V after K, whole block
  size_t layer() const { return block * desc.blocks; }
  uint64_t floats() const { return uint64_t{layer()} * desc.layers; }
};

class CpuOps final : public OpTable {
 public:
  CpuOps(const DeviceOptions& options, const Kernels& kernels);
  Status reserve(const DeviceOptions& options);

  std::string numerics() const override { return "cpu-exact-1"; }
  Status alloc_rows(uint32_t rows, uint32_t cols, Rows* out) override;
  Status pack(std::span<const StoredMatrix> parts, std::unique_ptr<Weight>* out) override;
  Status pack_vector(const StoredMatrix& vector, std::unique_ptr<Weight>* out) override;
  Status kv_init(const KvDesc& desc) override;
  uint64_t kv_bytes() const override { return kv_.floats() * sizeof(float); }
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
  // One weight applied to consecutive rows; strides in floats.
  struct Product {
    const CpuWeight* weight = nullptr;
    uint32_t tokens = 0;
    const float* x = nullptr;
    float* out = nullptr;
    size_t x_stride = 0, out_stride = 0;
  };
  struct Slice { uint32_t begin = 0, end = 0; };  // of a product's tokens
  // Tokens of an expert: rows [first, first + count) of the slot-ordered scratch.
  struct ExpertRun { const CpuWeight *gate_up = nullptr, *down = nullptr; uint32_t first = 0, count = 0; };
  enum class Half { gate_up, down };

  Status multiply(const Product& product);
  Status multiply_padded(const Product& product);
  void multiply_group(const Product& product, uint32_t group, Slice slice, uint32_t thread);
  void gate_group(const Product& product, uint32_t group, Slice slice, uint32_t thread);
  Status gate_up(const Product& product);                      // gate_up rows, then silu(gate) * up in the gate columns
  uint32_t slices(uint32_t groups, uint32_t tokens) const;     // of tokens, where panels alone are too few tasks
  Status gather(const ExpertsDesc& desc, uint32_t tokens, const float* in);
  Status run_experts(Half half);
  Product expert_product(const ExpertRun& run, Half half) const;
  void combine(const ExpertsDesc& desc, uint32_t tokens, float* out);
  void rope_token(const RopeDesc& desc, uint32_t position, const float* turns, float* row) const;
  void write_kv(uint32_t layer, uint32_t block, uint32_t inside, const float* kv);
  Status check_tables(const Batch& batch) const;
  Status check_cache(const char* op, uint32_t layer, uint32_t kv_heads, uint32_t head_dim) const;
  float* thread_scratch(uint32_t thread) const { return thread_scratch_.floats() + thread * thread_stride_; }

  const Kernels& kernels_;
  Pool pool_;
  std::vector<Buffer> rows_;
  Buffer thread_scratch_;                       // linear_scratch or attend_scratch of each thread
  size_t thread_stride_ = 0;
  Buffer gated_;                                // [slots][2 * ffn]
  Buffer padded_, picked_;                      // inputs of padded weights; rows of the head
  Buffer expert_in_, expert_out_;               // [slots][hidden], by expert
  Buffer logits_;                               // [tokens][experts]
  std::vector<ExpertRun> runs_;                 // experts that have tokens, ascending
  std::vector<uint32_t> slot_row_;              // [tokens * top_k] row of the slot, none where the expert is not local
  std::vector<uint32_t> expert_rows_;           // [experts] next row, while gathering
  std::vector<uint32_t> run_tasks_;             // first task of each run
  KvLayout kv_;
  Buffer cache_;
  Rotations rotations_;
};

}  // namespace muster::cpu

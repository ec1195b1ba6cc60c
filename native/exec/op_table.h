// The op table: what a backend (ref, cpu, cuda) implements so that the one executor in exec/ can walk a model's blocks.
// One OpTable object is one device (rank); it owns that device's threads or stream. Ops run in call order; `sync` waits.
// `Rows` are activations in the backend's own activation type (f32 in exact mode) [rows, cols], row-major, device memory.
//
//   O1  the result of one row never depends on the other rows of the call, nor on the thread count.
//   O2  shapes were checked by the executor; an op trusts its Desc.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "muster/engine.h"
#include "muster/model.h"

namespace muster {

using Rows = void*;  // device pointer to activation rows

// A weight matrix part in host memory, as stored: `rows` rows of `row_bytes` bytes. Column c of the part is element
// col_first + c of the row's blocks (a cut may begin inside a block).
struct StoredMatrix {
  StoredType type = StoredType::f32;
  uint32_t rows = 0, cols = 0;      // kept
  uint32_t col_first = 0;           // of the first kept column inside the covering blocks
  uint64_t row_bytes = 0;           // covering bytes of a row
  std::span<const uint8_t> data;    // [rows * row_bytes]
};

class Weight {  // a linear's matrix in the backend's layout; may stack parts of several stored types on the out dimension
 public:
  virtual ~Weight() = default;
  uint32_t rows = 0, cols = 0;      // out, in
  uint64_t bytes = 0;               // device bytes
};

struct Batch {                       // what one step computes, the same for all layers
  uint32_t tokens = 0;
  const uint32_t* ids = nullptr;       // [tokens] host
  const uint32_t* positions = nullptr; // [tokens]
  const uint32_t* sequence = nullptr;  // [tokens] index into tables
  std::span<const std::span<const uint32_t>> tables;  // by sequence: KV block ids by block index
};

struct RopeDesc {       // what happens to q and k between projection and cache
  uint32_t heads = 0, kv_heads = 0, head_dim = 0;  // of this rank
  RopeLayout layout = RopeLayout::none;
  uint32_t dims = 0;
  std::span<const float> frequencies;
  bool unit_norm = false;
  double norm_eps = 0;
  double temperature_scale = 0;
  uint32_t temperature_floor = 0;
  uint32_t layer = 0;
};

struct AttentionDesc {
  uint32_t heads = 0, kv_heads = 0, head_dim = 0;  // of this rank; query head a reads kv head (first_head + a) / (heads per kv) - first_kv
  uint32_t first_head = 0, first_kv = 0, heads_per_kv = 1;
  double scale = 0;
  MaskKind mask = MaskKind::full;
  uint32_t mask_span = 0;
  uint32_t layer = 0;
};

struct RouteResult {                 // host memory, sized by the executor
  std::span<uint32_t> expert;        // [tokens, top_k], best first, ties to the lower id
  std::span<float> weight;           // [tokens, top_k]
  std::span<float> gap;              // [tokens] between the k-th and the next router logit (infinity where there is none)
};

struct ExpertsDesc {
  RouterScore score = RouterScore::none;  // sigmoid_input: weight scales the input; otherwise the output
  uint32_t top_k = 1;
  std::span<const uint32_t> expert;       // [tokens, top_k] global ids, or the number of experts where another rank computes it
  std::span<const float> weight;
  std::span<const Weight* const> gate_up; // [experts + 1] global id -> [2 * ffn, hidden] or null where not local; the last is null
  std::span<const Weight* const> down;    // [experts + 1] -> [hidden, ffn]
};

struct KvDesc { uint32_t layers = 0, kv_heads = 0, head_dim = 0, blocks = 0, block_tokens = 0; };

class OpTable {
 public:
  virtual ~OpTable() = default;
  virtual std::string numerics() const = 0;  // "cpu-exact-1": part of the numerics id

  virtual Status alloc_rows(uint32_t rows, uint32_t cols, Rows* out) = 0;  // freed with the table
  virtual Status pack(std::span<const StoredMatrix> parts, std::unique_ptr<Weight>* out) = 0;  // stacked in order
  virtual Status pack_vector(const StoredMatrix& vector, std::unique_ptr<Weight>* out) = 0;    // norm weights, [1, n]
  virtual Status kv_init(const KvDesc& desc) = 0;
  virtual uint64_t kv_bytes() const = 0;
  virtual Status kv_copy(uint32_t from, uint32_t to) = 0;

  // out[t] = table row of ids[t] - first, zero where it is outside the table.
  virtual Status embed(const Weight& table, uint32_t first, const Batch& batch, Rows out) = 0;
  // Where delta is given x += delta; then out = x * rsqrt(mean(x^2) + eps) * weight.
  virtual Status add_norm(const Weight& weight, double eps, uint32_t tokens, Rows x, Rows delta, Rows out) = 0;
  virtual Status linear(const Weight& weight, uint32_t tokens, Rows in, Rows out) = 0;   // out [tokens, weight.rows]
  // qkv [tokens, (heads + 2 * kv_heads) * head_dim]: rotates q and k in place, norms, scales q, writes k and v to the cache.
  virtual Status rope_kv(const RopeDesc& desc, const Batch& batch, Rows qkv) = 0;
  virtual Status attention(const AttentionDesc& desc, const Batch& batch, Rows qkv, Rows out) = 0;  // out [tokens, heads * head_dim]
  // gate_up [2 * ffn, hidden] (gate rows first), down [hidden, ffn]: out = down(silu(gate) * up).
  virtual Status dense_ffn(const Weight& gate_up, const Weight& down, uint32_t tokens, Rows in, Rows out) = 0;
  virtual Status route(const Weight& router, RouterScore score, uint32_t top_k, uint32_t tokens, Rows in, const RouteResult& out) = 0;
  // out += sum over the token's local experts, in slot order (ascending k).
  virtual Status experts(const ExpertsDesc& desc, uint32_t tokens, Rows in, Rows out) = 0;
  // logits[i] = head row of token tokens[i]: host f32 [rows, head.rows]
  virtual Status head(const Weight& head, std::span<const uint32_t> tokens, Rows in, std::span<float> logits) = 0;
  virtual Status zero(uint32_t rows, uint32_t cols, Rows rows_out) = 0;
  // Device rows <-> host f32, for collectives; on CPU backends `view` is the memory itself.
  virtual Status view(Rows rows, uint64_t count, std::span<float>* out) = 0;   // host view, synced
  virtual Status commit(Rows rows, uint64_t count, std::span<const float> from) = 0;
  virtual Status sync() = 0;
};

struct DeviceOptions { uint32_t threads = 1, tokens_max = 0, rows_max = 0, hidden = 0, ffn_max = 0, qkv_max = 0, top_k_max = 0; std::string isa; };
Status make_ref_ops(const DeviceOptions& options, std::unique_ptr<OpTable>* out);
Status make_cpu_ops(const DeviceOptions& options, std::unique_ptr<OpTable>* out);

}  // namespace muster

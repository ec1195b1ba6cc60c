// What the engine is told of a model and of its own share: plain structs, the native image of proto/muster/v1/plan.proto
// (the numbers of the enums are the same there). Native code knows no families and reads no headers.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace muster {

enum class StoredType : uint8_t { f32 = 1, f16 = 2, bf16 = 3, q8_0 = 4, q4_0 = 5, q4_1 = 6, q4_k = 7, q5_k = 8, q6_k = 9 };

enum class Role : uint8_t {
  embedding = 1, final_norm = 2, head = 3, attention_norm = 4, query = 5, key = 6, value = 7, output = 8, mlp_norm = 9,
  gate = 10, up = 11, down = 12, router = 13, expert_gate = 14, expert_up = 15, expert_down = 16,
  shared_gate = 17, shared_up = 18, shared_down = 19, rope_factors = 20,
};

enum class RopeLayout : uint8_t { none = 1, half = 2, interleaved = 3 };
enum class MaskKind : uint8_t { full = 1, sliding = 2, chunked = 3 };
enum class RouterScore : uint8_t { none = 0, sigmoid_input = 1, softmax = 2, sigmoid = 3 };

struct AttentionSpec {
  uint32_t heads = 0, kv_heads = 0, head_dim = 0;  // of the whole model
  double scale = 0;
  RopeLayout rope = RopeLayout::none;
  uint32_t rope_dims = 0;
  std::vector<float> rope_frequencies;  // [rope_dims / 2], after scaling; angle = position * frequency in f32
  MaskKind mask = MaskKind::full;
  uint32_t mask_span = 0;
  bool qk_unit_norm = false;            // weightless RMS over head_dim, after rope, with the model's eps
  double temperature_scale = 0;         // 0: off; q *= 1 + scale * ln(1 + floor((p + 1) / floor))
  uint32_t temperature_floor = 0;
  uint32_t kv_group = 0;
};

struct MoeSpec {
  uint32_t experts = 0, top_k = 0, expert_ffn = 0, shared_ffn = 0;
  RouterScore score = RouterScore::none;
};

struct BlockSpec {
  AttentionSpec attention;
  uint32_t dense_ffn = 0;  // 0: a MoE block
  MoeSpec moe;
};

struct KvGroupSpec {
  std::vector<uint32_t> blocks;  // layer indexes
  uint32_t kv_heads = 0, head_dim = 0;
};

struct ModelDesc {
  std::string name;
  uint32_t vocab = 0, hidden = 0, context_tokens = 0;
  double norm_eps = 0;
  bool tied_head = false;
  std::vector<BlockSpec> blocks;
  std::vector<KvGroupSpec> kv_groups;  // exactly one for now
};

struct Range {
  uint32_t begin = 0, end = 0;  // [begin, end)
  uint32_t size() const { return end - begin; }
};

struct RankShard {
  uint32_t rank = 0;
  Range heads, kv_heads, vocab, dense_ffn, shared_ffn;
  std::vector<uint32_t> experts;  // global ids, ascending
  Range expert_ffn;
};

// A group: all ranks that hold one copy of the model, spread over workers. This engine has the ranks of one worker.
struct GroupDesc {
  uint32_t world = 1, worker = 0, workers = 1;
  std::vector<uint32_t> worker_of_rank;  // [world]
  std::vector<RankShard> local;          // ranks of this worker, ascending
};

// One plane of a tensor in a file and the part of it that one rank keeps. Rows and columns are logical: W [rows = out, cols = in].
//   plain       element (r, c) is value ((row_first + r) * cols + c) from `offset` on, in blocks along c
//   transposed  element (r, c) is value (c * rows_stored + row_first + r); float types only
struct TensorSlice {
  uint32_t rank = 0;
  Role role = Role::embedding;
  StoredType type = StoredType::f32;
  int32_t block = -1, expert = -1;  // layer index; global expert id
  uint32_t file = 0;
  uint64_t offset = 0;              // bytes, of the plane's stored element (0, 0) before row_first
  uint32_t rows = 0, cols = 0;      // of the whole plane
  uint32_t rows_stored = 0, row_first = 0;
  bool transposed = false;
  Range keep_rows, keep_cols;
  std::string name;                 // for messages
};

struct FileDesc {
  std::string path;
  uint64_t bytes = 0;  // expected length
};

}  // namespace muster

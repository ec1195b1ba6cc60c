// The engine: all ranks of one worker behind one object. The narrowest line of the house: everything above decides which
// tokens to compute, everything below computes them. Clients: the addon, native tests and benches.
//
//   E1  launch validates everything before any communication, then returns at once; tickets complete in order.
//   E2  a row's bits depend on its sequence's tokens, the seed and the numerics id; not on batch mates, chunking, drafts or threads.
//   E3  after lost or internal the engine answers nothing but close.
//   E4  every buffer is sized from the options at start.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "muster/model.h"
#include "muster/status.h"

namespace muster {

struct EngineOptions {
  uint32_t threads = 0;            // of this worker, shared by its ranks; 0: from the cgroup quota
  std::string backend = "cpu";     // "cpu" | "ref"
  std::string isa;                 // "avx512" | "avx2" | "scalar"; empty: the best this CPU has
  uint32_t kv_block_tokens = 16;
  uint32_t rows_max = 64;          // rows of a step
  uint32_t tokens_max = 512;       // tokens of a step, drafts included
  uint32_t verify_max = 8;         // drafts of a row
  uint32_t slots_max = 128;
  uint32_t logprobs_max = 21;
  uint32_t logit_bias_max = 1024;  // entries of a slot
  uint32_t in_flight_max = 2;
  uint32_t stall_report_ms = 5000;
  uint32_t stall_give_up_ms = 10000;
};

struct LogitBias { uint32_t id; float bias; };

struct Sampler {
  float temperature = 0;           // 0: greedy
  uint32_t top_k = 0;              // 0: off
  float top_p = 1, min_p = 0;      // 1, 0: off
  float repetition = 1, presence = 0, frequency = 0;
  std::vector<LogitBias> bias;
  bool has_filters() const { return temperature > 0 && (top_k != 0 || top_p < 1 || min_p > 0); }
};

// Updates are applied in order, before the rows.
struct SlotUpdate {
  enum class Kind : uint8_t { open = 1, close = 2, blocks = 3, truncate = 4, fork = 5, copy = 6, experts = 7 };
  Kind kind = Kind::close;
  uint32_t slot = 0;
  std::vector<uint32_t> ids;       // open: all token ids so far
  uint32_t generated_from = 0;     // open
  uint64_t seed_low = 0, seed_high = 0;
  Sampler sampler;
  uint32_t length = 0;             // open: computed length; truncate, fork: ids kept
  std::vector<uint32_t> blocks;    // open, fork: the whole table; blocks: appended
  uint32_t from = 0, to = 0;       // fork: source slot; copy: KV block ids
  uint32_t version = 0;            // experts: of the map that was staged; from this step's rows on it holds
};

// Computes `count` ids of the slot from its computed length on, then the drafts. With `sample` the last of the count is the
// slot's last id: one token is sampled after it and after each draft that equals the token sampled before it; what was
// sampled is appended to the slot's ids. Rejected drafts leave no trace.
struct Row {
  uint32_t slot = 0, count = 0;
  std::vector<uint32_t> drafts;
  bool sample = false;
  uint32_t logprobs = 0;           // 0: none; n + 1: the token's own and the n best, of the raw logits
  bool logits = false;             // logits of every position computed
  bool margins = false;
};

struct Step {
  uint64_t epoch = 0;              // 1, 2, 3, ...
  std::vector<SlotUpdate> updates;
  std::vector<Row> rows;
};

struct TopLogprob { uint32_t id; float logprob; };

struct TokenDetail {
  float logprob = 0;
  std::vector<TopLogprob> top;
  float score_gap = 0;             // between the two best perturbed scores (infinity when one candidate is left)
  float router_gap = 0;            // smallest gap between k-th and next router logit over this row's tokens up to this choice
};

struct RowResult {
  uint32_t slot = 0;
  std::vector<uint32_t> tokens;    // accepted drafts and one own
  uint32_t accepted = 0;
  uint32_t computed = 0;           // the slot's computed length after the step
  std::vector<TokenDetail> details;  // one for each token where logprobs or margins were asked
  std::vector<float> logits;       // [count + drafts, vocab] where asked
};

struct StepResult {
  Status status;
  uint64_t epoch = 0;
  std::vector<RowResult> rows;     // in the step's order
  uint64_t digest = 0;             // over (slot, accepted, tokens) of every sampled row
  double step_ms = 0, wait_ms = 0; // wall time; of it waiting for other ranks (slowest local rank)
};

// An expert that a rank is to hold in a layer. Where several ranks hold it, a token is computed by the copy that its position
// picks: (position * 2654435761 mod 2^32 >> 16) mod copies. The ranks that cut one expert hold the same copy of it.
struct ExpertShare { uint32_t rank = 0, block = 0, expert = 0, copy = 0, copies = 1; };
// Of all ranks of this worker; what the map does not name they hold no longer. The first map, from the shards, is version 0.
struct ExpertMap {
  uint32_t version = 0;
  std::vector<ExpertShare> shares;
};

struct Memory { uint64_t weights = 0, kv = 0, activations = 0, communication = 0; };  // bytes per rank

struct EngineStats {
  std::vector<std::vector<uint64_t>> expert_tokens;  // [block][expert], empty for dense blocks; of local rank 0
};

class Comm;  // comm.h

class Engine {
 public:
  virtual ~Engine() = default;
  // `comm` spans the group; null where world is the number of local ranks (a peer group is made inside), or where connect
  // hands it in later: workers load at different speeds, and a mesh that stands early would only wait.
  static Status create(const ModelDesc& model, const GroupDesc& group, const EngineOptions& options,
                       std::shared_ptr<Comm> comm, std::unique_ptr<Engine>* out);

  // Reads the slices' bytes, checks file lengths, converts into the backend's layout. `progress` gets bytes done of bytes
  // in all; true in `cancel` ends the load with invalid("load", "cancelled").
  virtual Status load(std::span<const FileDesc> files, std::span<const TensorSlice> slices,
                      const std::function<void(uint64_t, uint64_t)>& progress, const std::atomic<bool>& cancel) = 0;
  virtual Status connect(std::shared_ptr<Comm> comm) = 0;  // once, before kv_init, where create was given none
  // All ranks agree on the numerics id and on the KV size. `blocks` counts block 0, which belongs to padding.
  virtual Status kv_init(uint32_t blocks) = 0;

  // Reads and packs, beside the steps, what `map` adds to this worker's ranks; slices are of that and nothing else. Once it
  // has returned ok one step may switch to it. A map that was staged before and not switched to is dropped. One at a time.
  virtual Status stage(const ExpertMap& map, std::span<const FileDesc> files, std::span<const TensorSlice> slices,
                       const std::atomic<bool>& cancel) = 0;

  // `done` is called once, from an engine thread, in ticket order.
  virtual Status launch(const Step& step, std::function<void(StepResult&&)> done) = 0;

  virtual const std::string& numerics_id() const = 0;
  virtual std::vector<Memory> memory() const = 0;  // by local rank
  virtual EngineStats stats() const = 0;
  // Bounded: waits for steps in flight, gives up after stall_give_up_ms. Idempotent. Not to be called from `done`.
  virtual void close() = 0;
};

// What this machine offers: the ISA variants the CPU can run, best first, and the CPUs that the cgroup quota allows.
struct DeviceInfo { std::vector<std::string> isas; std::string cpu; uint32_t cpus = 1; uint64_t memory_bytes = 0; };
DeviceInfo devices();

}  // namespace muster

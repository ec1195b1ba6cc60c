// A small random model in a file, its cuts, and an engine over it that is driven step by step. Three layers: dense with
// rotated halves in chunks; experts with interleaved rotation; experts without rotation but with temperature tuning.
#pragma once
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <future>
#include <map>
#include <random>
#include <thread>

#include "check.h"
#include "exec/loader.h"
#include "muster/comm.h"

namespace tiny {

using namespace muster;

inline ModelDesc model(bool tied = false) {
  ModelDesc m;
  m.name = "tiny";
  m.vocab = 67;  // does not divide by 2 or 4
  m.hidden = 32;
  m.context_tokens = 96;
  m.norm_eps = 1e-5;
  m.tied_head = tied;
  for (int i = 0; i < 3; ++i) {
    BlockSpec block;
    AttentionSpec& a = block.attention;
    a.heads = 4;
    a.kv_heads = 2;
    a.head_dim = 8;
    a.scale = 0.35355339059327373;
    a.rope = i == 0 ? RopeLayout::half : i == 1 ? RopeLayout::interleaved : RopeLayout::none;
    if (i < 2) {
      a.rope_dims = 8;
      a.rope_frequencies = {1.0f, 0.316f, 0.1f, 0.0316f};
    } else {
      a.temperature_scale = 0.1;
      a.temperature_floor = 4;
    }
    a.mask = i == 0 ? MaskKind::chunked : MaskKind::full;
    a.mask_span = i == 0 ? 16 : 0;
    a.qk_unit_norm = i == 1;
    if (i == 0) {
      block.dense_ffn = 48;
    } else {
      block.moe = {4, i == 1 ? 1u : 2u, 16, i == 1 ? 24u : 0u, RouterScore::sigmoid_input};
    }
    m.blocks.push_back(block);
  }
  m.kv_groups = {{{0, 1, 2}, 2, 8}};
  return m;
}

inline Range part(uint32_t whole, uint32_t index, uint32_t parts) { return {whole * index / parts, whole * (index + 1) / parts}; }

inline RankShard shard(const ModelDesc& m, uint32_t rank, uint32_t world, uint32_t ep) {
  const uint32_t etp = world / ep, experts = m.blocks[1].moe.experts;
  RankShard s;
  s.rank = rank;
  s.heads = part(4, rank, world);
  s.kv_heads = {s.heads.begin / 2, (s.heads.end - 1) / 2 + 1};
  s.vocab = part(m.vocab, rank, world);
  s.dense_ffn = part(48, rank, world);
  s.shared_ffn = part(24, rank, world);
  for (uint32_t e = experts * (rank / etp) / ep; e < experts * (rank / etp + 1) / ep; ++e) s.experts.push_back(e);
  s.expert_ffn = part(16, rank % etp, etp);
  return s;
}

// All planes as f32, one after the other; down projections of experts lie transposed.
class File {
 public:
  explicit File(const ModelDesc& m, uint32_t seed = 1) {
    char name[] = "/tmp/muster-tiny-XXXXXX";
    const int handle = ::mkstemp(name);
    path_ = name;
    std::FILE* out = ::fdopen(handle, "wb");
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, 0.18f);
    uint64_t at = 64;
    std::vector<char> header(64, 0);
    std::fwrite(header.data(), 1, 64, out);
    for (const PlaneNeed& plane : planes_of(m, shard(m, 0, 1, 1))) {
      const bool is_norm = plane.rows == 1;
      std::vector<float> values(size_t(plane.rows) * plane.cols);
      for (float& value : values) value = is_norm ? 1 + normal(random) : normal(random) * (plane.key.role == Role::embedding ? 5 : 1);
      std::fwrite(values.data(), 4, values.size(), out);
      offsets_[plane.key] = at;
      at += values.size() * 4;
    }
    std::fclose(out);
    bytes_ = at;
  }
  ~File() { ::unlink(path_.c_str()); }
  FileDesc desc() const { return {path_, bytes_}; }
  std::vector<TensorSlice> slices(const ModelDesc& m, const RankShard& s) const {
    std::vector<TensorSlice> out;
    for (const PlaneNeed& plane : planes_of(m, s)) {
      TensorSlice slice;
      slice.rank = s.rank;
      slice.role = plane.key.role;
      slice.block = plane.key.block;
      slice.expert = plane.key.expert;
      slice.offset = offsets_.at(plane.key);
      slice.rows = plane.rows;
      slice.cols = plane.cols;
      slice.rows_stored = plane.rows;
      slice.transposed = plane.key.role == Role::expert_down;
      slice.keep_rows = plane.keep_rows;
      slice.keep_cols = plane.keep_cols;
      slice.name = "plane" + std::to_string(int(plane.key.role)) + "." + std::to_string(plane.key.block) + "." + std::to_string(plane.key.expert);
      out.push_back(slice);
    }
    return out;
  }

 private:
  std::string path_;
  uint64_t bytes_ = 0;
  std::map<PlaneKey, uint64_t> offsets_;
};

inline EngineOptions options(const std::string& backend = "ref") {
  EngineOptions o;
  o.backend = backend;
  o.threads = 1;
  o.kv_block_tokens = 4;
  o.rows_max = 8;
  o.tokens_max = 48;
  o.verify_max = 4;
  o.slots_max = 8;
  o.stall_give_up_ms = 5000;
  return o;
}

class Driver {
 public:
  explicit Driver(std::unique_ptr<Engine> engine) : engine(std::move(engine)) {}
  std::unique_ptr<Engine> engine;
  uint64_t epoch = 0;

  std::future<StepResult> start(Step step) {
    auto promise = std::make_shared<std::promise<StepResult>>();
    auto future = promise->get_future();
    step.epoch = ++epoch;
    const Status status = engine->launch(step, [promise](StepResult&& result) { promise->set_value(std::move(result)); });
    if (!status.is_ok()) {
      --epoch;
      StepResult refused;
      refused.status = status;
      promise->set_value(refused);
    }
    return future;
  }
  StepResult run(Step step) { return start(std::move(step)).get(); }
};

inline Driver open(const ModelDesc& m, const File& file, uint32_t world = 1, uint32_t ep = 1, const EngineOptions& o = options(), uint32_t blocks = 64) {
  GroupDesc group;
  group.world = world;
  group.worker_of_rank.assign(world, 0);
  std::vector<TensorSlice> slices;
  for (uint32_t rank = 0; rank < world; ++rank) {
    group.local.push_back(shard(m, rank, world, ep));
    for (const TensorSlice& slice : file.slices(m, group.local.back())) slices.push_back(slice);
  }
  std::unique_ptr<Engine> engine;
  CHECK_OK(Engine::create(m, group, o, nullptr, &engine));
  if (!engine) std::fflush(stdout), std::abort();
  const std::atomic<bool> cancel{false};
  const std::vector<FileDesc> files = {file.desc()};
  CHECK_OK(engine->load(files, slices, nullptr, cancel));
  CHECK_OK(engine->kv_init(blocks));
  return Driver(std::move(engine));
}

// Blocks first, first + 1, ... that hold `tokens`.
inline std::vector<uint32_t> blocks(uint32_t first, uint32_t tokens) {
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i * 4 < tokens; ++i) out.push_back(first + i);
  return out;
}

inline SlotUpdate opening(uint32_t slot, std::vector<uint32_t> ids, uint32_t first_block, uint32_t tokens = 96) {
  SlotUpdate u;
  u.kind = SlotUpdate::Kind::open;
  u.slot = slot;
  u.generated_from = uint32_t(ids.size());
  u.ids = std::move(ids);
  u.seed_low = 77 + slot;
  u.seed_high = 5;
  u.blocks = blocks(first_block, tokens);
  return u;
}

inline SlotUpdate closing(uint32_t slot) {
  SlotUpdate u;
  u.slot = slot;
  return u;
}

inline Row row(uint32_t slot, uint32_t count, bool sample = true, std::vector<uint32_t> drafts = {}) {
  Row r;
  r.slot = slot;
  r.count = count;
  r.sample = sample;
  r.drafts = std::move(drafts);
  return r;
}

inline std::vector<uint32_t> prompt(uint32_t count, uint32_t seed) {
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < count; ++i) out.push_back((seed * 31 + i * i * 7 + i * 13) % 67);
  return out;
}

}  // namespace tiny

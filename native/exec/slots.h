// Sequence slots: ids, computed length, block table, sampler and seed of every running sequence, as the engine's threads
// know them. Owned by the engine thread alone; nothing here checks anything: step_check.h has done so at launch.
#pragma once
#include <utility>

#include "exec/sampler.h"

namespace muster {

struct Slot {
  std::vector<uint32_t> ids, blocks;
  uint32_t generated_from = 0, computed = 0;
  Seed seed;
  Sampler sampler;
};

// One row as the ranks compute it. Spans live until the step is settled.
struct RowWork {
  const Slot* slot = nullptr;
  std::span<const uint32_t> drafts;
  uint32_t first_token = 0;   // index of the row's first token in the batch
  uint32_t count = 0;
  bool sample = false, logits = false, margins = false;
  uint32_t logprobs = 0;
  uint32_t positions() const { return count + uint32_t(drafts.size()); }
};

// A token whose logits are wanted; `draft` >= 0: the choice after that many drafts.
struct HeadRow {
  uint32_t token = 0, row = 0;
  int32_t draft = -1;
};

struct StepWork {
  uint64_t epoch = 0;
  std::vector<std::pair<uint32_t, uint32_t>> copies;   // KV blocks, before the rows
  uint32_t experts = 0;                                // version of the map to switch to; 0: none
  std::vector<uint32_t> ids, positions, sequence;      // by token
  std::vector<std::span<const uint32_t>> tables;       // by row
  std::vector<RowWork> rows;
  std::vector<HeadRow> head;                           // ascending by token
};

// What every rank finds for a row: a token after each number of drafts.
struct RowChoices {
  std::vector<uint32_t> tokens;
  std::vector<TokenDetail> details;
  std::vector<float> logits;
};

class Slots {
 public:
  explicit Slots(uint32_t slots_max) : slots_(size_t(slots_max) + 1) {}
  // Applies the updates and lays out the rows. The step must outlive the work.
  StepWork begin(const Step& step);
  // Accepts drafts, appends what was sampled, writes the results.
  std::vector<RowResult> settle(const Step& step, std::span<RowChoices> choices);

 private:
  void update(const SlotUpdate& update, StepWork* work);
  void add_row(const Row& row, StepWork* work);
  RowResult settle_row(const Row& row, RowChoices& choices);
  std::vector<Slot> slots_;
};

uint64_t digest_of(std::span<const RowResult> rows);

}  // namespace muster

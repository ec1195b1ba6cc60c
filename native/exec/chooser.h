// From the final norm's rows to the tokens of a step, over a head that is cut by vocabulary. Owns one rank's logit buffers.
//
//   H1  the token is the one a single rank would choose: parts are compared by (score, lower id), or the whole row is gathered.
//   H2  every rank makes the same collective calls, decided by the step alone; only a worker's keeper assembles results.
//   H3  head rows are computed kHeadRowsMax at a time, whatever the step asks for.
#pragma once
#include "exec/executor.h"
#include "exec/slots.h"

namespace muster {

constexpr uint32_t kHeadRowsMax = 32;  // bounds the logit buffers (a row of 202,048 ids takes 0.8 MB)

struct ChooserOptions {
  uint32_t tokens_max = 0;
  bool keeper = false;                  // assembles choices, details and logits for the worker
  std::vector<Range> vocab_of_rank;     // [world], in order, covering the vocabulary
};

class Chooser {
 public:
  Chooser(const Rank& rank, const Weight& head, ChooserOptions options);
  uint64_t activation_bytes() const;
  uint64_t communication_bytes() const;
  // `out` [rows of the step]; meaningful on the keeper.
  Status run(const StepWork& work, Rows normed, std::span<const float> router_gaps, std::vector<RowChoices>* out);

 private:
  struct Part { const StepWork* work; std::span<const HeadRow> head; std::vector<RowChoices>* out; };

  Status run_part(const Part& part, Rows normed);
  Status choose_by_parts(const Part& part, std::span<const uint32_t> picked);
  Status choose_by_rows(const Part& part, std::span<const uint32_t> picked);
  Status gather_rows(std::span<const uint32_t> picked);
  Status choose_from_row(const Part& part, const HeadRow& at, std::span<const float> raw);
  void prepare(const StepWork& work, const HeadRow& at, uint32_t first, std::span<float> logits);
  Status take(const Part& part, const HeadRow& at, const Best& best);
  std::span<float> part_row(uint32_t index) { return std::span(logits_).subspan(size_t(index) * vocab_.size(), vocab_.size()); }

  Rank rank_;
  const Weight& head_;
  ChooserOptions options_;
  Range vocab_;
  uint32_t rows_max_ = 0, part_max_ = 0;
  std::vector<float> logits_;           // [rows_max, own part]
  std::vector<float> full_;             // keeper of a cut head: [rows_max, vocab]
  std::vector<float> processed_;        // keeper: [vocab]
  std::vector<float> send_, all_;       // [rows_max, part_max], [world, rows_max, part_max]
  std::vector<MaxPair> pairs_;
  std::vector<double> seconds_;
  Penalties penalties_;
  int64_t penalty_row_ = -1;            // whose ids penalties_ holds, and how many of its drafts
  int32_t penalty_drafts_ = 0;
};

}  // namespace muster

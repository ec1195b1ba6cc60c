#include "exec/chooser.h"

#include <algorithm>
#include <cstring>

namespace muster {
namespace {

Noise noise_of(const RowWork& row, int32_t draft) {
  return {row.slot->seed, uint32_t(row.slot->ids.size()) + uint32_t(draft)};
}
bool wants_row(const RowWork& row) { return row.logits || row.logprobs || (row.sample && row.slot->sampler.has_filters()); }
bool wants_details(const RowWork& row) { return row.logprobs || row.margins; }

}  // namespace

Chooser::Chooser(const Rank& rank, const Weight& head, ChooserOptions options)
    : rank_(rank), head_(head), options_(std::move(options)), vocab_(rank.shard->vocab), penalties_(rank.model->vocab) {
  rows_max_ = std::min(options_.tokens_max, kHeadRowsMax);
  for (const Range& part : options_.vocab_of_rank) part_max_ = std::max(part_max_, part.size());
  const size_t world = options_.vocab_of_rank.size();
  logits_.resize(size_t(rows_max_) * vocab_.size());
  if (options_.keeper) processed_.resize(rank_.model->vocab);
  pairs_.reserve(rows_max_);
  seconds_.reserve(rows_max_);
  if (!rank_.comm) return;
  if (options_.keeper) full_.resize(size_t(rows_max_) * rank_.model->vocab);
  send_.resize(size_t(rows_max_) * part_max_);
  all_.resize(world * rows_max_ * part_max_);
}

uint64_t Chooser::activation_bytes() const { return (logits_.size() + full_.size() + processed_.size()) * 4 + uint64_t(rank_.model->vocab) * 5; }
uint64_t Chooser::communication_bytes() const { return (send_.size() + all_.size()) * 4; }

Status Chooser::run(const StepWork& work, Rows normed, std::span<const float> router_gaps, std::vector<RowChoices>* out) {
  out->assign(work.rows.size(), {});
  penalty_row_ = -1;
  for (size_t i = 0; i < work.rows.size() && options_.keeper; ++i) {
    const RowWork& row = work.rows[i];
    RowChoices& choices = (*out)[i];
    if (row.logits) choices.logits.reserve(size_t(row.positions()) * rank_.model->vocab);
    if (!row.sample) continue;
    choices.tokens.resize(row.drafts.size() + 1);
    if (!wants_details(row)) continue;
    choices.details.resize(row.drafts.size() + 1);
    float gap = std::numeric_limits<float>::infinity();
    for (uint32_t p = 0; p < row.positions(); ++p) {
      gap = std::min(gap, router_gaps[row.first_token + p]);
      if (p + 1 >= row.count) choices.details[p + 1 - row.count].router_gap = gap;
    }
  }
  for (size_t first = 0; first < work.head.size(); first += rows_max_) {
    const size_t count = std::min<size_t>(rows_max_, work.head.size() - first);
    MUSTER_TRY(run_part({&work, std::span(work.head).subspan(first, count), out}, normed));
  }
  return Status::ok();
}

Status Chooser::run_part(const Part& part, Rows normed) {
  std::vector<uint32_t> tokens, by_rows, by_parts;
  for (uint32_t i = 0; i < part.head.size(); ++i) {
    tokens.push_back(part.head[i].token);
    (wants_row(part.work->rows[part.head[i].row]) ? by_rows : by_parts).push_back(i);
  }
  MUSTER_TRY(rank_.ops->head(head_, tokens, normed, std::span(logits_).first(tokens.size() * vocab_.size())));
  if (!by_rows.empty()) MUSTER_TRY(choose_by_rows(part, by_rows));
  return by_parts.empty() ? Status::ok() : choose_by_parts(part, by_parts);
}

Status Chooser::choose_by_parts(const Part& part, std::span<const uint32_t> picked) {
  pairs_.clear();
  seconds_.clear();
  bool margins = false;
  for (const uint32_t index : picked) {
    const HeadRow& at = part.head[index];
    const RowWork& row = part.work->rows[at.row];
    const std::span<float> logits = part_row(index);
    prepare(*part.work, at, vocab_.begin, logits);
    const Best best = best_of(logits, vocab_.begin, row.slot->sampler.temperature, noise_of(row, at.draft), row.margins);
    pairs_.push_back({best.value, best.id});
    seconds_.push_back(best.second);
    margins = margins || row.margins;
  }
  if (rank_.comm) MUSTER_TRY(rank_.comm->max(rank_.shard->rank, pairs_, margins ? std::span(seconds_) : std::span<double>()));
  for (size_t i = 0; i < picked.size(); ++i)
    MUSTER_TRY(take(part, part.head[picked[i]], {pairs_[i].value, pairs_[i].id, seconds_[i]}));
  return Status::ok();
}

Status Chooser::choose_by_rows(const Part& part, std::span<const uint32_t> picked) {
  if (rank_.comm) MUSTER_TRY(gather_rows(picked));
  if (!options_.keeper) return Status::ok();
  const size_t vocab = rank_.model->vocab;
  for (size_t i = 0; i < picked.size(); ++i) {
    const std::span<const float> raw = rank_.comm ? std::span<const float>(full_).subspan(i * vocab, vocab) : part_row(picked[i]);
    MUSTER_TRY(choose_from_row(part, part.head[picked[i]], raw));
  }
  return Status::ok();
}

// Parts differ in width where the vocabulary does not divide; they travel padded to the widest.
Status Chooser::gather_rows(std::span<const uint32_t> picked) {
  const size_t part_floats = picked.size() * part_max_, world = options_.vocab_of_rank.size();
  for (size_t i = 0; i < picked.size(); ++i) std::ranges::copy(part_row(picked[i]), send_.begin() + std::ptrdiff_t(i * part_max_));
  const auto bytes = [](std::span<float> floats) { return std::span(reinterpret_cast<uint8_t*>(floats.data()), floats.size() * 4); };
  MUSTER_TRY(rank_.comm->gather(rank_.shard->rank, bytes(std::span(send_).first(part_floats)), bytes(std::span(all_).first(world * part_floats))));
  if (!options_.keeper) return Status::ok();
  for (size_t r = 0; r < world; ++r) {
    const Range& range = options_.vocab_of_rank[r];
    for (size_t i = 0; i < picked.size(); ++i)
      std::memcpy(&full_[i * rank_.model->vocab + range.begin], &all_[r * part_floats + i * part_max_], range.size() * sizeof(float));
  }
  return Status::ok();
}

Status Chooser::choose_from_row(const Part& part, const HeadRow& at, std::span<const float> raw) {
  const RowWork& row = part.work->rows[at.row];
  RowChoices& choices = (*part.out)[at.row];
  if (row.logits) choices.logits.insert(choices.logits.end(), raw.begin(), raw.end());
  if (at.draft < 0) return Status::ok();
  std::ranges::copy(raw, processed_.begin());
  prepare(*part.work, at, 0, processed_);
  const Sampler& sampler = row.slot->sampler;
  const Best best = sampler.has_filters() ? best_filtered(processed_, sampler, noise_of(row, at.draft))
                                          : best_of(processed_, 0, sampler.temperature, noise_of(row, at.draft), row.margins);
  MUSTER_TRY(take(part, at, best));
  if (row.logprobs) log_probabilities(raw, best.id, row.logprobs - 1, &choices.details[size_t(at.draft)]);
  return Status::ok();
}

// Bias and penalties; at verification position i the drafts before i count as generated.
void Chooser::prepare(const StepWork& work, const HeadRow& at, uint32_t first, std::span<float> logits) {
  const RowWork& row = work.rows[at.row];
  const Sampler& sampler = row.slot->sampler;
  apply_bias(sampler, first, logits);
  if (!Penalties::wanted(sampler)) return;
  if (penalty_row_ != int64_t(at.row) || penalty_drafts_ > at.draft) {
    penalties_.start(row.slot->ids, row.slot->generated_from);
    penalty_row_ = at.row;
    penalty_drafts_ = 0;
  }
  for (; penalty_drafts_ < at.draft; ++penalty_drafts_) penalties_.add(row.drafts[size_t(penalty_drafts_)], true);
  penalties_.apply(sampler, first, logits);
}

Status Chooser::take(const Part& part, const HeadRow& at, const Best& best) {
  if (!best.found()) return Status::internal("sample", "row " + std::to_string(at.row) + " has no finite logit: the weights or the sampler's penalties overflow");
  if (!options_.keeper) return Status::ok();
  RowChoices& choices = (*part.out)[at.row];
  choices.tokens[size_t(at.draft)] = best.id;
  if (!choices.details.empty()) choices.details[size_t(at.draft)].score_gap = float(best.value - best.second);
  return Status::ok();
}

}  // namespace muster

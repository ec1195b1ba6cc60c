#include "exec/step_check.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

namespace muster {
namespace {

std::string text(uint64_t value) { return std::to_string(value); }

Status check_number(float value, float low, float high, const std::string& field) {
  if (value >= low && value <= high) return Status::ok();
  return Status::invalid(field, std::to_string(value) + " is not within " + std::to_string(low) + " and " + std::to_string(high));
}

constexpr float kAnyMax = 3.0e38f;

Status check_sampler(const Sampler& sampler, const StepLimits& limits, const std::string& at) {
  MUSTER_TRY(check_number(sampler.temperature, 0, kAnyMax, at + ".temperature"));
  if (sampler.temperature > 0 && sampler.temperature < 1e-5f)
    return Status::invalid(at + ".temperature", "is neither 0 nor at least 0.00001; 0 asks for the best token");
  MUSTER_TRY(check_number(sampler.top_p, 1e-9f, 1, at + ".top_p"));
  MUSTER_TRY(check_number(sampler.min_p, 0, 1, at + ".min_p"));
  MUSTER_TRY(check_number(sampler.repetition, 1e-9f, kAnyMax, at + ".repetition"));
  MUSTER_TRY(check_number(sampler.presence, -kAnyMax, kAnyMax, at + ".presence"));
  MUSTER_TRY(check_number(sampler.frequency, -kAnyMax, kAnyMax, at + ".frequency"));
  if (sampler.bias.size() > limits.options.logit_bias_max)
    return Status::invalid(at + ".bias", text(sampler.bias.size()) + " entries, at most " + text(limits.options.logit_bias_max));
  for (size_t i = 0; i < sampler.bias.size(); ++i) {
    const std::string entry = at + ".bias[" + text(i) + "]";
    if (sampler.bias[i].id >= limits.vocab) return Status::invalid(entry + ".id", text(sampler.bias[i].id) + " is outside the vocabulary of " + text(limits.vocab));
    MUSTER_TRY(check_number(sampler.bias[i].bias, -kAnyMax, kAnyMax, entry + ".bias"));
  }
  return Status::ok();
}

}  // namespace

Status StepCheck::admit(const Step& step) {
  const EngineOptions& options = limits_.options;
  if (step.epoch != epoch_ + 1) return Status::invalid("step", text(step.epoch) + " does not follow " + text(epoch_));
  if (step.rows.size() > options.rows_max) return Status::invalid("rows", text(step.rows.size()) + " rows, at most " + text(options.rows_max));
  bool switches = false;
  MUSTER_TRY(check_experts(step, &switches));
  Draft draft;
  for (size_t i = 0; i < step.updates.size(); ++i) MUSTER_TRY(check_update(step.updates[i], "updates[" + text(i) + "]", &draft));
  uint64_t tokens = 0;
  std::unordered_set<uint32_t> seen;
  for (size_t i = 0; i < step.rows.size(); ++i) {
    const Row& row = step.rows[i];
    const std::string at = "rows[" + text(i) + "]";
    if (!seen.insert(row.slot).second) return Status::invalid(at + ".slot", "slot " + text(row.slot) + " has two rows in this step");
    MUSTER_TRY(check_row(row, at, &draft));
    tokens += uint64_t(row.count) + row.drafts.size();
    if (tokens > options.tokens_max) return Status::invalid(at + ".count", "the step has more than " + text(options.tokens_max) + " tokens");
  }
  for (const auto& [slot, shadow] : draft) slots_[slot] = shadow;
  epoch_ = step.epoch;
  if (switches) staged_ = 0;
  return Status::ok();
}

Status StepCheck::check_experts(const Step& step, bool* switches) const {
  for (size_t i = 0; i < step.updates.size(); ++i) {
    if (step.updates[i].kind != SlotUpdate::Kind::experts) continue;
    const std::string at = "updates[" + text(i) + "].experts.version";
    const uint32_t version = step.updates[i].version;
    if (*switches) return Status::invalid(at, "is the second switch of this step");
    if (version == 0 || version != staged_) return Status::invalid(at, text(version) + " is not staged" + (staged_ ? "; " + text(staged_) + " is" : ""));
    *switches = true;
  }
  return Status::ok();
}

void StepCheck::settle(const Step& step, const std::vector<RowResult>& results) {
  for (size_t i = 0; i < step.rows.size() && i < results.size(); ++i) {
    if (step.rows[i].drafts.empty()) continue;
    Shadow& slot = slots_[step.rows[i].slot];
    slot.computed = results[i].computed;
    slot.ids = results[i].computed + 1;
    slot.verifying = false;
  }
}

Status StepCheck::find(uint32_t slot, const std::string& at, Draft* draft, Shadow** out) const {
  if (slot == 0 || slot >= slots_.size())
    return Status::invalid(at + ".slot", text(slot) + " is not within 1 and " + text(slots_.size() - 1));
  *out = &draft->try_emplace(slot, slots_[slot]).first->second;
  if ((*out)->verifying) return Status::invalid(at + ".slot", "slot " + text(slot) + " has a verify row in flight; wait for its result");
  return Status::ok();
}

Status StepCheck::find_open(uint32_t slot, const std::string& at, Draft* draft, Shadow** out) const {
  MUSTER_TRY(find(slot, at, draft, out));
  return (*out)->open ? Status::ok() : Status::invalid(at + ".slot", "slot " + text(slot) + " is not open");
}

Status StepCheck::check_blocks(const std::vector<uint32_t>& blocks, const std::string& at, uint64_t held) const {
  if (held + blocks.size() > limits_.kv_blocks) return Status::invalid(at, "a table of more blocks than there are (" + text(limits_.kv_blocks) + ")");
  for (size_t i = 0; i < blocks.size(); ++i)
    if (blocks[i] == 0 || blocks[i] >= limits_.kv_blocks)
      return Status::invalid(at + "[" + text(i) + "]", text(blocks[i]) + " is not within 1 and " + text(limits_.kv_blocks - 1));
  return Status::ok();
}

Status StepCheck::check_ids(const std::vector<uint32_t>& ids, const std::string& at) const {
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] >= limits_.vocab)
      return Status::invalid(at + "[" + text(i) + "]", text(ids[i]) + " is outside the vocabulary of " + text(limits_.vocab));
  return Status::ok();
}

Status StepCheck::check_update(const SlotUpdate& update, const std::string& at, Draft* draft) const {
  Shadow* slot = nullptr;
  switch (update.kind) {
    case SlotUpdate::Kind::open:
      MUSTER_TRY(find(update.slot, at, draft, &slot));
      return check_open(update, at + ".open", slot);
    case SlotUpdate::Kind::close:
      MUSTER_TRY(find_open(update.slot, at, draft, &slot));
      *slot = {};
      return Status::ok();
    case SlotUpdate::Kind::blocks:
      MUSTER_TRY(find_open(update.slot, at, draft, &slot));
      MUSTER_TRY(check_blocks(update.blocks, at + ".blocks", slot->blocks));
      slot->blocks += uint32_t(update.blocks.size());
      return Status::ok();
    case SlotUpdate::Kind::truncate:
      MUSTER_TRY(find_open(update.slot, at, draft, &slot));
      if (update.length == 0 || update.length > slot->ids)
        return Status::invalid(at + ".truncate.length", text(update.length) + " is not within 1 and " + text(slot->ids));
      slot->ids = update.length;
      slot->computed = std::min(slot->computed, update.length);
      return Status::ok();
    case SlotUpdate::Kind::fork: return check_fork(update, at + ".fork", draft);
    case SlotUpdate::Kind::copy: return check_blocks({update.from, update.to}, at + ".copy", 0);
    case SlotUpdate::Kind::experts: return Status::ok();
  }
  return Status::invalid(at + ".kind", text(uint64_t(update.kind)) + " is no kind of update");
}

Status StepCheck::check_open(const SlotUpdate& update, const std::string& at, Shadow* slot) const {
  if (slot->open) return Status::invalid(at, "slot " + text(update.slot) + " is already open");
  if (update.ids.empty() || update.ids.size() > limits_.context_tokens)
    return Status::invalid(at + ".ids", text(update.ids.size()) + " ids are not within 1 and the context of " + text(limits_.context_tokens));
  const uint32_t ids = uint32_t(update.ids.size());
  MUSTER_TRY(check_ids(update.ids, at + ".ids"));
  if (update.generated_from > ids) return Status::invalid(at + ".generated_from", text(update.generated_from) + " is beyond the " + text(ids) + " ids");
  MUSTER_TRY(check_sampler(update.sampler, limits_, at + ".sampling"));
  if (update.length > ids) return Status::invalid(at + ".computed", text(update.length) + " is beyond the " + text(ids) + " ids");
  MUSTER_TRY(check_blocks(update.blocks, at + ".blocks", 0));
  if (uint64_t(update.blocks.size()) * limits_.options.kv_block_tokens < update.length)
    return Status::invalid(at + ".blocks", text(update.blocks.size()) + " blocks do not hold the " + text(update.length) + " computed tokens");
  *slot = {true, false, ids, update.length, uint32_t(update.blocks.size())};
  return Status::ok();
}

Status StepCheck::check_fork(const SlotUpdate& update, const std::string& at, Draft* draft) const {
  Shadow *source = nullptr, *slot = nullptr;
  MUSTER_TRY(find_open(update.from, at + ".from", draft, &source));
  MUSTER_TRY(find(update.slot, at, draft, &slot));
  if (slot->open) return Status::invalid(at, "slot " + text(update.slot) + " is already open");
  if (update.length == 0 || update.length > source->ids)
    return Status::invalid(at + ".length", text(update.length) + " is not within 1 and " + text(source->ids));
  MUSTER_TRY(check_blocks(update.blocks, at + ".blocks", 0));
  const uint32_t computed = std::min(source->computed, update.length);
  if (uint64_t(update.blocks.size()) * limits_.options.kv_block_tokens < computed)
    return Status::invalid(at + ".blocks", text(update.blocks.size()) + " blocks do not hold the " + text(computed) + " computed tokens");
  *slot = {true, false, update.length, computed, uint32_t(update.blocks.size())};
  return Status::ok();
}

Status StepCheck::check_row(const Row& row, const std::string& at, Draft* draft) const {
  Shadow* slot = nullptr;
  MUSTER_TRY(find_open(row.slot, at, draft, &slot));
  if (row.count == 0 || row.count > slot->ids - slot->computed)
    return Status::invalid(at + ".count", text(row.count) + " is not within 1 and the " + text(slot->ids - slot->computed) + " ids that are not computed");
  if (row.drafts.size() > limits_.options.verify_max)
    return Status::invalid(at + ".drafts", text(row.drafts.size()) + " drafts, at most " + text(limits_.options.verify_max));
  MUSTER_TRY(check_ids(row.drafts, at + ".drafts"));
  const uint64_t end = uint64_t(slot->computed) + row.count + row.drafts.size();
  if (end > limits_.context_tokens)
    return Status::invalid(at + (row.drafts.empty() ? ".count" : ".drafts"), "position " + text(end - 1) + " is beyond the context of " + text(limits_.context_tokens));
  if (end > uint64_t(slot->blocks) * limits_.options.kv_block_tokens)
    return Status::invalid(at + ".slot", text(end) + " tokens do not fit the slot's " + text(slot->blocks) + " blocks of " + text(limits_.options.kv_block_tokens));
  MUSTER_TRY(check_choice(row, at, *slot));
  slot->computed += row.count;
  slot->ids += row.sample;
  slot->verifying = !row.drafts.empty();
  return Status::ok();
}

Status StepCheck::check_choice(const Row& row, const std::string& at, const Shadow& slot) const {
  if (row.logprobs > limits_.options.logprobs_max)
    return Status::invalid(at + ".logprobs", text(row.logprobs) + ", at most " + text(limits_.options.logprobs_max));
  if (row.sample) {
    if (slot.computed + row.count != slot.ids)
      return Status::invalid(at + ".sample", "the row ends at id " + text(slot.computed + row.count) + " of " + text(slot.ids) + "; only after the last one is a token sampled");
    return Status::ok();
  }
  if (!row.drafts.empty()) return Status::invalid(at + ".drafts", "drafts are verified by sampling, and the row does not sample");
  if (row.logprobs) return Status::invalid(at + ".logprobs", "the row does not sample");
  if (row.margins) return Status::invalid(at + ".margins", "the row does not sample");
  return Status::ok();
}

}  // namespace muster

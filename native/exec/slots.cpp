#include "exec/slots.h"

#include <algorithm>

#include "exec/digest.h"

namespace muster {
namespace {

Slot opened(const SlotUpdate& update) {
  Slot slot;
  slot.ids = update.ids;
  slot.blocks = update.blocks;
  slot.generated_from = update.generated_from;
  slot.computed = update.length;
  slot.seed = {update.seed_low, update.seed_high};
  slot.sampler = update.sampler;
  return slot;
}

void truncate(Slot& slot, uint32_t length) {
  slot.ids.resize(length);
  slot.computed = std::min(slot.computed, length);
  slot.generated_from = std::min(slot.generated_from, length);
}

}  // namespace

void Slots::update(const SlotUpdate& update, StepWork* work) {
  if (update.kind == SlotUpdate::Kind::experts) {
    work->experts = update.version;
    return;
  }
  Slot& slot = slots_[update.slot];
  switch (update.kind) {
    case SlotUpdate::Kind::open: slot = opened(update); return;
    case SlotUpdate::Kind::close: slot = Slot{}; return;
    case SlotUpdate::Kind::blocks: slot.blocks.insert(slot.blocks.end(), update.blocks.begin(), update.blocks.end()); return;
    case SlotUpdate::Kind::truncate: truncate(slot, update.length); return;
    case SlotUpdate::Kind::fork:
      slot = slots_[update.from];
      slot.blocks = update.blocks;
      truncate(slot, update.length);
      return;
    case SlotUpdate::Kind::copy: work->copies.emplace_back(update.from, update.to); return;
    case SlotUpdate::Kind::experts: return;
  }
}

void Slots::add_row(const Row& row, StepWork* work) {
  const Slot& slot = slots_[row.slot];
  RowWork out;
  out.slot = &slot;
  out.drafts = row.drafts;
  out.first_token = uint32_t(work->ids.size());
  out.count = row.count;
  out.sample = row.sample;
  out.logits = row.logits;
  out.margins = row.margins;
  out.logprobs = row.logprobs;
  const uint32_t index = uint32_t(work->rows.size());
  for (uint32_t i = 0; i < out.positions(); ++i) {
    const uint32_t token = uint32_t(work->ids.size());
    work->ids.push_back(i < row.count ? slot.ids[slot.computed + i] : row.drafts[i - row.count]);
    work->positions.push_back(slot.computed + i);
    work->sequence.push_back(index);
    const int32_t draft = row.sample && i + 1 >= row.count ? int32_t(i + 1 - row.count) : -1;
    if (row.logits || draft >= 0) work->head.push_back({token, index, draft});
  }
  work->tables.push_back(slot.blocks);
  work->rows.push_back(out);
}

StepWork Slots::begin(const Step& step) {
  StepWork work;
  work.epoch = step.epoch;
  for (const SlotUpdate& one : step.updates) update(one, &work);
  for (const Row& row : step.rows) add_row(row, &work);
  return work;
}

RowResult Slots::settle_row(const Row& row, RowChoices& choices) {
  Slot& slot = slots_[row.slot];
  RowResult result;
  result.slot = row.slot;
  result.logits = std::move(choices.logits);
  if (row.sample) {
    uint32_t accepted = 0;
    while (accepted < row.drafts.size() && row.drafts[accepted] == choices.tokens[accepted]) ++accepted;
    result.accepted = accepted;
    result.tokens.assign(choices.tokens.begin(), choices.tokens.begin() + accepted + 1);
    slot.ids.insert(slot.ids.end(), result.tokens.begin(), result.tokens.end());
    if (!choices.details.empty()) {
      choices.details.resize(accepted + 1);
      result.details = std::move(choices.details);
    }
  }
  slot.computed += row.count + result.accepted;
  result.computed = slot.computed;
  return result;
}

std::vector<RowResult> Slots::settle(const Step& step, std::span<RowChoices> choices) {
  std::vector<RowResult> results;
  for (size_t i = 0; i < step.rows.size(); ++i) results.push_back(settle_row(step.rows[i], choices[i]));
  return results;
}

uint64_t digest_of(std::span<const RowResult> rows) {
  Digest fold;
  for (const RowResult& row : rows) {
    if (row.tokens.empty()) continue;
    fold.add(uint64_t(row.slot));
    fold.add(uint64_t(row.accepted));
    for (const uint32_t token : row.tokens) fold.add(uint64_t(token));
  }
  return fold.value;
}

}  // namespace muster

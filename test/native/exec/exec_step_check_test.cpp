// V1, V2: what a step may not ask, one refusal each, named by field; and that a refused step changes nothing.
#include "check.h"
#include "exec/step_check.h"

using namespace muster;

namespace {

StepLimits limits() {
  StepLimits l;
  l.options.rows_max = 3;
  l.options.tokens_max = 12;
  l.options.verify_max = 3;
  l.options.slots_max = 4;
  l.options.kv_block_tokens = 4;
  l.options.logprobs_max = 5;
  l.options.logit_bias_max = 2;
  l.vocab = 50;
  l.context_tokens = 20;
  l.kv_blocks = 16;
  return l;
}

SlotUpdate update(SlotUpdate::Kind kind, uint32_t slot) {
  SlotUpdate u;
  u.kind = kind;
  u.slot = slot;
  return u;
}
SlotUpdate opening(uint32_t slot, uint32_t ids = 6, std::vector<uint32_t> blocks = {1, 2}) {
  SlotUpdate u = update(SlotUpdate::Kind::open, slot);
  for (uint32_t i = 0; i < ids; ++i) u.ids.push_back(i);
  u.generated_from = ids;
  u.blocks = std::move(blocks);
  return u;
}
Row row(uint32_t slot, uint32_t count, bool sample = true, std::vector<uint32_t> drafts = {}) {
  Row r;
  r.slot = slot;
  r.count = count;
  r.sample = sample;
  r.drafts = std::move(drafts);
  return r;
}
Step step(uint64_t epoch, std::vector<SlotUpdate> updates, std::vector<Row> rows) { return {epoch, std::move(updates), std::move(rows)}; }

// Slot 1: 6 ids, none computed, 2 blocks. Slot 2: 9 ids, 8 computed, 5 blocks.
StepCheck opened() {
  StepCheck check(limits());
  SlotUpdate second = opening(2, 9, {3, 4, 5, 6, 7});
  second.length = 8;
  CHECK_OK(check.admit(step(1, {opening(1), second}, {})));
  return check;
}

void refused(const Step& asked, const std::string& field) {
  StepCheck check = opened();
  const Status status = check.admit(asked);
  CHECK_EQ(status.field, field);
  CHECK(status.code == Status::Code::invalid);
  // Nothing changed: the plain next step is still admitted.
  CHECK_OK(check.admit(step(2, {opening(3, 2, {8})}, {row(1, 6), row(2, 1), row(3, 2)})));
}

template <class Change>
Step changed_open(Change change) {
  SlotUpdate u = opening(3, 2, {8});
  change(u);
  return step(2, {u}, {});
}

}  // namespace

TEST("V1: a step out of order is refused") {
  refused(step(3, {}, {}), "step");
  refused(step(1, {}, {}), "step");
}

TEST("V1: slots that are unknown, open or not open are refused") {
  refused(step(2, {opening(0, 2, {8})}, {}), "updates[0].slot");
  refused(step(2, {opening(5, 2, {8})}, {}), "updates[0].slot");
  refused(step(2, {opening(1)}, {}), "updates[0].open");
  refused(step(2, {opening(3, 2, {8}), opening(3, 2, {8})}, {}), "updates[1].open");
  refused(step(2, {update(SlotUpdate::Kind::close, 3)}, {}), "updates[0].slot");
  refused(step(2, {update(SlotUpdate::Kind::blocks, 3)}, {}), "updates[0].slot");
  refused(step(2, {}, {row(3, 1)}), "rows[0].slot");
  refused(step(2, {}, {row(1, 6), row(1, 1)}), "rows[1].slot");
  refused(step(2, {update(SlotUpdate::Kind::close, 1)}, {row(1, 6)}), "rows[0].slot");
  refused(step(2, {update(SlotUpdate::Kind(9), 1)}, {}), "updates[0].kind");
}

TEST("V1: an opening with wrong ids, lengths, blocks or sampler is refused by the name of its field") {
  refused(changed_open([](SlotUpdate& u) { u.ids.clear(); }), "updates[0].open.ids");
  refused(changed_open([](SlotUpdate& u) { u.ids.resize(21); }), "updates[0].open.ids");
  refused(changed_open([](SlotUpdate& u) { u.ids[1] = 50; }), "updates[0].open.ids[1]");
  refused(changed_open([](SlotUpdate& u) { u.generated_from = 3; }), "updates[0].open.generated_from");
  refused(changed_open([](SlotUpdate& u) { u.length = 3; }), "updates[0].open.computed");
  refused(changed_open([](SlotUpdate& u) { u.blocks = {0}; }), "updates[0].open.blocks[0]");
  refused(changed_open([](SlotUpdate& u) { u.blocks = {9, 16}; }), "updates[0].open.blocks[1]");
  refused(changed_open([](SlotUpdate& u) { u.blocks.assign(17, 1); }), "updates[0].open.blocks");
  refused(changed_open([](SlotUpdate& u) { u.length = 2, u.blocks.clear(); }), "updates[0].open.blocks");
  refused(changed_open([](SlotUpdate& u) { u.sampler.temperature = std::nanf(""); }), "updates[0].open.sampling.temperature");
  refused(changed_open([](SlotUpdate& u) { u.sampler.temperature = -1; }), "updates[0].open.sampling.temperature");
  refused(changed_open([](SlotUpdate& u) { u.sampler.top_p = 0; }), "updates[0].open.sampling.top_p");
  refused(changed_open([](SlotUpdate& u) { u.sampler.min_p = 1.5f; }), "updates[0].open.sampling.min_p");
  refused(changed_open([](SlotUpdate& u) { u.sampler.repetition = 0; }), "updates[0].open.sampling.repetition");
  refused(changed_open([](SlotUpdate& u) { u.sampler.presence = INFINITY; }), "updates[0].open.sampling.presence");
  refused(changed_open([](SlotUpdate& u) { u.sampler.frequency = std::nanf(""); }), "updates[0].open.sampling.frequency");
  refused(changed_open([](SlotUpdate& u) { u.sampler.bias.resize(3); }), "updates[0].open.sampling.bias");
  refused(changed_open([](SlotUpdate& u) { u.sampler.bias = {{50, 1}}; }), "updates[0].open.sampling.bias[0].id");
  refused(changed_open([](SlotUpdate& u) { u.sampler.bias = {{1, INFINITY}}; }), "updates[0].open.sampling.bias[0].bias");
}

TEST("V1: truncate, fork, copy and blocks beyond what is there are refused") {
  SlotUpdate cut = update(SlotUpdate::Kind::truncate, 1);
  refused(step(2, {cut}, {}), "updates[0].truncate.length");
  cut.length = 7;
  refused(step(2, {cut}, {}), "updates[0].truncate.length");
  SlotUpdate fork = update(SlotUpdate::Kind::fork, 3);
  fork.from = 4;
  fork.length = 1;
  refused(step(2, {fork}, {}), "updates[0].fork.from.slot");
  fork.from = 2;
  fork.length = 10;
  refused(step(2, {fork}, {}), "updates[0].fork.length");
  fork.length = 8;
  fork.blocks = {9};
  refused(step(2, {fork}, {}), "updates[0].fork.blocks");
  fork.slot = 1;
  refused(step(2, {fork}, {}), "updates[0].fork");
  SlotUpdate copy = update(SlotUpdate::Kind::copy, 0);
  copy.from = 1;
  refused(step(2, {copy}, {}), "updates[0].copy[1]");
  SlotUpdate blocks = update(SlotUpdate::Kind::blocks, 1);
  blocks.blocks = {16};
  refused(step(2, {blocks}, {}), "updates[0].blocks[0]");
}

TEST("V1: rows beyond ids, blocks, context or options are refused") {
  refused(step(2, {}, {row(1, 0)}), "rows[0].count");
  refused(step(2, {}, {row(1, 7)}), "rows[0].count");
  refused(step(2, {}, {row(1, 5)}), "rows[0].sample");
  refused(step(2, {}, {row(2, 1, true, {1, 2, 3, 4})}), "rows[0].drafts");
  refused(step(2, {}, {row(2, 1, true, {1, 50})}), "rows[0].drafts[1]");
  refused(step(2, {}, {row(1, 2, false, {1})}), "rows[0].drafts");
  refused(step(2, {}, {row(1, 6, true, {1, 2, 3})}), "rows[0].slot");  // 9 tokens, 2 blocks of 4
  Row with = row(1, 6);
  with.logprobs = 6;
  refused(step(2, {}, {with}), "rows[0].logprobs");
  with = row(1, 2, false);
  with.logprobs = 1;
  refused(step(2, {}, {with}), "rows[0].logprobs");
  with.logprobs = 0;
  with.margins = true;
  refused(step(2, {}, {with}), "rows[0].margins");
  refused(step(2, {opening(3, 7, {8, 9})}, {row(1, 6), row(3, 7)}), "rows[1].count");  // 13 tokens of 12
  refused(step(2, {opening(3, 1, {8}), opening(4, 1, {8})}, {row(1, 6), row(2, 1), row(3, 1), row(4, 1)}), "rows");
  SlotUpdate full = opening(3, 19, {8, 9, 10, 11, 12, 13});
  full.length = 18;
  refused(step(2, {full}, {row(3, 1, true, {1, 2})}), "rows[0].drafts");  // position 20 of 20
}

TEST("a plain row may follow one whose token is not known yet") {
  StepCheck check = opened();
  CHECK_OK(check.admit(step(2, {}, {row(2, 1)})));
  CHECK_OK(check.admit(step(3, {}, {row(2, 1)})));
  CHECK_EQ(check.admit(step(4, {}, {row(2, 2)})).field, std::string("rows[0].count"));
  CHECK_OK(check.admit(step(4, {}, {row(2, 1, true, {3})})));
}

TEST("V2: a slot with a verify row in flight is named by nothing else until it is settled") {
  StepCheck check = opened();
  const Step verify = step(2, {}, {row(2, 1, true, {1, 2, 3})});
  CHECK_OK(check.admit(verify));
  CHECK_EQ(check.admit(step(3, {}, {row(2, 1)})).field, std::string("rows[0].slot"));
  CHECK_EQ(check.admit(step(3, {update(SlotUpdate::Kind::close, 2)}, {})).field, std::string("updates[0].slot"));
  SlotUpdate fork = update(SlotUpdate::Kind::fork, 3);
  fork.from = 2;
  fork.length = 1;
  CHECK_EQ(check.admit(step(3, {fork}, {})).field, std::string("updates[0].fork.from.slot"));
  CHECK_OK(check.admit(step(3, {}, {row(1, 6)})));
  RowResult result;
  result.slot = 2;
  result.accepted = 2;
  result.tokens = {1, 2, 9};
  result.computed = 11;
  check.settle(verify, {result});
  CHECK_EQ(check.admit(step(4, {}, {row(2, 2)})).field, std::string("rows[0].count"));  // 12 ids, 11 computed
  CHECK_OK(check.admit(step(4, {}, {row(2, 1)})));
}

MUSTER_TEST_MAIN

#include "addon/decode.h"

#include <algorithm>
#include <bit>

namespace muster::addon {
namespace {

// Reads words in order; a read beyond the end answers 0 and is remembered.
class Words {
 public:
  explicit Words(std::span<const uint32_t> words) : words_(words) {}
  uint32_t u32() {
    if (at_ < words_.size()) return words_[at_++];
    short_ = true;
    return 0;
  }
  uint64_t u64() {
    const uint64_t low = u32();
    return low | uint64_t(u32()) << 32;
  }
  float f32() { return std::bit_cast<float>(u32()); }
  // A count of things that take `each` words or more: never larger than what is left, so that nothing is allocated for a lie.
  uint32_t count(size_t each) {
    const uint32_t n = u32();
    if (size_t(n) * each <= words_.size() - at_) return n;
    short_ = true;
    return 0;
  }
  std::vector<uint32_t> list() {
    const uint32_t n = count(1);
    std::vector<uint32_t> out(words_.begin() + std::ptrdiff_t(at_), words_.begin() + std::ptrdiff_t(at_ + n));
    at_ += n;
    return out;
  }
  bool is_short() const { return short_; }
  bool at_end() const { return at_ == words_.size(); }
  size_t at() const { return at_; }

 private:
  std::span<const uint32_t> words_;
  size_t at_ = 0;
  bool short_ = false;
};

void read_open(Words& words, SlotUpdate* out) {
  out->ids = words.list();
  out->generated_from = words.u32();
  out->seed_low = words.u64();
  out->seed_high = words.u64();
  Sampler& sampler = out->sampler;
  sampler.temperature = words.f32();
  sampler.top_k = words.u32();
  sampler.top_p = words.f32();
  sampler.min_p = words.f32();
  sampler.repetition = words.f32();
  sampler.presence = words.f32();
  sampler.frequency = words.f32();
  for (uint32_t n = words.count(2); n > 0; --n) {
    const uint32_t id = words.u32();
    sampler.bias.push_back({id, words.f32()});
  }
  out->length = words.u32();
  out->blocks = words.list();
}

SlotUpdate read_update(Words& words) {
  SlotUpdate out;
  out.kind = SlotUpdate::Kind(uint8_t(std::min<uint32_t>(words.u32(), 255)));
  out.slot = words.u32();
  switch (out.kind) {
    case SlotUpdate::Kind::open: read_open(words, &out); break;
    case SlotUpdate::Kind::close: break;
    case SlotUpdate::Kind::blocks: out.blocks = words.list(); break;
    case SlotUpdate::Kind::truncate: out.length = words.u32(); break;
    case SlotUpdate::Kind::fork:
      out.from = words.u32();
      out.length = words.u32();
      out.blocks = words.list();
      break;
    case SlotUpdate::Kind::copy:
      out.from = words.u32();
      out.to = words.u32();
      break;
    case SlotUpdate::Kind::experts: out.version = words.u32(); break;
  }
  return out;
}

Row read_row(Words& words) {
  Row out;
  out.slot = words.u32();
  out.count = words.u32();
  const uint32_t flags = words.u32();
  out.sample = flags & 1;
  out.logits = flags & 2;
  out.margins = flags & 4;
  out.logprobs = words.u32();
  out.drafts = words.list();
  return out;
}

class Writer {
 public:
  void u64(uint64_t value) {
    out.words.push_back(uint32_t(value));
    out.words.push_back(uint32_t(value >> 32));
  }
  void u32(size_t value) { out.words.push_back(uint32_t(value)); }
  void row(const RowResult& row) {
    u32(row.slot);
    u32(row.accepted);
    u32(row.computed);
    u32(row.tokens.size());
    out.words.insert(out.words.end(), row.tokens.begin(), row.tokens.end());
    u32(row.details.size());
    for (const TokenDetail& detail : row.details) {
      u32(detail.top.size());
      out.details.insert(out.details.end(), {detail.logprob, detail.score_gap, detail.router_gap});
      for (const TopLogprob& top : detail.top) {
        u32(top.id);
        out.details.push_back(top.logprob);
      }
    }
    u32(row.logits.size());
    out.logits.insert(out.logits.end(), row.logits.begin(), row.logits.end());
  }
  EncodedResult out;
};

}  // namespace

Status decode_step(std::span<const uint32_t> span, Step* out) {
  Words words(span);
  if (words.u32() != kStepMagic) return Status::invalid("step", "does not begin with the mark of a step");
  out->epoch = words.u64();
  const uint32_t updates = words.count(2);
  const uint32_t rows = words.count(5);
  for (uint32_t i = 0; i < updates && !words.is_short(); ++i) out->updates.push_back(read_update(words));
  for (uint32_t i = 0; i < rows && !words.is_short(); ++i) out->rows.push_back(read_row(words));
  if (words.is_short()) return Status::invalid("step", "ends before word " + std::to_string(words.at()) + " is understood");
  if (!words.at_end()) return Status::invalid("step", "goes on after word " + std::to_string(words.at()));
  return Status::ok();
}

EncodedResult encode_result(StepResult&& result) {
  Writer writer;
  writer.u64(result.epoch);
  writer.u64(result.digest);
  writer.u32(result.rows.size());
  for (const RowResult& row : result.rows) writer.row(row);
  return std::move(writer.out);
}

}  // namespace muster::addon

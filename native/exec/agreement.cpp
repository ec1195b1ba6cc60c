#include "exec/agreement.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

#include "exec/digest.h"

namespace muster {
namespace {

// Travels as bytes between builds of one version: fixed widths, no padding.
struct Record {
  char base[128];
  uint64_t shard_digest;
  uint32_t kv_blocks, experts;
  Range vocab, heads, dense_ffn, shared_ffn, expert_ffn;
  uint32_t first_expert, unused;
};
static_assert(sizeof(Record) == 128 + 8 + 8 + 5 * 8 + 8);

uint64_t bits(double value) { return std::bit_cast<uint64_t>(value); }

uint64_t digest_of(const ModelDesc& model) {
  Digest digest;
  for (const uint64_t word : {uint64_t(model.vocab), uint64_t(model.hidden), bits(model.norm_eps), uint64_t(model.tied_head), uint64_t(model.blocks.size())}) digest.add(word);
  for (const BlockSpec& block : model.blocks) {
    const AttentionSpec& a = block.attention;
    for (const uint64_t word : {uint64_t(a.heads), uint64_t(a.kv_heads), uint64_t(a.head_dim), bits(a.scale), uint64_t(a.rope), uint64_t(a.rope_dims),
                                uint64_t(a.mask), uint64_t(a.mask_span), uint64_t(a.qk_unit_norm), bits(a.temperature_scale), uint64_t(a.temperature_floor)})
      digest.add(word);
    for (const float frequency : a.rope_frequencies) digest.add(bits(frequency));
    const MoeSpec& m = block.moe;
    for (const uint32_t word : {block.dense_ffn, m.experts, m.top_k, m.expert_ffn, m.shared_ffn, uint32_t(m.score)}) digest.add(uint64_t(word));
  }
  return digest.value;
}

uint64_t digest_of(const RankClaim& claim) {
  const RankShard& shard = *claim.shard;
  Digest digest;
  digest.add(claim.layout_digest);
  digest.add(uint64_t(shard.rank));
  for (const Range& range : {shard.heads, shard.kv_heads, shard.vocab, shard.dense_ffn, shard.shared_ffn, shard.expert_ffn}) {
    digest.add(uint64_t(range.begin));
    digest.add(uint64_t(range.end));
  }
  for (const uint32_t expert : shard.experts) digest.add(uint64_t(expert));
  return digest.value;
}

const MoeSpec* moe_of(const ModelDesc& model) {
  for (const BlockSpec& block : model.blocks)
    if (!block.dense_ffn) return &block.moe;
  return nullptr;
}

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// "-ep2etp1" where there are experts: slots are told apart by their first expert.
std::string expert_cut(const std::vector<Record>& records) {
  std::set<uint32_t> slots;
  for (const Record& record : records)
    if (record.experts) slots.insert(record.first_expert);
  if (slots.empty()) return "";
  return "-ep" + std::to_string(slots.size()) + "etp" + std::to_string(records.size() / slots.size());
}

std::string base_of(const RankClaim& claim) {
  std::string text = claim.backend + "/f32kv" + std::to_string(claim.kv_block_tokens) + "/tp" + std::to_string(claim.world);
  return text + "/" + hex(digest_of(*claim.model));
}

Status make_record(const RankClaim& claim, Record* out) {
  const std::string base = base_of(claim);
  if (base.size() >= sizeof out->base) return Status::internal("numerics_id", "\"" + base + "\" is too long");
  *out = {};
  std::memcpy(out->base, base.data(), base.size());
  const RankShard& shard = *claim.shard;
  out->shard_digest = digest_of(claim);
  out->kv_blocks = claim.kv_blocks;
  out->experts = uint32_t(shard.experts.size());
  out->first_expert = shard.experts.empty() ? 0 : shard.experts[0];
  out->vocab = shard.vocab;
  out->heads = shard.heads;
  out->dense_ffn = shard.dense_ffn;
  out->shared_ffn = shard.shared_ffn;
  out->expert_ffn = shard.expert_ffn;
  return Status::ok();
}

Status covers(const std::vector<Record>& records, Range Record::* part, uint32_t whole, const char* field) {
  std::vector<Range> ranges;
  for (const Record& record : records)
    if ((record.*part).size()) ranges.push_back(record.*part);
  std::ranges::sort(ranges, {}, &Range::begin);
  uint32_t end = 0;
  for (const Range& range : ranges) {
    if (range.begin != end)
      return Status::invalid(field, "the ranks' parts do not cover " + std::to_string(whole) + " once: " + std::to_string(end) + " is followed by " + std::to_string(range.begin));
    end = range.end;
  }
  if (end == whole) return Status::ok();
  return Status::invalid(field, "the ranks' parts end at " + std::to_string(end) + " of " + std::to_string(whole));
}

Status check_cover(const ModelDesc& model, const std::vector<Record>& records) {
  MUSTER_TRY(covers(records, &Record::vocab, model.vocab, "vocab"));
  for (const BlockSpec& block : model.blocks) {
    MUSTER_TRY(covers(records, &Record::heads, block.attention.heads, "heads"));
    if (block.dense_ffn) MUSTER_TRY(covers(records, &Record::dense_ffn, block.dense_ffn, "dense_ffn"));
    if (!block.dense_ffn && block.moe.shared_ffn) MUSTER_TRY(covers(records, &Record::shared_ffn, block.moe.shared_ffn, "shared_ffn"));
  }
  const MoeSpec* moe = moe_of(model);
  if (!moe) return Status::ok();
  uint64_t units = 0;
  for (const Record& record : records) units += uint64_t(record.experts) * record.expert_ffn.size();
  if (units == uint64_t(moe->experts) * moe->expert_ffn) return Status::ok();
  return Status::invalid("experts", "the ranks hold " + std::to_string(units) + " expert units of " + std::to_string(uint64_t(moe->experts) * moe->expert_ffn));
}

}  // namespace

Status agree(const RankClaim& claim, Comm* comm, Agreement* out) {
  Record mine;
  MUSTER_TRY(make_record(claim, &mine));
  std::vector<Record> records(claim.world);
  if (comm) {
    comm->begin(claim.shard->rank, 0);
    MUSTER_TRY(comm->gather(claim.shard->rank, {reinterpret_cast<const uint8_t*>(&mine), sizeof mine},
                            {reinterpret_cast<uint8_t*>(records.data()), records.size() * sizeof(Record)}));
  } else {
    records[0] = mine;
  }
  Digest all;
  for (size_t rank = 0; rank < records.size(); ++rank) {
    Record& record = records[rank];
    record.base[sizeof record.base - 1] = 0;
    if (std::strcmp(record.base, mine.base))
      return Status::invalid("numerics_id", "rank " + std::to_string(claim.shard->rank) + " has \"" + mine.base + "\", rank " + std::to_string(rank) + " has \"" + record.base + "\"");
    if (record.kv_blocks != mine.kv_blocks)
      return Status::invalid("kv_blocks", "rank " + std::to_string(claim.shard->rank) + " has " + std::to_string(mine.kv_blocks) + ", rank " + std::to_string(rank) + " has " + std::to_string(record.kv_blocks));
    all.add(record.shard_digest);
    out->vocab_of_rank.push_back(record.vocab);
  }
  MUSTER_TRY(check_cover(*claim.model, records));
  out->numerics_id = std::string(mine.base) + expert_cut(records) + "-" + hex(all.value);
  return Status::ok();
}

}  // namespace muster

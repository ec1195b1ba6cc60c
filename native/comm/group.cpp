#include "comm/group.h"

#include <algorithm>
#include <cstring>

namespace muster::comm {

namespace {

constexpr size_t sum_piece = piece_bytes_max / sizeof(float);
constexpr size_t max_piece = piece_bytes_max / sizeof(Candidate);
// From here on each local rank adds only its share of the elements and all copy the result: less reading for one more
// meeting. With L local ranks of W the traffic per rank falls from W + 1 to W / L + 2 lengths.
constexpr uint32_t slice_ranks_min = 3;
constexpr size_t slice_elements_min = 32 * 1024;
constexpr size_t slice_align = 16;  // floats of a cache line: two ranks never write to one line

void grow(std::vector<uint8_t>& buffer, size_t bytes) {
  if (buffer.size() < bytes) buffer.resize(bytes);
}

}  // namespace

GroupComm::GroupComm(std::unique_ptr<Board> board, std::unique_ptr<Exchange> exchange)
    : board_(std::move(board)),
      exchange_(std::move(exchange)),
      local_count_(static_cast<uint32_t>(board_->roster().local().size())) {
  local_ = std::make_unique<LocalRank[]>(local_count_);
  for (uint32_t i = 0; i < local_count_; ++i) {
    local_[i].rank = board_->roster().local()[i];
    local_[i].sources.reserve(world());
  }
  ours_.reserve(local_count_);
}

GroupComm::~GroupComm() { close(); }

void GroupComm::begin(uint32_t rank, uint64_t epoch) {
  if (!board_->roster().is_local(rank)) return;  // its first collective says so
  LocalRank& self = local_[board_->roster().index_in_worker[rank]];
  self.epoch = epoch;
  self.waited_ns.store(0, std::memory_order_relaxed);
}

double GroupComm::waited_ms(uint32_t rank) const {
  if (!board_->roster().is_local(rank)) return 0;
  return static_cast<double>(local_[board_->roster().index_in_worker[rank]].waited_ns.load(std::memory_order_relaxed)) * 1e-6;
}

void GroupComm::close() {
  const bool first = !board_->failed();
  board_->fail(Status::lost(-1, 0, 0, "the group was closed on worker " + std::to_string(board_->roster().worker)));
  if (exchange_) exchange_->leave(first);
}

Status GroupComm::leave() {
  if (exchange_) exchange_->leave(false);
  return board_->failure();
}

Status GroupComm::refuse(Status status) {
  board_->fail(std::move(status));
  return leave();
}

const uint8_t* GroupComm::piece(uint32_t rank, uint64_t sequence) const {
  const Roster& roster = board_->roster();
  if (roster.is_local(rank)) return local_[roster.index_in_worker[rank]].slots[sequence & 1].data();
  return exchange_->piece(rank, sequence);
}

// --- meetings -------------------------------------------------------------------------------------------------------

Status GroupComm::enter(uint32_t rank, LocalRank** self) {
  if (board_->failed()) return board_->failure();
  if (!board_->roster().is_local(rank))
    return Status::invalid("rank", "rank " + std::to_string(rank) + " is not one of worker " + std::to_string(board_->roster().worker));
  *self = &local_[board_->roster().index_in_worker[rank]];
  return Status::ok();
}

// Names the next operation of this rank; its slot has room for `bytes`.
uint8_t* GroupComm::prepare(LocalRank& self, Op op, uint64_t total, uint32_t bytes) {
  self.call = {op, ++self.sequence, self.epoch, total, bytes};
  std::vector<uint8_t>& slot = self.slots[self.sequence & 1];
  grow(slot, bytes);
  return slot.data();
}

void GroupComm::open(Gate& gate, uint64_t sequence) {
  gate.arrived.store(0, std::memory_order_relaxed);
  gate.opened.store(sequence);
  board_->doorbell().ring();
}

Status GroupComm::wait_for(Gate& gate, LocalRank& self, Phase phase) {
  const auto ready = [&] { return gate.opened.load() >= self.call.sequence || board_->failed(); };
  const Wait wait(*board_, self.call, phase);
  if (!Doorbell::spin(ready, self.spin.ns())) {
    const int64_t most = exchange_ ? exchange_->tick_ns() : INT64_MAX;
    while (true) {
      board_->doorbell().sleep(ready, wait.sleep_ns(most));
      if (ready()) break;
      if (!wait.check().is_ok()) break;
      if (exchange_) exchange_->tick(self.call, wait);
    }
  }
  self.spin.learn(wait.waited_ns());
  self.waited_ns.fetch_add(wait.waited_ns(), std::memory_order_relaxed);
  return gate.opened.load() >= self.call.sequence ? Status::ok() : leave();
}

Status GroupComm::agree(const Call& call, uint32_t rank) const {
  for (uint32_t i = 0; i < local_count_; ++i) {
    const Call& other = local_[i].call;
    if (other.op == call.op && other.epoch == call.epoch && other.total == call.total) continue;
    const Roster& roster = board_->roster();
    return Status::internal(std::string("comm.") + name_of(call.op), roster.name(local_[i].rank) + " is in " + describe(other) +
                            " where " + roster.name(rank) + " is in " + describe(call) + "; the ranks must agree");
  }
  return Status::ok();
}

bool GroupComm::is_sliced(const Call& call) const {
  return call.op == Op::sum && local_count_ >= slice_ranks_min && call.bytes >= slice_elements_min * sizeof(float);
}

// By the last local rank to arrive, while the others wait.
Status GroupComm::complete(const LocalRank& last) {
  const Call& call = last.call;
  if (Status status = agree(call, last.rank); !status.is_ok()) return board_->fail(std::move(status));
  if (std::vector<float>& result = results_[call.sequence & 1]; is_sliced(call) && result.size() < call.bytes / sizeof(float))
    result.resize(call.bytes / sizeof(float));
  if (!exchange_) return Status::ok();
  ours_.clear();
  for (uint32_t i = 0; i < local_count_; ++i) ours_.emplace_back(local_[i].slots[call.sequence & 1].data(), call.bytes);
  return exchange_->swap(call, ours_);
}

Status GroupComm::meet(LocalRank& self) {
  board_->arrive(self.rank, {self.call.sequence, self.call.epoch});
  if (arrive_.arrived.fetch_add(1) + 1 < local_count_) return wait_for(arrive_, self, Phase::arrive);
  const int64_t start = exchange_ ? now_ns() : 0;
  const Status status = complete(self);
  if (exchange_) self.waited_ns.fetch_add(now_ns() - start, std::memory_order_relaxed);
  if (!status.is_ok()) return leave();
  open(arrive_, self.call.sequence);
  return Status::ok();
}

Status GroupComm::meet_again(LocalRank& self) {
  board_->finish(self.rank, self.call.sequence);
  if (finish_.arrived.fetch_add(1) + 1 < local_count_) return wait_for(finish_, self, Phase::finish);
  open(finish_, self.call.sequence);
  return Status::ok();
}

// --- operations -----------------------------------------------------------------------------------------------------

Status GroupComm::sum(uint32_t rank, std::span<float> data) {
  LocalRank* self = nullptr;
  MUSTER_TRY(enter(rank, &self));
  size_t first = 0;
  do {
    const std::span<float> part = data.subspan(first, std::min(sum_piece, data.size() - first));
    uint8_t* slot = prepare(*self, Op::sum, data.size_bytes(), static_cast<uint32_t>(part.size_bytes()));
    if (!part.empty()) std::memcpy(slot, part.data(), part.size_bytes());
    MUSTER_TRY(is_sliced(self->call) ? add_sliced(*self, part) : add(*self, part));
    first += part.size();
  } while (first < data.size());
  return Status::ok();
}

Status GroupComm::add(LocalRank& self, std::span<float> out) {
  MUSTER_TRY(meet(self));
  self.sources.clear();
  for (uint32_t r = 0; r < world(); ++r) self.sources.push_back(reinterpret_cast<const float*>(piece(r, self.call.sequence)));
  if (!out.empty()) add_in_order(self.sources, out);
  return Status::ok();
}

Status GroupComm::add_sliced(LocalRank& self, std::span<float> out) {
  MUSTER_TRY(meet(self));
  const uint64_t sequence = self.call.sequence;
  const size_t share = (out.size() / local_count_ + slice_align) / slice_align * slice_align;
  const size_t index = board_->roster().index_in_worker[self.rank];
  const size_t first = std::min(out.size(), index * share), last = std::min(out.size(), first + share);
  float* result = results_[sequence & 1].data();
  self.sources.clear();
  for (uint32_t r = 0; r < world(); ++r)
    self.sources.push_back(reinterpret_cast<const float*>(piece(r, sequence)) + first);
  if (last > first) add_in_order(self.sources, {result + first, last - first});
  MUSTER_TRY(meet_again(self));
  std::memcpy(out.data(), result, out.size_bytes());
  return Status::ok();
}

Status GroupComm::gather(uint32_t rank, std::span<const uint8_t> mine, std::span<uint8_t> all) {
  LocalRank* self = nullptr;
  MUSTER_TRY(enter(rank, &self));
  if (all.size() != mine.size() * world())
    return refuse(Status::internal("comm.gather", board_->roster().name(rank) + " offers " + std::to_string(all.size()) +
                                   " bytes for " + std::to_string(world()) + " ranks of " + std::to_string(mine.size())));
  size_t first = 0;
  do {
    const auto bytes = static_cast<uint32_t>(std::min<size_t>(piece_bytes_max, mine.size() - first));
    uint8_t* slot = prepare(*self, Op::gather, mine.size(), bytes);
    if (bytes > 0) std::memcpy(slot, mine.data() + first, bytes);
    MUSTER_TRY(meet(*self));
    for (uint32_t r = 0; r < world() && bytes > 0; ++r)
      std::memcpy(all.data() + r * mine.size() + first, piece(r, self->call.sequence), bytes);
    first += bytes;
  } while (first < mine.size());
  return Status::ok();
}

Status GroupComm::max(uint32_t rank, std::span<MaxPair> best, std::span<double> second) {
  LocalRank* self = nullptr;
  MUSTER_TRY(enter(rank, &self));
  const bool seconds = !second.empty();
  if (seconds && second.size() != best.size())
    return refuse(Status::internal("comm.max", board_->roster().name(rank) + " has " + std::to_string(best.size()) + " pairs and " +
                                   std::to_string(second.size()) + " runners-up"));
  size_t first = 0;
  do {
    const size_t count = std::min(max_piece, best.size() - first);
    auto* slot = reinterpret_cast<Candidate*>(prepare(*self, seconds ? Op::max_second : Op::max, best.size() * sizeof(Candidate),
                                                      static_cast<uint32_t>(count * sizeof(Candidate))));
    for (size_t i = 0; i < count; ++i)
      slot[i] = {best[first + i].value, seconds ? second[first + i] : best[first + i].value, best[first + i].id, 0};
    MUSTER_TRY(meet(*self));
    for (size_t i = 0; i < count; ++i) {
      Candidate won = reinterpret_cast<const Candidate*>(piece(0, self->call.sequence))[i];
      for (uint32_t r = 1; r < world(); ++r) won = better_of(won, reinterpret_cast<const Candidate*>(piece(r, self->call.sequence))[i]);
      best[first + i] = {won.value, won.id};
      if (seconds) second[first + i] = won.second;
    }
    first += count;
  } while (first < best.size());
  return Status::ok();
}

Status GroupComm::barrier(uint32_t rank) {
  LocalRank* self = nullptr;
  MUSTER_TRY(enter(rank, &self));
  prepare(*self, Op::barrier, 0, 0);
  return meet(*self);
}

}  // namespace muster::comm

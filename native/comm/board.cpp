#include "comm/board.h"

#include <algorithm>
#include <cstdio>

namespace muster::comm {

namespace {
constexpr int64_t ns_per_ms = 1'000'000;
std::string whole(double ms) { return std::to_string(static_cast<int64_t>(ms)); }
}  // namespace

const char* name_of(Op op) {
  switch (op) {
    case Op::sum: return "sum";
    case Op::gather: return "gather";
    case Op::max: return "max";
    case Op::max_second: return "max with runner-up";
    case Op::barrier: return "barrier";
  }
  return "unknown operation";
}

std::string describe(const Call& call) {
  return std::string(name_of(call.op)) + " of " + std::to_string(call.total) + " bytes in step " + std::to_string(call.epoch) +
         " (operation " + std::to_string(call.sequence) + ")";
}

Board::Board(Roster roster, const CommLimits& limits)
    : roster_(std::move(roster)),
      limits_(limits),
      entries_(std::make_unique<Entry[]>(roster_.world())),
      received_(std::make_unique<std::atomic<uint64_t>[]>(roster_.workers())) {
  limits_.stall_give_up_ms = std::max(1u, limits_.stall_give_up_ms);
}

void Board::arrive(uint32_t rank, const Arrival& at) {
  entries_[rank].epoch.store(at.epoch, std::memory_order_relaxed);
  entries_[rank].sequence.store(at.sequence, std::memory_order_release);
}

void Board::receive(uint32_t worker, const Arrival& at) {
  for (uint32_t rank : roster_.ranks_of_worker[worker]) arrive(rank, at);
  received_[worker].store(at.sequence, std::memory_order_release);
}

Arrival Board::arrived(uint32_t rank) const {
  const uint64_t sequence = entries_[rank].sequence.load(std::memory_order_acquire);
  return {sequence, entries_[rank].epoch.load(std::memory_order_relaxed)};
}

Status Board::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

Status Board::fail(Status status) {
  Status stands;
  bool first = false;
  {
    std::lock_guard lock(mutex_);
    first = failure_.is_ok();
    if (first) failure_ = std::move(status);
    stands = failure_;
  }
  if (first) {
    failed_.store(true);
    doorbell_.ring();
    on_failure();
  }
  return stands;
}

bool Board::is_late(uint32_t rank, const Call& call, Phase phase) const {
  if (phase == Phase::arrive) return arrived(rank).sequence < call.sequence;
  return roster_.is_local(rank) && entries_[rank].finished.load(std::memory_order_acquire) < call.sequence;
}

Status Board::late(const Call& call, Phase phase, double waited_ms) const {
  int named = -1;
  std::string also;
  for (uint32_t rank = 0; rank < roster_.world(); ++rank) {
    if (!is_late(rank, call, phase)) continue;
    if (named < 0) named = static_cast<int>(rank);
    else also += (also.empty() ? "; also late: " : ", ") + std::to_string(rank);
  }
  const std::string within = " within " + whole(waited_ms) + " ms";
  if (named >= 0) {
    const auto rank = static_cast<uint32_t>(named);
    const Arrival last = arrived(rank);
    const std::string seen = last.sequence == 0 ? "; it has not been seen yet" : "; it was last seen in step " +
                             std::to_string(last.epoch) + ", operation " + std::to_string(last.sequence);
    const char* verb = phase == Phase::arrive ? " did not arrive at " : " did not finish its part of ";
    return Status::lost(named, call.epoch, waited_ms, roster_.name(rank) + verb + describe(call) + within + seen + also);
  }
  for (uint32_t worker = 0; worker < roster_.workers(); ++worker) {
    if (worker == roster_.worker || received_[worker].load(std::memory_order_acquire) >= call.sequence) continue;
    const uint32_t rank = roster_.ranks_of_worker[worker].front();
    return Status::lost(static_cast<int>(rank), call.epoch, waited_ms, "worker " + std::to_string(worker) +
                        " did not deliver " + describe(call) + within + ", though its ranks had arrived");
  }
  const uint32_t self = roster_.local().front();
  return Status::lost(static_cast<int>(self), call.epoch, waited_ms,
                      "every rank arrived at " + describe(call) + ", but this worker did not complete it" + within);
}

bool Board::take_report(uint64_t sequence) {
  uint64_t last = reported_.load();
  while (last < sequence)
    if (reported_.compare_exchange_weak(last, sequence)) return true;
  return false;
}

Status Wait::check() const {
  if (board_.failed()) return board_.failure();
  const double waited = waited_ms();
  const CommLimits& limits = board_.limits();
  if (waited >= limits.stall_give_up_ms) return board_.fail(board_.late(call_, phase_, waited));
  if (waited >= limits.stall_report_ms && board_.take_report(call_.sequence)) {
    const Status late = board_.late(call_, phase_, waited);
    std::fprintf(stderr, "muster: stall: %s; giving up after %u ms\n", late.detail.c_str(), limits.stall_give_up_ms);
  }
  return Status::ok();
}

int64_t Wait::sleep_ns(int64_t most) const {
  const int64_t waited = waited_ns();
  const int64_t report = static_cast<int64_t>(board_.limits().stall_report_ms) * ns_per_ms - waited;
  const int64_t give_up = static_cast<int64_t>(board_.limits().stall_give_up_ms) * ns_per_ms - waited;
  int64_t sleep = std::min(most, give_up);
  if (report > 0) sleep = std::min(sleep, report);
  return std::max<int64_t>(sleep, 0);
}

}  // namespace muster::comm

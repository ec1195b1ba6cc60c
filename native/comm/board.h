// The board: which operation each rank of the group has reached, and how the group failed if it did. Written outside the
// collectives, so that whoever waits can name who is late (C2). Owns no payload and no socket.
//
//   B1  the first failure stands: every later call of any rank gets the same status.
//   B2  an arrival is published before the rank waits for anybody.
//   B3  a stall is logged once for each operation of a worker, however many of its ranks wait.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "comm/doorbell.h"
#include "comm/roster.h"
#include "muster/comm.h"

namespace muster::comm {

enum class Op : uint8_t { sum = 1, gather = 2, max = 3, max_second = 4, barrier = 5 };
const char* name_of(Op op);

// One operation (one piece of a long one) as a rank asks for it. All ranks must ask for the same.
struct Call {
  Op op = Op::barrier;
  uint64_t sequence = 0;  // 1, 2, 3, ... in the life of the group
  uint64_t epoch = 0;     // the step
  uint64_t total = 0;     // bytes of one rank, whole operation
  uint32_t bytes = 0;     // bytes of one rank, this piece
};
std::string describe(const Call& call);  // "sum of 4096 bytes in step 7 (operation 12)"

struct Arrival { uint64_t sequence = 0, epoch = 0; };

// Long operations on several local ranks have two meeting points.
enum class Phase : uint8_t { arrive, finish };

class Board {
 public:
  Board(Roster roster, const CommLimits& limits);

  const Roster& roster() const { return roster_; }
  const CommLimits& limits() const { return limits_; }
  Doorbell& doorbell() { return doorbell_; }

  void arrive(uint32_t rank, const Arrival& at);
  void finish(uint32_t rank, uint64_t sequence) { entries_[rank].finished.store(sequence, std::memory_order_release); }
  // The whole frame of a worker is here, so all of its ranks had arrived.
  void receive(uint32_t worker, const Arrival& at);
  Arrival arrived(uint32_t rank) const;

  bool failed() const { return failed_.load(); }
  Status failure() const;
  Status fail(Status status);                 // returns the status that stands
  std::function<void()> on_failure = [] {};   // set before the first call; wakes whoever sleeps elsewhere

  // Names the rank that keeps `call` waiting.
  Status late(const Call& call, Phase phase, double waited_ms) const;
  bool take_report(uint64_t sequence);        // true for the first asker of an operation

 private:
  struct alignas(64) Entry {
    std::atomic<uint64_t> sequence{0}, epoch{0}, finished{0};
  };
  bool is_late(uint32_t rank, const Call& call, Phase phase) const;

  Roster roster_;
  CommLimits limits_;
  std::unique_ptr<Entry[]> entries_;                     // [world]
  std::unique_ptr<std::atomic<uint64_t>[]> received_;    // [workers]
  std::atomic<uint64_t> reported_{0};
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;
  Status failure_;
  Doorbell doorbell_;
};

// One wait: reports a stall, then gives it up (C1).
class Wait {
 public:
  Wait(Board& board, const Call& call, Phase phase) : board_(board), call_(call), phase_(phase), start_(now_ns()) {}
  int64_t waited_ns() const { return now_ns() - start_; }
  double waited_ms() const { return static_cast<double>(waited_ns()) * 1e-6; }
  // ok while the wait may go on; else the board has failed. Ask only after looking whether the wait is over.
  Status check() const;
  int64_t sleep_ns(int64_t most) const;       // until the next limit, at most `most`

 private:
  Board& board_;
  const Call& call_;
  Phase phase_;
  int64_t start_;
};

}  // namespace muster::comm

// What one worker's ranks need of the other workers: swap the pieces of an operation over the mesh, hear who is late, leave.
// Has no thread of its own: the last local rank to arrive drives swap(); ranks that wait for a local one call tick().
//
//   X1  one thread at a time touches the links.
//   X2  swap() returns when our frame has left and every other worker's has come whole and agrees with the call.
//   X3  a frame is read ahead only into the parity that no local rank reads (link.h, L2).
#pragma once
#include <poll.h>

#include <memory>
#include <mutex>
#include <vector>

#include "comm/link.h"

namespace muster::comm {

class Exchange {
 public:
  // `links` by worker; our own place is empty.
  Exchange(Board& board, std::vector<std::unique_ptr<Link>> links);
  ~Exchange();

  // ok, or the failure that stands on the board.
  Status swap(const Call& call, std::span<const std::span<const uint8_t>> ours);
  // Never blocks. Looks at the links while `call` waits for a local rank; tells the others who has arrived here.
  void tick(const Call& call, const Wait& wait);
  int64_t tick_ns() const { return tick_ns_; }
  // After the board has failed: tells the others why, once, and ends our side of the links. `orderly`: we close.
  void leave(bool orderly);

  // A remote rank's piece of an operation that was swapped.
  const uint8_t* piece(uint32_t rank, uint64_t sequence) const;

 private:
  struct Spoken { std::vector<Arrival> arrivals; };  // what a link was told of us
  struct Reach { uint64_t stop, last; };             // of Link::receive
  void read(Link& link, const Reach& reach, const Call& call, const Wait& wait);
  void tell(Link& link);
  bool is_done(const Call& call) const;
  Status agree(const Call& call);
  void sleep(int64_t timeout_ns);

  Board& board_;
  std::vector<std::unique_ptr<Link>> links_;
  std::vector<Spoken> spoken_;       // by worker
  std::vector<Arrival> now_;         // scratch of tell()
  std::vector<uint32_t> piece_bytes_;// [2], by parity
  std::vector<pollfd> polled_;
  std::mutex mutex_;
  bool left_ = false;
  SpinBudget spin_;
  Fd wake_;                          // readable from failure on
  int64_t tick_ns_, beat_ns_, beaten_ns_ = 0;
};

}  // namespace muster::comm

// Rank-to-rank collectives of one group. One Comm object per worker spans its local ranks; each rank calls from its own
// thread. Sums run in rank order 0, 1, 2, ... whatever the transport, so that eight flat ranks and four plus four give the
// same bits.
//
//   C1  every wait is bounded: reported after stall_report_ms, given up after stall_give_up_ms with lost(rank).
//   C2  who waits can name the rank that has not arrived (arrived epochs are published outside the collective).
//   C3  a message of an older epoch or another incarnation is refused; a closed link ends all waits at once.
//   C4  waiting does not burn a core for long: spin briefly, then sleep.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "muster/status.h"

namespace muster {

struct MaxPair { double value; uint32_t id; };  // ties to the lower id

class Comm {
 public:
  virtual ~Comm() = default;
  virtual uint32_t world() const = 0;
  // Called by each local rank before the first collective of a step.
  virtual void begin(uint32_t rank, uint64_t epoch) = 0;
  // data[i] becomes the sum over ranks, added in rank order; every rank passes the same length.
  virtual Status sum(uint32_t rank, std::span<float> data) = 0;
  // `all` [world * mine.size()] in rank order; every rank passes the same length.
  virtual Status gather(uint32_t rank, std::span<const uint8_t> mine, std::span<uint8_t> all) = 0;
  // The best pair over ranks, element by element, with the runner-up's value where `second` is given (same length): on
  // entry the rank's own runner-up.
  virtual Status max(uint32_t rank, std::span<MaxPair> best, std::span<double> second) = 0;
  virtual Status barrier(uint32_t rank) = 0;
  // Milliseconds this rank has waited for others since begin().
  virtual double waited_ms(uint32_t rank) const = 0;
  // Ends all waits with lost; idempotent; callable from any thread.
  virtual void close() = 0;
};

struct CommLimits { uint32_t stall_report_ms = 5000, stall_give_up_ms = 10000; };

// Ranks of one worker: shared address space.
std::shared_ptr<Comm> make_peer_comm(uint32_t world, const CommLimits& limits);

// A listening socket opened before the group is known; HOST:PORT with the port that was given. Port 0 picks a free one.
class TcpListener {
 public:
  virtual ~TcpListener() = default;
  static Status open(const std::string& host_port, std::unique_ptr<TcpListener>* out);
  virtual const std::string& address() const = 0;
};

// Workers without GPUs: a full mesh of TCP links, one for each pair of workers, peer collectives inside each worker.
// Links carry a handshake of (incarnation, worker, world, distribution of ranks); a stranger or an old incarnation is refused,
// but there is no secret and no encryption: the network must be trusted. Blocks until the mesh stands, bounded by
// connect_timeout_ms.
struct TcpGroup {
  uint64_t incarnation = 0;
  uint32_t worker = 0;
  std::vector<uint32_t> worker_of_rank;   // [world]
  std::vector<std::string> addresses;     // by worker
  uint32_t connect_timeout_ms = 20000;
  CommLimits limits;
};
Status make_tcp_comm(std::unique_ptr<TcpListener> listener, const TcpGroup& group, std::shared_ptr<Comm>* out);

}  // namespace muster

// The collectives of one worker's ranks, alone (peer) or as part of a mesh (tcp): the only implementation of Comm.
//   each rank copies its piece into its own slot -> arrives -> the last one swaps with the other workers -> every rank
//   reads all pieces in rank order.
// Everything that another thread reads belongs to the group, never to the caller: a rank that gives up may free its data.
//
//   G1  slots and results are double-buffered by parity of the sequence. A rank writes parity p of operation n + 2 only
//       after all ranks arrived at n + 1, so nobody still reads n: one meeting for each operation, not two.
//   G2  operations longer than a piece go in pieces, each a meeting of its own: buffers are bounded whatever the length.
//   G3  buffers grow to the largest operation seen; after that nothing is allocated.
#pragma once
#include <memory>
#include <vector>

#include "comm/exchange.h"
#include "comm/fold.h"

namespace muster::comm {

class GroupComm final : public Comm {
 public:
  GroupComm(std::unique_ptr<Board> board, std::unique_ptr<Exchange> exchange);
  ~GroupComm() override;

  uint32_t world() const override { return board_->roster().world(); }
  void begin(uint32_t rank, uint64_t epoch) override;
  Status sum(uint32_t rank, std::span<float> data) override;
  Status gather(uint32_t rank, std::span<const uint8_t> mine, std::span<uint8_t> all) override;
  Status max(uint32_t rank, std::span<MaxPair> best, std::span<double> second) override;
  Status barrier(uint32_t rank) override;
  double waited_ms(uint32_t rank) const override;
  void close() override;

 private:
  struct alignas(64) LocalRank {
    uint32_t rank = 0;
    uint64_t sequence = 0, epoch = 0;
    Call call;                           // what it asks for; read by the last to arrive
    std::vector<uint8_t> slots[2];
    std::vector<const float*> sources;   // scratch of sum
    std::atomic<int64_t> waited_ns{0};
    SpinBudget spin;
  };
  struct alignas(64) Gate {              // a meeting of the local ranks
    std::atomic<uint32_t> arrived{0};
    alignas(64) std::atomic<uint64_t> opened{0};
  };

  Status enter(uint32_t rank, LocalRank** self);
  uint8_t* prepare(LocalRank& self, Op op, uint64_t total, uint32_t bytes);
  Status meet(LocalRank& self);          // after ok all pieces can be read
  Status complete(const LocalRank& last);
  bool is_sliced(const Call& call) const;
  Status meet_again(LocalRank& self);    // after ok all parts of the result can be read
  Status wait_for(Gate& gate, LocalRank& self, Phase phase);
  void open(Gate& gate, uint64_t sequence);
  Status agree(const Call& call, uint32_t rank) const;
  Status add(LocalRank& self, std::span<float> out);
  Status add_sliced(LocalRank& self, std::span<float> out);
  Status refuse(Status status);          // a caller's mistake ends the group: the other ranks would wait for this one
  Status leave();
  const uint8_t* piece(uint32_t rank, uint64_t sequence) const;

  std::unique_ptr<Board> board_;
  std::unique_ptr<Exchange> exchange_;   // null where there is one worker
  std::unique_ptr<LocalRank[]> local_;
  uint32_t local_count_;
  std::vector<std::span<const uint8_t>> ours_;  // scratch of the last to arrive
  std::vector<float> results_[2];        // of sliced sums
  Gate arrive_, finish_;
};

}  // namespace muster::comm

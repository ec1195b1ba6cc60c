// Who is where in a group: ranks, workers, and which ranks are ours. Pure data, fixed for the life of a group.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "muster/status.h"

namespace muster::comm {

inline constexpr uint32_t world_max = 512;  // a frame is one header and at most this many pieces in one sendmsg (IOV_MAX is 1024)

struct Roster {
  uint32_t worker = 0;
  std::vector<uint32_t> worker_of_rank;                 // [world]
  std::vector<uint32_t> index_in_worker;                // [world]
  std::vector<std::vector<uint32_t>> ranks_of_worker;   // [workers], ascending
  uint32_t world() const { return static_cast<uint32_t>(worker_of_rank.size()); }
  uint32_t workers() const { return static_cast<uint32_t>(ranks_of_worker.size()); }
  const std::vector<uint32_t>& local() const { return ranks_of_worker[worker]; }
  bool is_local(uint32_t rank) const { return rank < world() && worker_of_rank[rank] == worker; }
  std::string name(uint32_t rank) const;                // "rank 3 (worker 1)", or "rank 3" where there is one worker
};

// invalid(field) where a rank has no worker, a worker no rank, or a bound is passed.
Status make_roster(uint32_t worker, uint32_t workers, const std::vector<uint32_t>& worker_of_rank, Roster* out);

}  // namespace muster::comm

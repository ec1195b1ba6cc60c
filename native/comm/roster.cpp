#include "comm/roster.h"

namespace muster::comm {

std::string Roster::name(uint32_t rank) const {
  std::string text = "rank " + std::to_string(rank);
  if (workers() > 1 && rank < world()) text += " (worker " + std::to_string(worker_of_rank[rank]) + ")";
  return text;
}

Status make_roster(uint32_t worker, uint32_t workers, const std::vector<uint32_t>& worker_of_rank, Roster* out) {
  const size_t world = worker_of_rank.size();
  if (world == 0 || world > world_max)
    return Status::invalid("worker_of_rank", std::to_string(world) + " ranks; a group has 1 to " + std::to_string(world_max));
  if (worker >= workers)
    return Status::invalid("worker", "worker " + std::to_string(worker) + " of " + std::to_string(workers) + " workers");
  Roster roster;
  roster.worker = worker;
  roster.worker_of_rank = worker_of_rank;
  roster.ranks_of_worker.resize(workers <= world ? workers : 0);
  if (roster.ranks_of_worker.empty())
    return Status::invalid("addresses", std::to_string(workers) + " workers for " + std::to_string(world) + " ranks");
  for (uint32_t rank = 0; rank < world; ++rank) {
    if (worker_of_rank[rank] >= workers)
      return Status::invalid("worker_of_rank", "rank " + std::to_string(rank) + " is on worker " +
                             std::to_string(worker_of_rank[rank]) + ", there are " + std::to_string(workers));
    auto& ranks = roster.ranks_of_worker[worker_of_rank[rank]];
    roster.index_in_worker.push_back(static_cast<uint32_t>(ranks.size()));
    ranks.push_back(rank);
  }
  for (uint32_t w = 0; w < workers; ++w)
    if (roster.ranks_of_worker[w].empty()) return Status::invalid("worker_of_rank", "worker " + std::to_string(w) + " has no rank");
  *out = std::move(roster);
  return Status::ok();
}

}  // namespace muster::comm

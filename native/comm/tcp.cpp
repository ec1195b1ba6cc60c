// Groups of several workers: the mesh is formed, each link gets its rule, and the group runs over them.
#include "comm/group.h"
#include "comm/mesh.h"

namespace muster {

Status make_tcp_comm(std::unique_ptr<TcpListener> listener, const TcpGroup& group, std::shared_ptr<Comm>* out) {
  comm::Roster roster;
  MUSTER_TRY(comm::make_roster(group.worker, static_cast<uint32_t>(group.addresses.size()), group.worker_of_rank, &roster));
  const auto* listening = dynamic_cast<const comm::Listener*>(listener.get());
  if (listening == nullptr) return Status::invalid("listener", "no listener that TcpListener::open made");
  std::vector<comm::Fd> fds;
  MUSTER_TRY(comm::form_mesh(group, roster, listening->fd(), &fds));

  auto board = std::make_unique<comm::Board>(roster, group.limits);
  std::vector<std::unique_ptr<comm::Link>> links(roster.workers());
  for (uint32_t worker = 0; worker < roster.workers(); ++worker) {
    if (worker == roster.worker) continue;
    comm::LinkEnd end;
    end.worker = worker;
    end.address = group.addresses[worker];
    end.rule.tag = comm::frame_tag(group.incarnation, worker);
    end.rule.ranks = static_cast<uint32_t>(roster.ranks_of_worker[worker].size());
    end.tag = comm::frame_tag(group.incarnation, roster.worker);
    links[worker] = std::make_unique<comm::Link>(std::move(fds[worker]), std::move(end), *board);
  }
  auto exchange = roster.workers() > 1 ? std::make_unique<comm::Exchange>(*board, std::move(links)) : nullptr;
  *out = std::make_shared<comm::GroupComm>(std::move(board), std::move(exchange));
  return Status::ok();
}

}  // namespace muster

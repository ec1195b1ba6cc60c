// Peer groups: all ranks in one worker, so a group without a mesh.
#include "comm/group.h"

namespace muster {

// Null where `world` is 0 or above comm::world_max.
std::shared_ptr<Comm> make_peer_comm(uint32_t world, const CommLimits& limits) {
  comm::Roster roster;
  if (!comm::make_roster(0, 1, std::vector<uint32_t>(world, 0), &roster).is_ok()) return nullptr;
  return std::make_shared<comm::GroupComm>(std::make_unique<comm::Board>(std::move(roster), limits), nullptr);
}

}  // namespace muster

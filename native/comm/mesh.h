// Forms the mesh: one TCP connection for each pair of workers, greeted from both ends. The higher index dials the lower,
// whose address is known first (worker 0 leads). Strangers at the listener cost a bounded place for a bounded time.
//
//   M1  a link stands when the dialler has sent confirm; the acceptor counts it when confirm has come: both agree.
//   M2  a connection that does not greet in time, or greets wrongly, is dropped and harms nobody.
//   M3  dialling is repeated with back-off until the time-out, which names every worker that was not reached, and why.
#pragma once
#include <vector>

#include "comm/frame.h"
#include "comm/socket.h"

namespace muster::comm {

// `links` by worker; our own place is empty. lost(first rank of a missing worker) at the time-out.
Status form_mesh(const TcpGroup& group, const Roster& roster, int listener, std::vector<Fd>* links);

}  // namespace muster::comm

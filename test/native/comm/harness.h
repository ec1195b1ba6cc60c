// A whole group in one test process: every worker is a Comm of its own on the loopback, every rank a thread.
#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "muster/comm.h"

namespace harness {

using muster::Comm;
using muster::CommLimits;
using muster::Status;

inline double elapsed_ms(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - since).count();
}

// Where each rank lives. One worker: a peer group.
struct Shape {
  std::string name;
  std::vector<uint32_t> worker_of_rank;
  uint32_t world() const { return static_cast<uint32_t>(worker_of_rank.size()); }
  uint32_t workers() const {
    uint32_t most = 0;
    for (uint32_t w : worker_of_rank) most = std::max(most, w + 1);
    return most;
  }
};

inline Shape peers(uint32_t world) { return {"peer " + std::to_string(world), std::vector<uint32_t>(world, 0)}; }
inline Shape workers(const std::vector<uint32_t>& sizes) {
  Shape shape{"tcp", {}};
  for (uint32_t w = 0; w < sizes.size(); ++w) {
    shape.name += (w == 0 ? " " : "+") + std::to_string(sizes[w]);
    shape.worker_of_rank.insert(shape.worker_of_rank.end(), sizes[w], w);
  }
  return shape;
}
inline std::vector<Shape> all_shapes() {
  std::vector<Shape> shapes;
  for (uint32_t world = 1; world <= 8; ++world) shapes.push_back(peers(world));
  for (const auto& sizes : {std::vector<uint32_t>{1, 1}, {2, 2}, {1, 3}, {1, 1, 1, 1}, {3, 1, 2}}) shapes.push_back(workers(sizes));
  shapes.push_back({"tcp ranks in turn", {0, 1, 0, 1, 0}});
  return shapes;
}

struct Group {
  Shape shape;
  std::vector<std::shared_ptr<Comm>> comms;  // by worker
  Comm& of(uint32_t rank) { return *comms[shape.worker_of_rank[rank]]; }

  // Runs body(rank) in a thread for each rank; returns the statuses by rank.
  std::vector<Status> run(const std::function<Status(uint32_t)>& body) {
    std::vector<Status> statuses(shape.world());
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < shape.world(); ++rank) threads.emplace_back([&, rank] { statuses[rank] = body(rank); });
    for (std::thread& thread : threads) thread.join();
    return statuses;
  }
  void close() { for (auto& comm : comms) comm->close(); }
};

// The listeners of a group and the TcpGroup of each worker.
struct Plan {
  std::vector<std::unique_ptr<muster::TcpListener>> listeners;
  std::vector<muster::TcpGroup> groups;
};
inline Plan plan(const Shape& shape, const CommLimits& limits) {
  Plan out;
  muster::TcpGroup group;
  group.incarnation = 0x1234567890abcdef;
  group.worker_of_rank = shape.worker_of_rank;
  group.limits = limits;
  for (uint32_t w = 0; w < shape.workers(); ++w) {
    std::unique_ptr<muster::TcpListener> listener;
    CHECK_OK(muster::TcpListener::open("127.0.0.1:0", &listener));
    group.addresses.push_back(listener->address());
    out.listeners.push_back(std::move(listener));
  }
  for (uint32_t w = 0; w < shape.workers(); ++w) {
    group.worker = w;
    out.groups.push_back(group);
  }
  return out;
}

inline Group form(const Shape& shape, const CommLimits& limits = {20000, 40000}) {
  Group group{shape, std::vector<std::shared_ptr<Comm>>(shape.workers())};
  if (shape.workers() == 1) {
    group.comms[0] = muster::make_peer_comm(shape.world(), limits);
    return group;
  }
  Plan planned = plan(shape, limits);
  std::vector<Status> statuses(shape.workers());
  std::vector<std::thread> threads;
  for (uint32_t w = 0; w < shape.workers(); ++w)
    threads.emplace_back([&, w] { statuses[w] = make_tcp_comm(std::move(planned.listeners[w]), planned.groups[w], &group.comms[w]); });
  for (std::thread& thread : threads) thread.join();
  for (const Status& status : statuses) CHECK_OK(status);
  return group;
}

inline bool all_ok(const std::vector<Status>& statuses) {
  for (const Status& status : statuses) CHECK_OK(status);
  for (const Status& status : statuses)
    if (!status.is_ok()) return false;
  return true;
}

}  // namespace harness

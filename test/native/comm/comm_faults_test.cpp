// How a group ends: stalls are named, dead workers are seen at once, closing wakes everybody, and nothing hangs.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

using namespace harness;
using std::chrono::milliseconds;
using SteadyClock = std::chrono::steady_clock;

namespace {

constexpr CommLimits tiny{100, 400};
constexpr CommLimits patient{5000, 10000};

bool is_lost(const Status& status, int rank) {
  CHECK(status.code == Status::Code::lost);
  CHECK_EQ(status.rank, rank);
  if (status.rank == rank && status.code == Status::Code::lost) return true;
  std::printf("  it said: %s: %s\n", status.field.c_str(), status.detail.c_str());
  return false;
}

// stderr of a piece of code, by way of a temporary file.
std::string stderr_of(const std::function<void()>& body) {
  std::fflush(stderr);
  FILE* file = std::tmpfile();
  const int saved = dup(2);
  dup2(fileno(file), 2);
  body();
  std::fflush(stderr);
  dup2(saved, 2);
  close(saved);
  std::string text;
  std::rewind(file);
  for (int c; (c = std::fgetc(file)) != EOF;) text += static_cast<char>(c);
  std::fclose(file);
  return text;
}

size_t count_of(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// All ranks meet twice; then `sleeper` does not come for the third meeting until all others have given up.
std::vector<Status> stall(Group& group, uint32_t sleeper, bool sum) {
  std::atomic<uint32_t> gave_up{0};
  return group.run([&](uint32_t rank) {
    Comm& comm = group.of(rank);
    std::vector<float> data(100, 1.f);
    for (uint64_t step : {1, 2}) {
      comm.begin(rank, step);
      MUSTER_TRY(comm.sum(rank, data));
    }
    comm.begin(rank, 3);
    if (rank == sleeper) {
      const auto start = SteadyClock::now();
      while (gave_up.load() + 1 < group.shape.world() && elapsed_ms(start) < 5000) std::this_thread::sleep_for(milliseconds(5));
    }
    const Status status = sum ? comm.sum(rank, data) : comm.barrier(rank);
    gave_up.fetch_add(1);
    return status;
  });
}

}  // namespace

TEST("C1, C2: a rank that does not arrive is named by all others, local or remote, and learns it when it comes") {
  for (const Shape& shape : {peers(2), peers(4), workers({1, 1}), workers({2, 2}), workers({3, 1, 2})}) {
    for (uint32_t sleeper = 0; sleeper < shape.world(); ++sleeper) {
      Group group = form(shape, tiny);
      std::vector<Status> statuses;
      const auto start = SteadyClock::now();
      const std::string log = stderr_of([&] { statuses = stall(group, sleeper, sleeper % 2 == 0); });
      CHECK(elapsed_ms(start) < 2000);
      bool good = true;
      double waited = 0;
      for (const Status& status : statuses) {
        good &= is_lost(status, static_cast<int>(sleeper));
        CHECK_EQ(status.epoch, 3u);
        CHECK(status.detail.find("rank " + std::to_string(sleeper)) != std::string::npos);
        waited = std::max(waited, status.waited_ms);
      }
      CHECK(waited >= tiny.stall_give_up_ms);
      CHECK(count_of(log, "stall: rank " + std::to_string(sleeper)) >= 1);
      CHECK(count_of(log, "\n") <= shape.workers());  // one line for each worker that waited
      if (!good) std::printf("  in %s, rank %u asleep\n%s", shape.name.c_str(), sleeper, log.c_str());
      CHECK(group.of(0).barrier(0).code == Status::Code::lost);  // and ever after
    }
  }
}

TEST("C1: a rank that is slow but inside the limit is reported and not lost") {
  for (const Shape& shape : {peers(3), workers({2, 1})}) {
    Group group = form(shape, {40, 20000});
    const std::string log = stderr_of([&] {
      CHECK(all_ok(group.run([&](uint32_t rank) {
        if (rank == 2) std::this_thread::sleep_for(milliseconds(150));
        return group.of(rank).barrier(rank);
      })));
    });
    CHECK_EQ(count_of(log, "stall: rank 2"), 1u);
  }
}

TEST("C3: a worker that closes ends the waits of all others at once") {
  for (const Shape& shape : {workers({1, 1}), workers({2, 2}), workers({1, 1, 1, 1}), workers({3, 1, 2})}) {
    Group group = form(shape, patient);
    const uint32_t leaver = shape.workers() - 1;
    std::atomic<double> longest{0};
    const auto statuses = group.run([&](uint32_t rank) {
      const auto start = SteadyClock::now();
      if (shape.worker_of_rank[rank] == leaver) {
        std::this_thread::sleep_for(milliseconds(80));
        group.comms[leaver]->close();
      }
      const Status status = group.of(rank).barrier(rank);
      if (elapsed_ms(start) > longest.load()) longest = elapsed_ms(start);
      return status;
    });
    CHECK(longest.load() < 1000);
    uint32_t first = 0;
    while (shape.worker_of_rank[first] != leaver) ++first;
    for (uint32_t rank = 0; rank < shape.world(); ++rank)
      if (shape.worker_of_rank[rank] != leaver && !is_lost(statuses[rank], static_cast<int>(first))) std::printf("  in %s\n", shape.name.c_str());
  }
}

TEST("C3: a worker whose ranks wait for a local one sees a closed link too") {
  Group group = form(workers({2, 1}), patient);
  const auto start = SteadyClock::now();
  std::thread waiter([&] { is_lost(group.of(0).barrier(0), 2); });  // rank 1 never comes
  std::this_thread::sleep_for(milliseconds(50));
  group.comms[1]->close();
  waiter.join();
  CHECK(elapsed_ms(start) < 1000);
}

TEST("workers that close after the last operation, in any order, take no result from each other") {
  for (int round = 0; round < 30; ++round) {
    Group group = form(workers({2, 1, 1}), patient);
    std::atomic<uint32_t> done{0};
    CHECK(all_ok(group.run([&](uint32_t rank) {
      std::vector<float> data(5000, 1.f);
      for (int i = 0; i < 5; ++i) MUSTER_TRY(group.of(rank).sum(rank, data));
      // A worker may only close when its own ranks are through: here the one of rank 0 has two.
      if (rank > 1) group.of(rank).close();
      else if (done.fetch_add(1) == 1) group.of(rank).close();
      return Status::ok();
    })));
  }
}

TEST("close() from another thread wakes all waiters with lost, and is idempotent") {
  for (const Shape& shape : {peers(3), workers({2, 2})}) {
    Group group = form(shape, patient);
    std::thread closer([&] {
      std::this_thread::sleep_for(milliseconds(60));
      group.close();
      group.close();
    });
    const auto start = SteadyClock::now();
    const auto statuses = group.run([&](uint32_t rank) {
      return rank == 1 ? Status::ok() : group.of(rank).barrier(rank);
    });
    CHECK(elapsed_ms(start) < 1000);
    closer.join();
    CHECK(statuses[0].code == Status::Code::lost);
    CHECK(group.of(1).barrier(1).code == Status::Code::lost);
    CHECK(group.of(1).barrier(1).detail == group.of(1).barrier(1).detail);
  }
}

TEST("ranks that disagree on the step, the operation or the length are told so, both by name") {
  for (const Shape& shape : {peers(2), workers({1, 1}), workers({2, 1})}) {
    const uint32_t odd = shape.world() - 1;
    for (int what = 0; what < 3; ++what) {
      Group group = form(shape, patient);
      const auto start = SteadyClock::now();
      const auto statuses = group.run([&](uint32_t rank) {
        Comm& comm = group.of(rank);
        std::vector<float> data(rank == odd && what == 1 ? 11 : 10);
        comm.begin(rank, rank == odd && what == 0 ? 6 : 7);
        return rank == odd && what == 2 ? comm.barrier(rank) : comm.sum(rank, data);
      });
      CHECK(elapsed_ms(start) < 1000);
      for (const Status& status : statuses) {
        CHECK(status.code == Status::Code::internal);
        CHECK(status.detail.find("rank 0") != std::string::npos);
        CHECK(status.detail.find("rank " + std::to_string(odd)) != std::string::npos);
        if (what == 0) CHECK(status.detail.find("step 6") != std::string::npos && status.detail.find("step 7") != std::string::npos);
      }
    }
  }
}

TEST("a caller's wrong size ends the wait of the others, an unknown rank harms nobody") {
  Group group = form(workers({1, 1}), patient);
  CHECK(group.of(0).barrier(1).code == Status::Code::invalid);
  const auto start = SteadyClock::now();
  const auto statuses = group.run([&](uint32_t rank) {
    std::vector<uint8_t> mine(8), all(rank == 0 ? 16 : 15);
    return group.of(rank).gather(rank, mine, all);
  });
  CHECK(elapsed_ms(start) < 1000);
  for (const Status& status : statuses) CHECK(status.code == Status::Code::internal && status.detail.find("15 bytes") != std::string::npos);
}

TEST("C3: SIGKILL of a worker process is seen within a second") {
  Plan planned = plan(workers({1, 1}), patient);
  const pid_t child = fork();
  if (child == 0) {
    std::shared_ptr<Comm> comm;
    planned.listeners[0].reset();
    if (!make_tcp_comm(std::move(planned.listeners[1]), planned.groups[1], &comm).is_ok()) _exit(1);
    std::vector<float> data(1000, 1.f);
    while (comm->sum(1, data).is_ok()) {}
    _exit(2);
  }
  planned.listeners[1].reset();
  std::shared_ptr<Comm> comm;
  CHECK_OK(make_tcp_comm(std::move(planned.listeners[0]), planned.groups[0], &comm));
  std::vector<float> data(1000, 1.f);
  for (int i = 0; i < 500; ++i) CHECK_OK(comm->sum(0, data));
  SteadyClock::time_point killed;
  std::thread killer([&] {
    std::this_thread::sleep_for(milliseconds(50));
    killed = SteadyClock::now();
    kill(child, SIGKILL);
  });
  Status status;
  while (status.is_ok()) status = comm->sum(0, data);
  const auto seen = SteadyClock::now();
  killer.join();
  const std::chrono::duration<double, std::milli> noticed = seen - killed;
  CHECK(noticed.count() < 1000);
  is_lost(status, 1);
  int wait_status = 0;
  waitpid(child, &wait_status, 0);
  CHECK(WIFSIGNALED(wait_status) && WTERMSIG(wait_status) == SIGKILL);
}

TEST("C4: ranks that wait for a second use next to no CPU") {
  for (const Shape& shape : {peers(4), workers({3, 1})}) {
    Group group = form(shape, patient);
    timespec before{}, after{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    CHECK(all_ok(group.run([&](uint32_t rank) {
      if (rank == 1) std::this_thread::sleep_for(milliseconds(1000));
      return group.of(rank).barrier(rank);
    })));
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    const double used_ms = static_cast<double>(after.tv_sec - before.tv_sec) * 1e3 + static_cast<double>(after.tv_nsec - before.tv_nsec) * 1e-6;
    CHECK(used_ms < 50);  // of 1000, for all ranks together
  }
}

MUSTER_TEST_MAIN

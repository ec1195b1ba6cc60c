// The threads of one op table: a list of independent tasks is shared out by a counter. Owns threads and their waiting; does
// not own what a task computes.
//
//   P1  run() returns when every task has run; the caller works too, and with one thread there is no other.
//   P2  which thread runs a task is not determined, so a task's result must not depend on it.
//   P3  a thread that comes late takes nothing of a list that is done: a ticket names list, length and index at once.
//   P4  waiting spins for at most spin_rounds, then sleeps in the kernel: several processes may share two cores.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace muster::cpu {

class Pool {
 public:
  explicit Pool(uint32_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  uint32_t threads() const { return uint32_t(workers_.size()) + 1; }

  // task(index, thread) for every index below count. `work` is about the number of multiply-adds in all: less than a hand-over
  // costs is done by the caller alone. No allocation.
  template <class Task> void run(uint32_t count, uint64_t work, const Task& task) {
    if (count <= 1 || workers_.empty() || work < work_min) {
      for (uint32_t i = 0; i < count; ++i) task(i, 0u);
      return;
    }
    share(count, [](const void* self, uint32_t index, uint32_t thread) { (*static_cast<const Task*>(self))(index, thread); }, &task);
  }

 private:
  using Call = void (*)(const void*, uint32_t, uint32_t);
  static constexpr uint64_t work_min = 96 * 1024;  // about 2 us of one core; waking a spinning thread takes about 0.5 us
  static constexpr uint32_t spin_rounds = 1000;    // of `pause`, 20 to 50 us
  static constexpr uint32_t count_max = (1u << 24) - 4096;

  void share(uint32_t count, Call call, const void* self);
  uint32_t take(uint32_t thread);  // returns how many tasks it ran
  void serve(uint32_t thread);

  // ticket = list number << 48 | length << 24 | next index
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> left_{0};    // tasks not done
  alignas(64) std::atomic<uint32_t> lists_{0};   // rises with every list; workers wait on it
  std::atomic<bool> closing_{false};
  Call call_ = nullptr;
  const void* self_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace muster::cpu

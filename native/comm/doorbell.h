// Waiting that is quick when the other side is near and cheap when it is not (C4): spin for microseconds, then sleep on a
// futex. The condition is the caller's own atomics; the bell only says "look again".
#pragma once
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace muster::comm {

using Clock = std::chrono::steady_clock;

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

// Between two looks. Yielding is what makes spinning bearable where ranks outnumber cores: the one that is waited for may
// be queued behind the spinner on the same core.
inline void yield_cpu() { sched_yield(); }

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long a waiter spins. A wait that ended within `near` would have been better spun through, so the next one spins for
// the whole `most`; longer waits halve the budget, so that ranks that wait for a slow one leave it the core.
class SpinBudget {
 public:
  static constexpr int64_t most = 50'000, least = 3'000, near = 200'000;  // ns
  int64_t ns() const { return ns_; }
  void learn(int64_t waited) { ns_ = waited <= near ? most : (ns_ / 2 > least ? ns_ / 2 : least); }

 private:
  int64_t ns_ = most;
};

class Doorbell {
 public:
  // Call after the store that makes a waiter's condition true; that store must be seq_cst.
  void ring();

  // Returns when `ready` or, at the latest, after `timeout`; a spurious return is possible. `ready` must load seq_cst.
  template <class Ready>
  void sleep(Ready&& ready, int64_t timeout_ns) {
    sleepers_.fetch_add(1);
    const uint32_t seen = word_.load();
    if (!ready()) wait(seen, timeout_ns);
    sleepers_.fetch_sub(1);
  }

  template <class Ready>
  static bool spin(Ready&& ready, int64_t budget_ns) {
    const int64_t until = now_ns() + budget_ns;
    do {
      for (int i = 0; i < 16; ++i) {
        if (ready()) return true;
        pause_cpu();
      }
      yield_cpu();
    } while (now_ns() < until);
    return ready();
  }

 private:
  void wait(uint32_t seen, int64_t timeout_ns);

  alignas(64) std::atomic<uint32_t> word_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace muster::comm

#include "cpu/pool.h"

#include <algorithm>
#include <system_error>

namespace muster::cpu {
namespace {

void pause() { __builtin_ia32_pause(); }

}  // namespace

Pool::Pool(uint32_t threads) {
  try {
    for (uint32_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started do the same work, with the same bits.
  }
}

Pool::~Pool() {
  closing_.store(true);
  lists_.fetch_add(1);
  lists_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::share(uint32_t count, Call call, const void* self) {
  for (uint32_t done = 0; done < count;) {  // a list longer than a ticket can say goes in pieces
    const uint32_t part = std::min(count - done, count_max);
    struct Shifted { Call call; const void* self; uint32_t first; } shifted{call, self, done};
    call_ = [](const void* s, uint32_t index, uint32_t thread) {
      const auto& to = *static_cast<const Shifted*>(s);
      to.call(to.self, to.first + index, thread);
    };
    self_ = &shifted;
    left_.store(part, std::memory_order_relaxed);
    const uint32_t list = lists_.load(std::memory_order_relaxed) + 1;
    ticket_.store(uint64_t{list & 0xffffu} << 48 | uint64_t{part} << 24, std::memory_order_release);
    lists_.store(list, std::memory_order_release);
    lists_.notify_all();
    take(0);
    uint32_t left = left_.load(std::memory_order_acquire);
    for (uint32_t round = 0; left != 0 && round < spin_rounds; ++round) {
      pause();
      left = left_.load(std::memory_order_acquire);
    }
    while (left != 0) {
      left_.wait(left, std::memory_order_acquire);
      left = left_.load(std::memory_order_acquire);
    }
    done += part;
  }
}

uint32_t Pool::take(uint32_t thread) {
  uint32_t ran = 0;
  for (;;) {
    const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    const uint32_t index = uint32_t(ticket & 0xffffffu), count = uint32_t(ticket >> 24 & 0xffffffu);
    if (index >= count) return ran;
    // An index below the length belongs to a list that cannot end without it, so call_ and self_ are that list's.
    call_(self_, index, thread);
    ++ran;
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1 && thread != 0) left_.notify_one();
  }
}

void Pool::serve(uint32_t thread) {
  uint32_t seen = 0;
  for (;;) {
    uint32_t list = lists_.load(std::memory_order_acquire);
    for (uint32_t round = 0; list == seen && round < spin_rounds; ++round) {
      pause();
      list = lists_.load(std::memory_order_acquire);
    }
    while (list == seen) {
      lists_.wait(seen, std::memory_order_acquire);
      list = lists_.load(std::memory_order_acquire);
    }
    if (closing_.load()) return;
    seen = list;
    take(thread);
  }
}

}  // namespace muster::cpu

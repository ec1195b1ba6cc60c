// Runs one function on every local rank at once: rank 0 on the caller, each other on a thread of its own. Owns threads only.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace muster {

class RankThreads {
 public:
  explicit RankThreads(size_t ranks);
  RankThreads(const RankThreads&) = delete;
  RankThreads& operator=(const RankThreads&) = delete;
  ~RankThreads();
  size_t ranks() const { return threads_.size() + 1; }
  // Returns when every rank has returned.
  void run(const std::function<void(size_t)>& work);

 private:
  void serve(size_t rank);
  std::mutex mutex_;
  std::condition_variable started_, finished_;
  const std::function<void(size_t)>* work_ = nullptr;
  uint64_t round_ = 0;
  size_t running_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace muster

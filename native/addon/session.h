// An engine as JavaScript holds it: opened on a thread of its own, stepped by word arrays, answered through one event
// function. Owns the threads between Node and the engine; decides nothing.
//
//   N1  JavaScript never waits: open, close and steps answer by an event.
//   N2  the process is kept alive only while something was asked and not answered.
//   N3  no event after `closed`, and none after the environment has gone; what was not closed by then is closed.
#pragma once
#include <napi.h>

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <mutex>

#include "addon/decode.h"
#include "addon/parse.h"
#include "muster/comm.h"

namespace muster::addon {

// Events: kind, then what it carries. The numbers are those of worker/engine/native.ts.
enum class Event : uint32_t {
  progress = 0,  // phase (0 loading, 1 connecting, 2 warming), bytes done, bytes in all
  opened = 1,    // fault or null, numerics id
  step = 2,      // fault or null, words, details, logits, step ms, wait ms
  closed = 3,
  staged = 4,    // fault or null
};

struct ListenerBox { std::unique_ptr<TcpListener> listener; };  // taken by the engine that is opened with it

class Session : public std::enable_shared_from_this<Session> {
 public:
  static std::shared_ptr<Session> open(Napi::Env env, OpenRequest request, std::unique_ptr<TcpListener> listener, const Napi::Function& events);
  Status launch(Napi::Env env, std::span<const uint32_t> words);
  Status stage(Napi::Env env, StageRequest request);  // answered by `staged`
  void cancel() { cancelled_ = true; }
  void close(Napi::Env env);
  const Engine* engine() const { return ready_ ? engine_.get() : nullptr; }

 private:
  using Deliver = std::function<void(Napi::Env, Napi::Function)>;
  Session() = default;
  void run_open(OpenRequest request, std::unique_ptr<TcpListener> listener);
  Status prepare(OpenRequest& request, std::unique_ptr<TcpListener> listener);
  Status connect(OpenRequest& request, std::unique_ptr<TcpListener> listener);
  void run_close();
  void progress(uint32_t phase, uint64_t done, uint64_t total);
  void step_done(StepResult&& result);
  void deliver(Deliver what);
  void hold(Napi::Env env);
  void release(Napi::Env env);
  void leave(Napi::Env env);
  static void at_exit(void* self);

  std::unique_ptr<Engine> engine_;   // the opener's until ready_
  std::atomic<bool> cancelled_{false}, ready_{false};
  std::promise<void> opened_;
  std::shared_future<void> is_opened_ = opened_.get_future().share();

  std::mutex mutex_;                 // guards the next two
  Napi::ThreadSafeFunction events_;
  bool gone_ = false;

  // JavaScript thread only.
  std::shared_ptr<Session>* hook_ = nullptr;
  bool closing_ = false;
  uint32_t held_ = 0;
};

}  // namespace muster::addon

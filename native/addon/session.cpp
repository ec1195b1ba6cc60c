#include "addon/session.h"

#include <chrono>
#include <cstring>
#include <thread>

namespace muster::addon {
namespace {

// Workers load at different speeds, and the mesh stands when the slowest has its bytes. The controller ends an incarnation
// that takes longer for a reason of its own.
constexpr uint32_t kConnectTimeoutMs = 120'000;
// An opener that is still connecting when close has waited this long is left to its own time-out.
constexpr auto kCloseWait = std::chrono::seconds(12);
constexpr auto kProgressEvery = std::chrono::milliseconds(50);

Napi::ArrayBuffer buffer_of(Napi::Env env, const void* data, size_t bytes) {
  Napi::ArrayBuffer out = Napi::ArrayBuffer::New(env, bytes);
  if (bytes) std::memcpy(out.Data(), data, bytes);
  return out;
}
Napi::Value words_of(Napi::Env env, const std::vector<uint32_t>& from) {
  return Napi::Uint32Array::New(env, from.size(), buffer_of(env, from.data(), from.size() * 4), 0);
}
Napi::Value floats_of(Napi::Env env, const std::vector<float>& from) {
  return Napi::Float32Array::New(env, from.size(), buffer_of(env, from.data(), from.size() * 4), 0);
}
Napi::Value kind_of(Napi::Env env, Event event) { return Napi::Number::New(env, uint32_t(event)); }

}  // namespace

std::shared_ptr<Session> Session::open(Napi::Env env, OpenRequest request, std::unique_ptr<TcpListener> listener, const Napi::Function& events) {
  std::shared_ptr<Session> self(new Session);
  self->events_ = Napi::ThreadSafeFunction::New(env, events, "muster-engine", 0, 1);
  self->events_.Unref(env);
  self->hook_ = new std::shared_ptr<Session>(self);
  napi_add_env_cleanup_hook(env, at_exit, self->hook_);
  self->hold(env);
  std::thread([self, request = std::move(request), listener = std::move(listener)]() mutable {
    self->run_open(std::move(request), std::move(listener));
  }).detach();
  return self;
}

void Session::run_open(OpenRequest request, std::unique_ptr<TcpListener> listener) {
  const Status status = prepare(request, std::move(listener));
  if (!status.is_ok() && engine_) engine_->close();
  std::string numerics = status.is_ok() ? engine_->numerics_id() : "";
  ready_ = status.is_ok();
  opened_.set_value();
  deliver([self = shared_from_this(), status, numerics = std::move(numerics)](Napi::Env env, Napi::Function events) {
    self->release(env);
    (void)events.Call({kind_of(env, Event::opened), fault_of(env, status), Napi::String::New(env, numerics)});
  });
}

Status Session::prepare(OpenRequest& request, std::unique_ptr<TcpListener> listener) {
  const bool has_peers = request.group.workers > 1;
  if (has_peers && !listener) return Status::invalid("comm", "a group of several workers needs a listener");
  MUSTER_TRY(Engine::create(request.model, request.group, request.options, nullptr, &engine_));
  auto last = std::chrono::steady_clock::time_point();
  const auto watch = [&](uint64_t done, uint64_t total) {
    const auto now = std::chrono::steady_clock::now();
    if (done != total && now - last < kProgressEvery) return;
    last = now;
    progress(0, done, total);
  };
  MUSTER_TRY(engine_->load(request.files, request.slices, watch, cancelled_));
  if (has_peers) MUSTER_TRY(connect(request, std::move(listener)));
  if (cancelled_) return Status::invalid("load", "cancelled");
  progress(2, 0, 0);
  return engine_->kv_init(request.kv_blocks);
}

Status Session::connect(OpenRequest& request, std::unique_ptr<TcpListener> listener) {
  progress(1, 0, 0);
  TcpGroup group;
  group.incarnation = request.incarnation;
  group.worker = request.group.worker;
  group.worker_of_rank = request.group.worker_of_rank;
  group.addresses = request.addresses;
  group.connect_timeout_ms = kConnectTimeoutMs;
  group.limits = {request.options.stall_report_ms, request.options.stall_give_up_ms};
  std::shared_ptr<Comm> comm;
  MUSTER_TRY(make_tcp_comm(std::move(listener), group, &comm));
  return engine_->connect(std::move(comm));
}

Status Session::launch(Napi::Env env, std::span<const uint32_t> words) {
  if (!ready_ || closing_) return Status::invalid("engine", closing_ ? "is closed" : "is not open yet");
  Step step;
  MUSTER_TRY(decode_step(words, &step));
  const Status status = engine_->launch(step, [self = shared_from_this()](StepResult&& result) { self->step_done(std::move(result)); });
  if (status.is_ok()) hold(env);
  return status;
}

Status Session::stage(Napi::Env env, StageRequest request) {
  if (!ready_ || closing_) return Status::invalid("engine", closing_ ? "is closed" : "is not open yet");
  hold(env);
  std::thread([self = shared_from_this(), request = std::move(request)] {
    const Status status = self->engine_->stage(request.map, request.files, request.slices, self->cancelled_);
    self->deliver([self, status](Napi::Env env, Napi::Function events) {
      self->release(env);
      (void)events.Call({kind_of(env, Event::staged), fault_of(env, status)});
    });
  }).detach();
  return Status::ok();
}

void Session::step_done(StepResult&& result) {
  const double step_ms = result.step_ms, wait_ms = result.wait_ms;
  Status status = std::move(result.status);
  auto encoded = std::make_shared<EncodedResult>(encode_result(std::move(result)));
  deliver([self = shared_from_this(), status = std::move(status), encoded, step_ms, wait_ms](Napi::Env env, Napi::Function events) {
    self->release(env);
    (void)events.Call({kind_of(env, Event::step), fault_of(env, status), words_of(env, encoded->words), floats_of(env, encoded->details),
                       floats_of(env, encoded->logits), Napi::Number::New(env, step_ms), Napi::Number::New(env, wait_ms)});
  });
}

void Session::progress(uint32_t phase, uint64_t done, uint64_t total) {
  deliver([phase, done, total](Napi::Env env, Napi::Function events) {
    (void)events.Call({kind_of(env, Event::progress), Napi::Number::New(env, phase), Napi::Number::New(env, double(done)), Napi::Number::New(env, double(total))});
  });
}

void Session::close(Napi::Env env) {
  if (closing_) return;
  closing_ = true;
  cancelled_ = true;
  hold(env);
  std::thread([self = shared_from_this()] { self->run_close(); }).detach();
}

void Session::run_close() {
  const bool opened = is_opened_.wait_for(kCloseWait) == std::future_status::ready;
  if (opened && engine_) engine_->close();
  deliver([self = shared_from_this()](Napi::Env env, Napi::Function events) {
    self->leave(env);
    self->release(env);
    (void)events.Call({kind_of(env, Event::closed)});
  });
  std::lock_guard lock(mutex_);
  if (gone_) return;
  gone_ = true;
  events_.Release();
}

void Session::deliver(Deliver what) {
  std::lock_guard lock(mutex_);
  if (gone_) return;
  auto* const carried = new Deliver(std::move(what));
  const napi_status status = events_.NonBlockingCall(carried, [](Napi::Env env, Napi::Function events, Deliver* one) {
    if (static_cast<napi_env>(env) != nullptr && !events.IsEmpty()) (*one)(env, events);
    delete one;
  });
  if (status != napi_ok) delete carried;
}

void Session::hold(Napi::Env env) {
  if (held_++ == 0) events_.Ref(env);
}

void Session::release(Napi::Env env) {
  if (held_ > 0 && --held_ == 0) events_.Unref(env);
}

void Session::leave(Napi::Env env) {
  if (!hook_) return;
  napi_remove_env_cleanup_hook(env, at_exit, hook_);
  delete hook_;
  hook_ = nullptr;
}

// The environment goes: no event reaches it any more; the engine's own threads end within the bound of close.
void Session::at_exit(void* hook) {
  auto* const holder = static_cast<std::shared_ptr<Session>*>(hook);
  const std::shared_ptr<Session> self = *holder;
  {
    std::lock_guard lock(self->mutex_);
    self->gone_ = true;
  }
  self->hook_ = nullptr;
  self->closing_ = true;
  self->cancelled_ = true;
  delete holder;
  if (self->ready_) self->engine_->close();
}

}  // namespace muster::addon

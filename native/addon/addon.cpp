// What JavaScript sees: open, the calls on an open engine, listeners, devices, and the noise for tests. Parse, call, answer.
#include <napi.h>

#include "addon/session.h"
#include "muster/noise.h"

namespace muster::addon {
namespace {

Napi::Value raise(Napi::Env env, const Status& status) {
  Napi::TypeError::New(env, status.field + ": " + status.detail).ThrowAsJavaScriptException();
  return env.Undefined();
}

// What open() hands out, and every call on an engine takes as its first argument.
using Handle = Napi::External<std::shared_ptr<Session>>;
using Listener = Napi::External<ListenerBox>;

std::shared_ptr<Session> session_of(const Napi::CallbackInfo& info) {
  if (info[0].IsExternal()) return *info[0].As<Handle>().Data();
  raise(info.Env(), Status::invalid("engine", "is not an engine of open()"));
  return nullptr;
}

// open(request, listener | null, events) -> { fault } or { engine }
Napi::Value open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!info[2].IsFunction()) return raise(env, Status::invalid("events", "is not a function"));
  Napi::Object out = Napi::Object::New(env);
  OpenRequest request;
  const Status status = parse_open(info[0], &request);
  (void)out.Set("fault", fault_of(env, status));
  if (!status.is_ok()) return out;
  std::unique_ptr<TcpListener> listener;
  if (info[1].IsExternal()) listener = std::move(info[1].As<Listener>().Data()->listener);
  auto* const session = new std::shared_ptr<Session>(Session::open(env, std::move(request), std::move(listener), info[2].As<Napi::Function>()));
  (void)out.Set("engine", Handle::New(env, session, [](Napi::Env, std::shared_ptr<Session>* held) { delete held; }));
  return out;
}

// launch(engine, words) -> fault | null
Napi::Value launch(const Napi::CallbackInfo& info) {
  const auto session = session_of(info);
  if (!session) return info.Env().Undefined();
  if (!info[1].IsTypedArray() || info[1].As<Napi::TypedArray>().TypedArrayType() != napi_uint32_array)
    return raise(info.Env(), Status::invalid("words", "is not a Uint32Array"));
  const auto words = info[1].As<Napi::Uint32Array>();
  return fault_of(info.Env(), session->launch(info.Env(), {words.Data(), words.ElementLength()}));
}

// stage(engine, request) -> fault | null; a `staged` event follows where it is null
Napi::Value stage(const Napi::CallbackInfo& info) {
  const auto session = session_of(info);
  if (!session) return info.Env().Undefined();
  StageRequest request;
  Status status = parse_stage(info[1], &request);
  if (status.is_ok()) status = session->stage(info.Env(), std::move(request));
  return fault_of(info.Env(), status);
}

Napi::Value cancel(const Napi::CallbackInfo& info) {
  if (const auto session = session_of(info)) session->cancel();
  return info.Env().Undefined();
}

Napi::Value close(const Napi::CallbackInfo& info) {
  if (const auto session = session_of(info)) session->close(info.Env());
  return info.Env().Undefined();
}

Napi::Value memory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto session = session_of(info);
  Napi::Array out = Napi::Array::New(env);
  if (!session || !session->engine()) return out;
  for (const Memory& rank : session->engine()->memory()) {
    Napi::Object one = Napi::Object::New(env);
    (void)one.Set("weights", double(rank.weights));
    (void)one.Set("kv", double(rank.kv));
    (void)one.Set("activations", double(rank.activations));
    (void)one.Set("communication", double(rank.communication));
    (void)out.Set(out.Length(), one);
  }
  return out;
}

Napi::Value expert_tokens(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto session = session_of(info);
  Napi::Array out = Napi::Array::New(env);
  if (!session || !session->engine()) return out;
  for (const auto& block : session->engine()->stats().expert_tokens) {
    Napi::Array counts = Napi::Array::New(env);
    for (const uint64_t count : block) (void)counts.Set(counts.Length(), double(count));
    (void)out.Set(out.Length(), counts);
  }
  return out;
}

// listen(hostPort) -> { fault } or { fault: null, address, handle }
Napi::Value listen(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!info[0].IsString()) return raise(env, Status::invalid("address", "is not a string"));
  auto box = std::make_unique<ListenerBox>();
  const Status status = TcpListener::open(info[0].As<Napi::String>().Utf8Value(), &box->listener);
  Napi::Object out = Napi::Object::New(env);
  (void)out.Set("fault", fault_of(env, status));
  if (!status.is_ok()) return out;
  (void)out.Set("address", box->listener->address());
  (void)out.Set("handle", Listener::New(env, box.release(), [](Napi::Env, ListenerBox* held) { delete held; }));
  return out;
}

Napi::Value devices_of(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const DeviceInfo found = devices();
  Napi::Object out = Napi::Object::New(env);
  Napi::Array isas = Napi::Array::New(env);
  for (const std::string& isa : found.isas) (void)isas.Set(isas.Length(), isa);
  (void)out.Set("isas", isas);
  (void)out.Set("cpu", found.cpu);
  (void)out.Set("cpus", found.cpus);
  (void)out.Set("memoryBytes", double(found.memory_bytes));
  return out;
}

// noise(seedLow, seedHigh, index, domain, id) -> bigint
Napi::Value noise(const Napi::CallbackInfo& info) {
  static const char* const names[] = {"seedLow", "seedHigh", "index", "domain", "id"};
  uint64_t values[5] = {};
  for (size_t i = 0; i < 5; ++i) {
    const uint64_t most = i < 2 ? UINT64_MAX : i == 3 ? 255 : UINT32_MAX;
    if (const Status status = parse_integer(info[i], names[i], most, &values[i]); !status.is_ok()) return raise(info.Env(), status);
  }
  return Napi::BigInt::New(info.Env(), noise_bits({values[0], values[1]}, uint32_t(values[2]), uint32_t(values[3]), uint32_t(values[4])));
}

// gumbel(bits) -> number
Napi::Value gumbel_of(const Napi::CallbackInfo& info) {
  uint64_t bits = 0;
  if (const Status status = parse_integer(info[0], "bits", UINT64_MAX, &bits); !status.is_ok()) return raise(info.Env(), status);
  return Napi::Number::New(info.Env(), gumbel(bits));
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  const std::pair<const char*, Napi::Value (*)(const Napi::CallbackInfo&)> functions[] = {
      {"open", open}, {"launch", launch}, {"stage", stage}, {"cancel", cancel}, {"close", close}, {"memory", memory}, {"expertTokens", expert_tokens},
      {"listen", listen}, {"devices", devices_of}, {"noise", noise}, {"gumbel", gumbel_of},
  };
  for (const auto& [name, function] : functions) (void)exports.Set(name, Napi::Function::New(env, function, name));
  (void)exports.Set("abi", kAbi);
  return exports;
}

}  // namespace

NODE_API_MODULE(muster, init)

}  // namespace muster::addon

#include "addon/parse.h"

#include <cmath>
#include <functional>
#include <limits>

namespace muster::addon {
namespace {

constexpr uint64_t kU32 = std::numeric_limits<uint32_t>::max();
constexpr uint64_t kListMax = 1u << 24;  // entries: no model comes near

// One object being read. After the first fault all reads answer zeros; the fault stands in `status`.
class Fields {
 public:
  Fields(const Napi::Value& value, std::string at, Status* status) : value_(value), at_(std::move(at)), status_(status) {
    if (!value.IsObject()) fail("", "is not an object");
  }

  uint64_t integer(const char* name, uint64_t most = kU32) const {
    uint64_t out = 0;
    take(parse_integer(get(name), path(name), most, &out));
    return out;
  }
  uint32_t u32(const char* name) const { return uint32_t(integer(name)); }
  int32_t index_or_none(const char* name) const {
    const Napi::Value value = get(name);
    if (value.IsNumber() && value.As<Napi::Number>().DoubleValue() == -1) return -1;
    return int32_t(integer(name, 1u << 30));
  }
  double number(const char* name) const {
    const Napi::Value value = get(name);
    if (value.IsNumber()) return value.As<Napi::Number>().DoubleValue();
    fail(name, "is not a number");
    return 0;
  }
  bool flag(const char* name) const {
    const Napi::Value value = get(name);
    if (value.IsBoolean()) return value.As<Napi::Boolean>().Value();
    fail(name, "is not true or false");
    return false;
  }
  std::string text(const char* name) const {
    const Napi::Value value = get(name);
    if (value.IsString()) return value.As<Napi::String>().Utf8Value();
    fail(name, "is not a string");
    return {};
  }
  Range range(const char* name) const {
    const Fields inner = child(name);
    return {inner.u32("begin"), inner.u32("end")};
  }
  Fields child(const char* name) const { return Fields(get(name), path(name), status_); }
  bool has(const char* name) const { return !get(name).IsUndefined(); }

  void each(const char* name, const std::function<void(const Napi::Value&, const std::string&)>& read) const {
    const Napi::Value value = get(name);
    if (!value.IsArray()) return fail(name, "is not a list");
    const Napi::Array list = value.As<Napi::Array>();
    if (list.Length() > kListMax) return fail(name, "is too long");
    for (uint32_t i = 0; i < list.Length() && status_->is_ok(); ++i) {
      Napi::Value entry;
      if (list.Get(i).UnwrapTo(&entry)) read(entry, path(name) + "[" + std::to_string(i) + "]");
    }
  }
  void objects(const char* name, const std::function<void(const Fields&)>& read) const {
    each(name, [&](const Napi::Value& value, const std::string& at) { read(Fields(value, at, status_)); });
  }
  std::vector<uint32_t> integers(const char* name) const {
    std::vector<uint32_t> out;
    each(name, [&](const Napi::Value& value, const std::string& at) {
      uint64_t one = 0;
      take(parse_integer(value, at, kU32, &one));
      out.push_back(uint32_t(one));
    });
    return out;
  }
  std::vector<float> floats(const char* name) const {
    std::vector<float> out;
    each(name, [&](const Napi::Value& value, const std::string& at) {
      if (!value.IsNumber()) take(Status::invalid(at, "is not a number"));
      else out.push_back(value.As<Napi::Number>().FloatValue());
    });
    return out;
  }

 private:
  std::string path(const char* name) const { return at_.empty() ? name : at_ + "." + name; }
  void take(Status status) const {
    if (status_->is_ok()) *status_ = std::move(status);
  }
  void fail(const char* name, const char* what) const { take(Status::invalid(*name ? path(name) : at_, what)); }
  Napi::Value get(const char* name) const {
    Napi::Value out = value_.Env().Undefined();
    if (!value_.IsObject()) return out;
    Napi::Value found;
    return value_.As<Napi::Object>().Get(name).UnwrapTo(&found) ? found : out;
  }

  Napi::Value value_;
  std::string at_;
  Status* status_;
};

template <class Enum>
Enum kind(const Fields& fields, const char* name) { return Enum(fields.integer(name, 255)); }

BlockSpec read_block(const Fields& from) {
  BlockSpec out;
  const Fields a = from.child("attention");
  out.attention.heads = a.u32("heads");
  out.attention.kv_heads = a.u32("kvHeads");
  out.attention.head_dim = a.u32("headDim");
  out.attention.scale = a.number("scale");
  out.attention.rope = kind<RopeLayout>(a, "rope");
  out.attention.rope_dims = a.u32("ropeDims");
  out.attention.rope_frequencies = a.floats("ropeFrequencies");
  out.attention.mask = kind<MaskKind>(a, "mask");
  out.attention.mask_span = a.u32("maskSpan");
  out.attention.qk_unit_norm = a.flag("qkUnitNorm");
  out.attention.temperature_scale = a.number("temperatureScale");
  out.attention.temperature_floor = a.u32("temperatureFloor");
  out.attention.kv_group = a.u32("kvGroup");
  out.dense_ffn = from.u32("denseFfn");
  if (!from.has("moe")) return out;
  const Fields m = from.child("moe");
  out.moe = {m.u32("experts"), m.u32("topK"), m.u32("expertFfn"), m.u32("sharedFfn"), kind<RouterScore>(m, "score")};
  return out;
}

ModelDesc read_model(const Fields& from) {
  ModelDesc out;
  out.name = from.text("name");
  out.vocab = from.u32("vocab");
  out.hidden = from.u32("hidden");
  out.context_tokens = from.u32("contextTokens");
  out.norm_eps = from.number("normEps");
  out.tied_head = from.flag("tiedHead");
  from.objects("blocks", [&](const Fields& block) { out.blocks.push_back(read_block(block)); });
  from.objects("kvGroups", [&](const Fields& group) { out.kv_groups.push_back({group.integers("blocks"), group.u32("kvHeads"), group.u32("headDim")}); });
  return out;
}

GroupDesc read_group(const Fields& from) {
  GroupDesc out;
  out.world = from.u32("world");
  out.worker = from.u32("worker");
  out.workers = from.u32("workers");
  out.worker_of_rank = from.integers("workerOfRank");
  from.objects("local", [&](const Fields& rank) {
    RankShard shard;
    shard.rank = rank.u32("rank");
    shard.heads = rank.range("heads");
    shard.kv_heads = rank.range("kvHeads");
    shard.vocab = rank.range("vocab");
    shard.dense_ffn = rank.range("denseFfn");
    shard.shared_ffn = rank.range("sharedFfn");
    shard.experts = rank.integers("experts");
    shard.expert_ffn = rank.range("expertFfn");
    out.local.push_back(std::move(shard));
  });
  return out;
}

EngineOptions read_options(const Fields& from) {
  EngineOptions out;
  out.threads = from.u32("threads");
  out.backend = from.text("backend");
  out.isa = from.text("isa");
  out.kv_block_tokens = from.u32("kvBlockTokens");
  out.rows_max = from.u32("rowsMax");
  out.tokens_max = from.u32("tokensMax");
  out.verify_max = from.u32("verifyMax");
  out.slots_max = from.u32("slotsMax");
  out.logprobs_max = from.u32("logprobsMax");
  out.in_flight_max = from.u32("inFlightMax");
  out.stall_report_ms = from.u32("stallReportMs");
  out.stall_give_up_ms = from.u32("stallGiveUpMs");
  return out;
}

TensorSlice read_slice(const Fields& from) {
  TensorSlice out;
  out.rank = from.u32("rank");
  out.role = kind<Role>(from, "role");
  out.type = kind<StoredType>(from, "type");
  out.block = from.index_or_none("block");
  out.expert = from.index_or_none("expert");
  out.file = from.u32("file");
  out.offset = from.integer("offset", std::numeric_limits<uint64_t>::max());
  out.rows = from.u32("rows");
  out.cols = from.u32("cols");
  out.rows_stored = from.u32("rowsStored");
  out.row_first = from.u32("rowFirst");
  out.transposed = from.flag("transposed");
  out.keep_rows = from.range("keepRows");
  out.keep_cols = from.range("keepCols");
  out.name = from.text("name");
  return out;
}

std::vector<FileDesc> read_files(const Fields& from) {
  std::vector<FileDesc> out;
  from.objects("files", [&](const Fields& file) { out.push_back({file.text("path"), file.integer("bytes", std::numeric_limits<uint64_t>::max())}); });
  return out;
}

const char* code_name(Status::Code code) {
  switch (code) {
    case Status::Code::ok: return "ok";
    case Status::Code::invalid: return "invalid";
    case Status::Code::unsupported: return "unsupported";
    case Status::Code::out_of_memory: return "out_of_memory";
    case Status::Code::lost: return "lost";
    case Status::Code::internal: return "internal";
  }
  return "internal";
}

}  // namespace

Status parse_integer(const Napi::Value& value, const std::string& name, uint64_t most, uint64_t* out) {
  bool whole = false;
  if (value.IsBigInt()) {
    *out = value.As<Napi::BigInt>().Uint64Value(&whole);
  } else if (value.IsNumber()) {
    const double number = value.As<Napi::Number>().DoubleValue();
    whole = number >= 0 && number <= 9007199254740991.0 && std::floor(number) == number;
    *out = whole ? uint64_t(number) : 0;
  }
  if (whole && *out <= most) return Status::ok();
  *out = 0;
  return Status::invalid(name, "is not a whole number within 0 and " + std::to_string(most));
}

Status parse_open(const Napi::Value& value, OpenRequest* out) {
  Status status;
  const Fields from(value, "", &status);
  out->model = read_model(from.child("model"));
  out->group = read_group(from.child("group"));
  out->options = read_options(from.child("options"));
  out->files = read_files(from);
  from.objects("slices", [&](const Fields& slice) { out->slices.push_back(read_slice(slice)); });
  out->kv_blocks = from.u32("kvBlocks");
  out->incarnation = from.integer("incarnation", std::numeric_limits<uint64_t>::max());
  from.each("addresses", [&](const Napi::Value& address, const std::string& at) {
    if (address.IsString()) out->addresses.push_back(address.As<Napi::String>().Utf8Value());
    else if (status.is_ok()) status = Status::invalid(at, "is not a string");
  });
  return status;
}

Status parse_stage(const Napi::Value& value, StageRequest* out) {
  Status status;
  const Fields from(value, "", &status);
  out->map.version = from.u32("version");
  from.objects("shares", [&](const Fields& share) {
    out->map.shares.push_back({share.u32("rank"), share.u32("block"), share.u32("expert"), share.u32("copy"), share.u32("copies")});
  });
  out->files = read_files(from);
  from.objects("slices", [&](const Fields& slice) { out->slices.push_back(read_slice(slice)); });
  return status;
}

Napi::Value fault_of(Napi::Env env, const Status& status) {
  if (status.is_ok()) return env.Null();
  Napi::Object out = Napi::Object::New(env);
  (void)out.Set("code", code_name(status.code));
  (void)out.Set("field", status.field);
  (void)out.Set("detail", status.detail);
  (void)out.Set("rank", status.rank);
  return out;
}

}  // namespace muster::addon

// From plain JavaScript objects to the structs of muster/model.h and muster/engine.h. Owns types and ranges of fields; what
// the values mean together is checked by the engine. The first wrong field is named by its path.
#pragma once
#include <napi.h>

#include "muster/engine.h"

namespace muster::addon {

// What openEngine of worker/engine/native.ts hands over.
struct OpenRequest {
  ModelDesc model;
  GroupDesc group;
  EngineOptions options;
  std::vector<FileDesc> files;
  std::vector<TensorSlice> slices;
  uint32_t kv_blocks = 0;
  std::vector<std::string> addresses;  // by worker; empty where the group has one worker
  uint64_t incarnation = 0;
};

Status parse_open(const Napi::Value& value, OpenRequest* out);

struct StageRequest {
  ExpertMap map;
  std::vector<FileDesc> files;
  std::vector<TensorSlice> slices;
};

Status parse_stage(const Napi::Value& value, StageRequest* out);

// One integer of a call: a number or a bigint within [0, most].
Status parse_integer(const Napi::Value& value, const std::string& name, uint64_t most, uint64_t* out);

Napi::Value fault_of(Napi::Env env, const Status& status);  // null where ok

}  // namespace muster::addon

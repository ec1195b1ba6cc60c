// Checks a step before anything of it is applied. Owns a shadow of every slot's lengths as they will be once all launched
// steps are done; never sees ids that are not known yet.
//
//   V1  a refused step changes nothing: checks run on copies of the slots it names.
//   V2  a slot with a verify row in flight is named by no other step: its length is not known.
#pragma once
#include <unordered_map>
#include <vector>

#include "muster/engine.h"

namespace muster {

struct StepLimits {
  EngineOptions options;
  uint32_t vocab = 0, context_tokens = 0, kv_blocks = 0;  // kv_blocks counts block 0
};

class StepCheck {
 public:
  explicit StepCheck(const StepLimits& limits) : limits_(limits), slots_(size_t(limits.options.slots_max) + 1) {}
  Status admit(const Step& step);
  // The one map that a step may switch to; 0: none.
  void stage(uint32_t version) { staged_ = version; }
  // A step is done: lengths of its verify rows are known now.
  void settle(const Step& step, const std::vector<RowResult>& results);

 private:
  struct Shadow {
    bool open = false, verifying = false;
    uint32_t ids = 0, computed = 0, blocks = 0;
  };
  using Draft = std::unordered_map<uint32_t, Shadow>;  // slots as the step leaves them

  Status check_update(const SlotUpdate& update, const std::string& at, Draft* draft) const;
  Status check_experts(const Step& step, bool* switches) const;
  Status check_open(const SlotUpdate& update, const std::string& at, Shadow* slot) const;
  Status check_fork(const SlotUpdate& update, const std::string& at, Draft* draft) const;
  Status check_row(const Row& row, const std::string& at, Draft* draft) const;
  Status check_choice(const Row& row, const std::string& at, const Shadow& slot) const;
  Status find(uint32_t slot, const std::string& at, Draft* draft, Shadow** out) const;
  Status find_open(uint32_t slot, const std::string& at, Draft* draft, Shadow** out) const;
  Status check_blocks(const std::vector<uint32_t>& blocks, const std::string& at, uint64_t held) const;
  Status check_ids(const std::vector<uint32_t>& ids, const std::string& at) const;

  StepLimits limits_;
  std::vector<Shadow> slots_;
  uint64_t epoch_ = 0;
  uint32_t staged_ = 0;
};

}  // namespace muster

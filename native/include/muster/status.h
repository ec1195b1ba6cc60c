// Errors are values: no exception and no abort crosses the engine's interface.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

namespace muster {

struct Status {
  enum class Code : uint8_t { ok, invalid, unsupported, out_of_memory, lost, internal };
  Code code = Code::ok;
  std::string field;        // invalid: which field; unsupported: what; internal: which op
  std::string detail;       // one sentence for a person
  int rank = -1;            // lost: who did not arrive
  uint64_t epoch = 0;       // lost: in which step
  double waited_ms = 0;     // lost
  uint64_t asked = 0;       // out_of_memory: bytes
  uint64_t free = 0;        // out_of_memory: bytes

  bool is_ok() const { return code == Code::ok; }
  static Status ok() { return {}; }
  static Status invalid(std::string field, std::string detail) { return make(Code::invalid, std::move(field), std::move(detail)); }
  static Status unsupported(std::string what, std::string detail) { return make(Code::unsupported, std::move(what), std::move(detail)); }
  static Status internal(std::string op, std::string detail) { return make(Code::internal, std::move(op), std::move(detail)); }
  static Status out_of_memory(std::string what, uint64_t asked, uint64_t free) {
    Status s = make(Code::out_of_memory, std::move(what), "asked " + std::to_string(asked) + " bytes, free " + std::to_string(free));
    s.asked = asked;
    s.free = free;
    return s;
  }
  static Status lost(int rank, uint64_t epoch, double waited_ms, std::string detail) {
    Status s = make(Code::lost, "rank " + std::to_string(rank), std::move(detail));
    s.rank = rank;
    s.epoch = epoch;
    s.waited_ms = waited_ms;
    return s;
  }

 private:
  static Status make(Code code, std::string field, std::string detail) {
    Status s;
    s.code = code;
    s.field = std::move(field);
    s.detail = std::move(detail);
    return s;
  }
};

}  // namespace muster

// Returns early with the status of a call that did not succeed.
#define MUSTER_TRY(expression)                                 \
  do {                                                         \
    if (::muster::Status status_ = (expression); !status_.is_ok()) return status_; \
  } while (0)

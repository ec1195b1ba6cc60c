#include "comm/frame.h"

#include <algorithm>
#include <cstring>

namespace muster::comm {

namespace {

constexpr uint32_t frame_magic = 0x4652534d;

uint64_t mix(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

std::string refuse_data(const Header& header, const FrameRule& rule, uint64_t received) {
  if (header.op < static_cast<uint8_t>(Op::sum) || header.op > static_cast<uint8_t>(Op::barrier)) return "unknown operation";
  if (header.bytes % rule.ranks != 0 || header.bytes / rule.ranks > piece_bytes_max)
    return "a payload of " + std::to_string(header.bytes) + " bytes for " + std::to_string(rule.ranks) + " ranks";
  if (header.sequence != received + 1)
    return "operation " + std::to_string(header.sequence) + " of step " + std::to_string(header.epoch) + " where operation " +
           std::to_string(received + 1) + " comes next";
  return "";
}

}  // namespace

uint32_t frame_tag(uint64_t incarnation, uint32_t worker) {
  return static_cast<uint32_t>(mix(mix(incarnation + 0x9e3779b97f4a7c15) + worker));
}

Header data_header(uint32_t tag, const Call& call, uint32_t ranks) {
  Header header;
  header.magic = frame_magic;
  header.tag = tag;
  header.kind = static_cast<uint8_t>(FrameKind::data);
  header.op = static_cast<uint8_t>(call.op);
  header.bytes = call.bytes * ranks;
  header.sequence = call.sequence;
  header.epoch = call.epoch;
  header.total = call.total;
  return header;
}

Header control_header(uint32_t tag, FrameKind kind, size_t bytes) {
  Header header;
  header.magic = frame_magic;
  header.tag = tag;
  header.kind = static_cast<uint8_t>(kind);
  header.bytes = static_cast<uint32_t>(bytes);
  return header;
}

std::string refuse(const Header& header, const FrameRule& rule, uint64_t received) {
  if (header.magic != frame_magic) return "not a frame";
  if (header.tag != rule.tag) return "the tag of another worker or incarnation";
  size_t expected = 0;
  switch (static_cast<FrameKind>(header.kind)) {
    case FrameKind::data: return refuse_data(header, rule, received);
    case FrameKind::heartbeat: expected = rule.ranks * sizeof(Arrival); break;
    case FrameKind::failure: expected = sizeof(FailureNote); break;
    case FrameKind::goodbye: break;
    default: return "unknown kind " + std::to_string(header.kind);
  }
  if (header.bytes != expected) return "a control payload of " + std::to_string(header.bytes) + " bytes";
  return "";
}

std::string mismatch(const Header& header, const Call& call, uint32_t ranks) {
  if (header.epoch == call.epoch && header.op == static_cast<uint8_t>(call.op) && header.total == call.total &&
      header.bytes == call.bytes * ranks) return "";
  Call theirs;
  theirs.op = static_cast<Op>(header.op);
  theirs.sequence = header.sequence;
  theirs.epoch = header.epoch;
  theirs.total = header.total;
  return describe(theirs);
}

FailureNote note_of(const Status& status) {
  FailureNote note;
  note.rank = status.rank;
  note.code = status.code == Status::Code::lost ? 1 : 0;
  note.epoch = status.epoch;
  note.waited_ms = status.waited_ms;
  status.detail.copy(note.detail, sizeof(note.detail) - 1);
  return note;
}

Status status_of(const FailureNote& note, uint32_t worker) {
  std::string detail(note.detail, strnlen(note.detail, sizeof(note.detail)));
  std::replace_if(detail.begin(), detail.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; }, '?');
  const std::string told = " (told by worker " + std::to_string(worker) + ")";
  if (!detail.ends_with(")") || detail.find("(told by") == std::string::npos) detail += told;  // the first teller is enough
  return note.code == 1 ? Status::lost(note.rank, note.epoch, note.waited_ms, detail) : Status::internal("comm", detail);
}

const char* text_of(Refusal reason) {
  switch (reason) {
    case Refusal::none: return "no reason";
    case Refusal::incarnation: return "it is of another incarnation";
    case Refusal::group: return "it has another protocol version, world or distribution of ranks";
    case Refusal::worker: return "it is another worker of the group than the one asked for";
    case Refusal::taken: return "it already has a link with a worker of this index";
  }
  return "an unknown reason";
}

Greeting greeting_of(const Roster& roster, uint64_t incarnation) {
  Greeting greeting;
  greeting.incarnation = incarnation;
  greeting.from = roster.worker;
  greeting.world = roster.world();
  greeting.workers = roster.workers();
  for (uint32_t worker : roster.worker_of_rank) greeting.layout = mix(greeting.layout + 0x9e3779b97f4a7c15 + worker);
  return greeting;
}

Refusal check_greeting(const Greeting& theirs, const Greeting& ours) {
  if (theirs.version != ours.version) return Refusal::group;
  if (theirs.incarnation != ours.incarnation) return Refusal::incarnation;
  if (theirs.world != ours.world || theirs.workers != ours.workers || theirs.layout != ours.layout) return Refusal::group;
  if (theirs.to != ours.from || theirs.from >= ours.workers || theirs.from == ours.from) return Refusal::worker;
  return Refusal::none;
}

}  // namespace muster::comm

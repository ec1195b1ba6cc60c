// What crosses a link between two workers: greetings while the mesh forms, then frames. Little-endian, fixed layout.
// Everything that arrives is checked here before it is believed: lengths first.
//   header   40 bytes
//   data       payload: the pieces of the sender's ranks, in rank order, bytes / ranks each
//   heartbeat  payload: {sequence, epoch} of each of the sender's ranks: what they have arrived at
//   failure    payload: FailureNote; the sender has given up and leaves       goodbye    the sender closes in good order
#pragma once
#include <bit>
#include <cstdint>
#include <span>
#include <string>

#include "comm/board.h"

namespace muster::comm {

static_assert(std::endian::native == std::endian::little, "frames are sent as they lie in memory");

inline constexpr uint32_t piece_bytes_max = 1u << 20;  // of one rank in one frame; longer operations go in pieces

enum class FrameKind : uint8_t { data = 1, heartbeat = 2, failure = 3, goodbye = 4 };

struct Header {
  uint32_t magic = 0, tag = 0;
  uint8_t kind = 0, op = 0;
  uint16_t zero = 0;
  uint32_t bytes = 0;  // of the payload
  uint64_t sequence = 0, epoch = 0, total = 0;
};
static_assert(sizeof(Header) == 40);

// Who is at the other end, and what its frames must look like.
struct FrameRule {
  uint32_t tag = 0;    // of its frames
  uint32_t ranks = 0;  // it has
};

// The tag of frames of one worker in one incarnation.
uint32_t frame_tag(uint64_t incarnation, uint32_t worker);

Header data_header(uint32_t tag, const Call& call, uint32_t ranks);
Header control_header(uint32_t tag, FrameKind kind, size_t bytes);

// Why a header cannot be believed, or empty. `received` is the last data frame that came whole.
std::string refuse(const Header& header, const FrameRule& rule, uint64_t received);
// Why a data frame does not belong to the operation that is running, or empty.
std::string mismatch(const Header& header, const Call& call, uint32_t ranks);

struct FailureNote {
  int32_t rank = -1;
  uint32_t code = 0;
  uint64_t epoch = 0;
  double waited_ms = 0;
  char detail[488] = {};
};
static_assert(sizeof(FailureNote) == 512);
FailureNote note_of(const Status& status);
Status status_of(const FailureNote& note, uint32_t worker);

inline constexpr uint32_t control_bytes_max = sizeof(Arrival) * world_max;
static_assert(sizeof(FailureNote) <= control_bytes_max);

// While the mesh forms: hello (dialler), welcome or refusal (acceptor), confirm (dialler).
enum class GreetingKind : uint32_t { hello = 1, welcome = 2, confirm = 3, refusal = 4 };
enum class Refusal : uint32_t { none = 0, incarnation = 1, group = 2, worker = 3, taken = 4 };
const char* text_of(Refusal reason);

inline constexpr uint64_t greeting_magic = 0x31304d4d4f435352;  // a stranger is told by its first 8 bytes
struct Greeting {
  uint64_t magic = greeting_magic;
  uint32_t version = 1, kind = 0;
  uint64_t incarnation = 0;
  uint32_t from = 0, to = 0, world = 0, workers = 0;
  uint64_t layout = 0;  // hash of worker_of_rank
  uint32_t reason = 0, zero = 0;
};
static_assert(sizeof(Greeting) == 56);

// What we say of ourselves; `kind` and `to` are set for each greeting.
Greeting greeting_of(const Roster& roster, uint64_t incarnation);
// none where `theirs` is a greeting of our group for us.
Refusal check_greeting(const Greeting& theirs, const Greeting& ours);

}  // namespace muster::comm

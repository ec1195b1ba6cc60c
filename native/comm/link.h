// One TCP link to another worker: frames out, frames in, never blocking. Owns the socket and the buffers of what arrived;
// the caller serialises all calls but payload().
//
//   L1  nothing is allocated for a payload before its header was believed; lengths are bounded by frame.h.
//   L2  frame n + 1 may arrive while n is read: payloads live in two buffers by parity of the sequence. A worker can not be
//       further ahead, for it needs our frame n + 1 to leave operation n + 1.
//   L3  after a fault or the end of the stream the link delivers nothing more.
#pragma once
#include <sys/uio.h>

#include <string>
#include <vector>

#include "comm/frame.h"
#include "comm/socket.h"

namespace muster::comm {

struct LinkEnd {
  uint32_t worker = 0;
  std::string address;
  FrameRule rule;         // of its frames
  uint32_t tag = 0;       // of our frames
};

class Link {
 public:
  Link(Fd fd, LinkEnd end, Board& board);

  int fd() const { return fd_.get(); }
  const LinkEnd& end() const { return end_; }

  // Queues a data frame; the pieces stay as they are until idle(). Nothing is sent before flush().
  void queue_data(const Header& header, std::span<const std::span<const uint8_t>> pieces);
  // Queues a small frame; only where idle().
  void queue_control(FrameKind kind, std::span<const uint8_t> payload);
  bool idle() const { return first_ == out_.size(); }
  void flush();           // a broken pipe is told by receive(), which may find the reason in what was sent before

  // Reads what is there, at most up to and with data frame `stop`; refuses data frames beyond `last` (L2). ok, or why the
  // group has failed; `lost` then has no epoch.
  Status receive(uint64_t stop, uint64_t last);
  uint64_t received() const { return received_; }
  const Header& header(uint64_t sequence) const { return headers_[sequence & 1]; }
  const uint8_t* payload(uint64_t sequence) const { return payloads_[sequence & 1].data(); }
  bool ended() const { return ended_; }
  void shut();            // no more from us

 private:
  Status consume(uint64_t stop);
  Status begin_frame();
  Status end_frame();
  Status finish(int error);
  Status fault(const std::string& why);
  uint8_t* target() { return is_data_ ? payloads_[header_.sequence & 1].data() : control_in_.data(); }

  Fd fd_;
  LinkEnd end_;
  Board& board_;

  std::vector<iovec> out_;      // frames to send; [first_, end) is left
  size_t first_ = 0;
  Header data_header_, control_header_;
  std::vector<uint8_t> control_out_;
  bool broken_ = false;

  std::vector<uint8_t> in_;     // bytes read; [in_first_, in_end_) is not consumed
  size_t in_first_ = 0, in_end_ = 0;
  bool in_payload_ = false, is_data_ = false;
  size_t filled_ = 0;           // of the payload
  Header header_;
  std::vector<uint8_t> control_in_;
  Header headers_[2];
  std::vector<uint8_t> payloads_[2];
  uint64_t received_ = 0, last_ = 0;
  bool goodbye_ = false, ended_ = false;
};

}  // namespace muster::comm

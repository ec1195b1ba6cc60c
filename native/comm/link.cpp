#include "comm/link.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace muster::comm {

namespace {
constexpr size_t in_bytes = 64 * 1024;         // one read fetches any small frame whole
constexpr size_t direct_bytes_min = 16 * 1024; // a longer rest is read straight into its place
}  // namespace

Link::Link(Fd fd, LinkEnd end, Board& board) : fd_(std::move(fd)), end_(std::move(end)), board_(board), in_(in_bytes) {
  out_.reserve(4 + board.roster().local().size());
  control_out_.reserve(control_bytes_max);
  control_in_.reserve(control_bytes_max);
}

void Link::queue_data(const Header& header, std::span<const std::span<const uint8_t>> pieces) {
  data_header_ = header;
  if (idle()) { out_.clear(); first_ = 0; }
  out_.push_back({&data_header_, sizeof(Header)});
  for (const auto& piece : pieces)
    if (!piece.empty()) out_.push_back({const_cast<uint8_t*>(piece.data()), piece.size()});
}

void Link::queue_control(FrameKind kind, std::span<const uint8_t> payload) {
  control_out_.assign(payload.begin(), payload.end());
  control_header_ = control_header(end_.tag, kind, payload.size());
  out_.clear();
  first_ = 0;
  out_.push_back({&control_header_, sizeof(Header)});
  if (!payload.empty()) out_.push_back({control_out_.data(), control_out_.size()});
}

void Link::flush() {
  while (!idle() && !broken_) {
    msghdr message{};
    message.msg_iov = out_.data() + first_;
    message.msg_iovlen = out_.size() - first_;
    const ssize_t sent = sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      broken_ = errno != EAGAIN && errno != EWOULDBLOCK;
      break;
    }
    auto left = static_cast<size_t>(sent);
    while (left > 0) {
      iovec& part = out_[first_];
      const size_t taken = std::min(left, part.iov_len);
      part.iov_base = static_cast<uint8_t*>(part.iov_base) + taken;
      part.iov_len -= taken;
      left -= taken;
      if (part.iov_len == 0) ++first_;
    }
  }
}

Status Link::receive(uint64_t stop, uint64_t last) {
  last_ = last;
  while (!ended_) {
    MUSTER_TRY(consume(stop));
    if (received_ >= stop) return Status::ok();
    const bool direct = in_payload_ && header_.bytes - filled_ >= direct_bytes_min;  // consume() left the buffer empty
    uint8_t* place = direct ? target() + filled_ : in_.data() + in_end_;
    const size_t room = direct ? header_.bytes - filled_ : in_.size() - in_end_;
    const ssize_t got = recv(fd_.get(), place, room, MSG_DONTWAIT);
    if (got == 0) return finish(0);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return Status::ok();
      return finish(errno);
    }
    if (direct) filled_ += static_cast<size_t>(got);
    else in_end_ += static_cast<size_t>(got);
  }
  return Status::ok();
}

// Takes whole frames out of the buffer. Leaves it empty, or with the beginning of a header, or behind the frame `stop`.
Status Link::consume(uint64_t stop) {
  while (true) {
    if (!in_payload_) {
      if (received_ >= stop) break;
      if (in_end_ - in_first_ < sizeof(Header)) break;
      std::memcpy(&header_, in_.data() + in_first_, sizeof(Header));
      in_first_ += sizeof(Header);
      MUSTER_TRY(begin_frame());
    }
    const size_t taken = std::min<size_t>(in_end_ - in_first_, header_.bytes - filled_);
    if (taken > 0) std::memcpy(target() + filled_, in_.data() + in_first_, taken);
    in_first_ += taken;
    filled_ += taken;
    if (filled_ < header_.bytes) break;
    in_payload_ = false;
    MUSTER_TRY(end_frame());
  }
  if (in_first_ > 0) {
    std::memmove(in_.data(), in_.data() + in_first_, in_end_ - in_first_);
    in_end_ -= in_first_;
    in_first_ = 0;
  }
  return Status::ok();
}

Status Link::begin_frame() {
  if (goodbye_) return fault("a frame after its goodbye");
  if (const std::string why = refuse(header_, end_.rule, received_); !why.empty()) return fault(why);
  if (header_.kind == static_cast<uint8_t>(FrameKind::data) && header_.sequence > last_)
    return fault("operation " + std::to_string(header_.sequence) + " before it can have had ours");
  is_data_ = header_.kind == static_cast<uint8_t>(FrameKind::data);
  std::vector<uint8_t>& place = is_data_ ? payloads_[header_.sequence & 1] : control_in_;
  if (place.size() < header_.bytes) place.resize(header_.bytes);
  filled_ = 0;
  in_payload_ = true;
  return Status::ok();
}

Status Link::end_frame() {
  switch (static_cast<FrameKind>(header_.kind)) {
    case FrameKind::data:
      headers_[header_.sequence & 1] = header_;
      received_ = header_.sequence;
      board_.receive(end_.worker, {header_.sequence, header_.epoch});
      return Status::ok();
    case FrameKind::heartbeat: {
      const std::vector<uint32_t>& ranks = board_.roster().ranks_of_worker[end_.worker];
      for (size_t i = 0; i < ranks.size(); ++i) {
        Arrival at;
        std::memcpy(&at, control_in_.data() + i * sizeof(at), sizeof(at));
        if (at.sequence > board_.arrived(ranks[i]).sequence) board_.arrive(ranks[i], at);
      }
      return Status::ok();
    }
    case FrameKind::failure: {
      FailureNote note;
      std::memcpy(&note, control_in_.data(), sizeof(note));
      if (note.rank < -1 || note.rank >= static_cast<int32_t>(board_.roster().world())) return fault("a failure of no rank");
      ended_ = true;
      return status_of(note, end_.worker);
    }
    case FrameKind::goodbye: goodbye_ = true; return Status::ok();
  }
  return fault("unknown kind");
}

// The stream is over. After a goodbye that is no fault yet: it is one for whoever still needs something from this worker.
Status Link::finish(int error) {
  ended_ = true;
  if (goodbye_) return Status::ok();
  const uint32_t rank = board_.roster().ranks_of_worker[end_.worker].front();
  return Status::lost(static_cast<int>(rank), 0, 0, "worker " + std::to_string(end_.worker) + " (" + end_.address + ") is gone: " +
                      (error == 0 ? "its link closed" : error_text(error)));
}

Status Link::fault(const std::string& why) {
  ended_ = true;
  return Status::internal("comm", "worker " + std::to_string(end_.worker) + " (" + end_.address + ") sent " + why + "; refused");
}

void Link::shut() { shutdown(fd_.get(), SHUT_WR); }

}  // namespace muster::comm

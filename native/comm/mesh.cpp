#include "comm/mesh.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <list>

namespace muster::comm {

namespace {

constexpr int64_t ns_per_ms = 1'000'000;
constexpr int64_t greet_ms_max = 2000;      // for a connection to say who it is
constexpr int64_t backoff_ms_first = 10, backoff_ms_max = 500;
constexpr size_t guests_spare = 16;         // places for strangers beside the group's own workers

// Reads and writes one greeting at a time.
class Greeter {
 public:
  enum class Got { nothing, whole, wrong };
  explicit Greeter(Fd fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }
  Fd take() { return std::move(fd_); }
  const Greeting& greeting() const { return in_; }
  // A socket this young has room for 56 bytes; one that has not is not worth waiting for.
  bool send(const Greeting& out) const {
    return ::send(fd_.get(), &out, sizeof(out), MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(sizeof(out));
  }
  Got read() {
    if (filled_ == sizeof(in_)) filled_ = 0;
    const ssize_t got = recv(fd_.get(), reinterpret_cast<uint8_t*>(&in_) + filled_, sizeof(in_) - filled_, MSG_DONTWAIT);
    if (got < 0) {
      error = errno;
      return errno == EAGAIN || errno == EINTR ? Got::nothing : Got::wrong;
    }
    error = 0;
    filled_ += static_cast<size_t>(got);
    if (got == 0 || (filled_ >= sizeof(in_.magic) && in_.magic != greeting_magic)) return Got::wrong;
    return filled_ == sizeof(in_) ? Got::whole : Got::nothing;
  }
  int error = 0;

 private:
  Fd fd_;
  Greeting in_;
  size_t filled_ = 0;
};

struct Guest {
  Greeter greeter;
  int64_t until;
  bool welcomed = false;
};

struct Dial {
  uint32_t worker = 0;
  std::unique_ptr<Greeter> greeter;  // null between attempts
  bool greeted = false;              // the connection stands and hello is sent
  int64_t until = 0;                 // of the attempt, or of the pause before the next
  int64_t backoff_ns = backoff_ms_first * ns_per_ms;
  uint32_t attempts = 0;
  std::string why = "no attempt was made";
};

class Former {
 public:
  Former(const TcpGroup& group, const Roster& roster, int listener)
      : group_(group), roster_(roster), ours_(greeting_of(roster, group.incarnation)), listener_(listener), links_(roster.workers()) {
    for (uint32_t worker = 0; worker < roster.worker; ++worker) {
      dials_.emplace_back();
      dials_.back().worker = worker;
    }
  }
  Status run(std::vector<Fd>* links);

 private:
  bool complete() const {
    for (uint32_t worker = 0; worker < links_.size(); ++worker)
      if (worker != roster_.worker && !links_[worker]) return false;
    return true;
  }
  void poll_once(int64_t until);
  void accept_all();
  bool serve(Guest& guest);         // false: drop it
  void advance(Dial& dial);
  void begin(Dial& dial);
  void hear(Dial& dial);
  void pause(Dial& dial, std::string why);
  Greeting say(GreetingKind kind, uint32_t to) const;
  Status missing(int64_t waited_ns) const;

  const TcpGroup& group_;
  const Roster& roster_;
  const Greeting ours_;
  int listener_;
  std::vector<Fd> links_;
  std::vector<Dial> dials_;
  std::list<Guest> guests_;
};

Greeting Former::say(GreetingKind kind, uint32_t to) const {
  Greeting greeting = ours_;
  greeting.kind = static_cast<uint32_t>(kind);
  greeting.to = to;
  return greeting;
}

Status Former::run(std::vector<Fd>* links) {
  const int64_t start = now_ns(), until = start + static_cast<int64_t>(group_.connect_timeout_ms) * ns_per_ms;
  while (true) {
    for (Dial& dial : dials_)
      if (!links_[dial.worker]) advance(dial);
    accept_all();
    guests_.remove_if([this](Guest& guest) { return now_ns() >= guest.until || !serve(guest); });
    if (complete()) break;
    if (now_ns() >= until) return missing(now_ns() - start);
    poll_once(until);
  }
  *links = std::move(links_);
  return Status::ok();
}

void Former::poll_once(int64_t until) {
  std::vector<pollfd> polled{{listener_, POLLIN, 0}};
  for (const Guest& guest : guests_) {
    polled.push_back({guest.greeter.fd(), POLLIN, 0});
    until = std::min(until, guest.until);
  }
  for (const Dial& dial : dials_) {
    if (links_[dial.worker]) continue;
    if (dial.greeter) polled.push_back({dial.greeter->fd(), static_cast<short>(dial.greeted ? POLLIN : POLLOUT), 0});
    until = std::min(until, dial.until);
  }
  const int64_t left_ms = (until - now_ns()) / ns_per_ms + 1;
  poll(polled.data(), polled.size(), static_cast<int>(std::clamp<int64_t>(left_ms, 0, 1000)));
}

void Former::accept_all() {
  while (true) {
    Fd fd(accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) return;  // none there, or one that is gone again
    no_delay(fd.get());
    if (guests_.size() >= roster_.workers() + guests_spare) guests_.pop_front();  // the oldest has had its time
    guests_.push_back({Greeter(std::move(fd)), now_ns() + greet_ms_max * ns_per_ms});
  }
}

bool Former::serve(Guest& guest) {
  const Greeter::Got got = guest.greeter.read();
  if (got != Greeter::Got::whole) return got == Greeter::Got::nothing;
  const Greeting& theirs = guest.greeter.greeting();
  const auto kind = static_cast<GreetingKind>(theirs.kind);
  if (kind != (guest.welcomed ? GreetingKind::confirm : GreetingKind::hello)) return false;
  Refusal reason = check_greeting(theirs, ours_);
  if (reason == Refusal::none && links_[theirs.from]) reason = Refusal::taken;
  if (reason == Refusal::none && theirs.from < roster_.worker) reason = Refusal::worker;  // those are dialled
  if (reason != Refusal::none) {
    Greeting refusal = say(GreetingKind::refusal, theirs.from);
    refusal.incarnation = 0;  // not for strangers to learn
    refusal.reason = static_cast<uint32_t>(reason);
    guest.greeter.send(refusal);
    return false;
  }
  if (!guest.welcomed) {
    guest.welcomed = true;
    return guest.greeter.send(say(GreetingKind::welcome, theirs.from));
  }
  links_[theirs.from] = guest.greeter.take();
  return false;  // it has moved to its place
}

void Former::pause(Dial& dial, std::string why) {
  dial.why = std::move(why);
  dial.greeter.reset();
  dial.greeted = false;
  dial.until = now_ns() + dial.backoff_ns;
  dial.backoff_ns = std::min(dial.backoff_ns * 2, backoff_ms_max * ns_per_ms);
}

void Former::begin(Dial& dial) {
  std::vector<SocketAddress> addresses;
  if (const Status status = resolve(group_.addresses[dial.worker], false, &addresses); !status.is_ok()) return pause(dial, status.detail);
  int error = 0;
  Fd fd = comm::dial(addresses[dial.attempts++ % addresses.size()], &error);
  if (error != 0) return pause(dial, error_text(error));
  dial.greeter = std::make_unique<Greeter>(std::move(fd));
  dial.until = now_ns() + greet_ms_max * ns_per_ms;
}

void Former::advance(Dial& dial) {
  if (!dial.greeter) {
    if (now_ns() < dial.until) return;
    begin(dial);
    if (!dial.greeter) return;
  }
  if (!dial.greeted) {
    pollfd ready{dial.greeter->fd(), POLLOUT, 0};
    if (poll(&ready, 1, 0) == 1) {
      int error = 0;
      socklen_t length = sizeof(error);
      getsockopt(dial.greeter->fd(), SOL_SOCKET, SO_ERROR, &error, &length);
      if (error != 0) return pause(dial, error_text(error));
      if (!dial.greeter->send(say(GreetingKind::hello, dial.worker))) return pause(dial, "the connection broke");
      dial.greeted = true;
    }
  }
  if (dial.greeted) hear(dial);
  if (dial.greeter && now_ns() >= dial.until)
    pause(dial, dial.greeted ? "it accepted the connection but did not answer" : "the connection timed out");
}

void Former::hear(Dial& dial) {
  const Greeter::Got got = dial.greeter->read();
  if (got == Greeter::Got::nothing) return;
  if (got == Greeter::Got::wrong)
    return pause(dial, dial.greeter->error != 0 ? error_text(dial.greeter->error) : "it is no worker, or it left");
  const Greeting theirs = dial.greeter->greeting();
  const auto kind = static_cast<GreetingKind>(theirs.kind);
  if (kind == GreetingKind::refusal) return pause(dial, std::string("it refused us: ") + text_of(static_cast<Refusal>(theirs.reason)));
  if (kind != GreetingKind::welcome) return pause(dial, "it answered out of turn");
  Refusal reason = check_greeting(theirs, ours_);
  if (reason == Refusal::none && theirs.from != dial.worker) reason = Refusal::worker;
  if (reason != Refusal::none) return pause(dial, text_of(reason));
  if (!dial.greeter->send(say(GreetingKind::confirm, dial.worker))) return pause(dial, "the connection broke");
  links_[dial.worker] = dial.greeter->take();
  dial.greeter.reset();
}

Status Former::missing(int64_t waited_ns) const {
  int first = -1;
  std::string text;
  for (uint32_t worker = 0; worker < links_.size(); ++worker) {
    if (worker == roster_.worker || links_[worker]) continue;
    if (first < 0) first = static_cast<int>(worker);
    text += (text.empty() ? "" : "; ");
    text += "worker " + std::to_string(worker) + " at " + group_.addresses[worker] +
            (worker < roster_.worker ? " was not reached: " + dials_[worker].why : " did not connect to us");
  }
  const double waited_ms = static_cast<double>(waited_ns) / ns_per_ms;
  const uint32_t rank = roster_.ranks_of_worker[static_cast<uint32_t>(first)].front();
  return Status::lost(static_cast<int>(rank), 0, waited_ms, text + " (waited " + std::to_string(group_.connect_timeout_ms) + " ms)");
}

}  // namespace

Status form_mesh(const TcpGroup& group, const Roster& roster, int listener, std::vector<Fd>* links) {
  return Former(group, roster, listener).run(links);
}

}  // namespace muster::comm

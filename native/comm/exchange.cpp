#include "comm/exchange.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace muster::comm {

namespace {
constexpr int64_t ns_per_ms = 1'000'000;
constexpr int64_t beat_ms_max = 200;   // how old the news of who has arrived may be
constexpr int64_t tick_ms_max = 25;    // how late a waiting rank sees a closed link
constexpr int64_t poll_ms_max = 1000;
}  // namespace

Exchange::Exchange(Board& board, std::vector<std::unique_ptr<Link>> links)
    : board_(board),
      links_(std::move(links)),
      spoken_(links_.size()),
      piece_bytes_(2, 0),
      wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  // Limits shorter than the beat must still name the right rank: news travels four times before anybody reports.
  beat_ns_ = std::clamp<int64_t>(board.limits().stall_report_ms / 4, 1, beat_ms_max) * ns_per_ms;
  tick_ns_ = std::min(beat_ns_, tick_ms_max * ns_per_ms);
  polled_.reserve(links_.size() + 1);
  now_.reserve(board.roster().local().size());
  for (Spoken& spoken : spoken_) spoken.arrivals.resize(board.roster().local().size());
  board_.on_failure = [this] {
    const uint64_t one = 1;
    if (write(wake_.get(), &one, sizeof(one)) < 0) return;  // full: it is readable already
  };
}

Exchange::~Exchange() { board_.on_failure = [] {}; }

const uint8_t* Exchange::piece(uint32_t rank, uint64_t sequence) const {
  const Roster& roster = board_.roster();
  return links_[roster.worker_of_rank[rank]]->payload(sequence) +
         static_cast<size_t>(roster.index_in_worker[rank]) * piece_bytes_[sequence & 1];
}

// Reads one link; whatever is wrong becomes the board's failure.
void Exchange::read(Link& link, const Reach& reach, const Call& call, const Wait& wait) {
  Status status = link.receive(reach.stop, reach.last);
  if (status.is_ok() && link.ended() && link.received() < call.sequence) {
    const uint32_t rank = board_.roster().ranks_of_worker[link.end().worker].front();
    status = Status::lost(static_cast<int>(rank), 0, 0, "worker " + std::to_string(link.end().worker) + " (" +
                          link.end().address + ") closed its group before " + describe(call));
  }
  if (status.is_ok()) return;
  if (status.code == Status::Code::lost && status.epoch == 0) {
    status.epoch = call.epoch;
    status.waited_ms = wait.waited_ms();
  }
  board_.fail(std::move(status));
}

bool Exchange::is_done(const Call& call) const {
  for (const auto& link : links_)
    if (link && (link->received() < call.sequence || !(link->idle() || link->ended()))) return false;
  return true;
}

Status Exchange::agree(const Call& call) {
  const Roster& roster = board_.roster();
  for (const auto& link : links_) {
    if (!link) continue;
    const uint32_t worker = link->end().worker;
    const std::string theirs = mismatch(link->header(call.sequence), call, link->end().rule.ranks);
    if (theirs.empty()) continue;
    return board_.fail(Status::internal(std::string("comm.") + name_of(call.op),
        roster.name(roster.ranks_of_worker[worker].front()) + " is in " + theirs + " where " +
        roster.name(roster.local().front()) + " is in " + describe(call) + "; the ranks must agree"));
  }
  return Status::ok();
}

Status Exchange::swap(const Call& call, std::span<const std::span<const uint8_t>> ours) {
  std::lock_guard lock(mutex_);
  const Wait wait(board_, call, Phase::arrive);
  piece_bytes_[call.sequence & 1] = call.bytes;
  const auto ranks = static_cast<uint32_t>(ours.size());
  for (const auto& link : links_)
    if (link) link->queue_data(data_header(link->end().tag, call, ranks), ours);
  // Reads all there is: who comes late may find, behind the frames it needs, that the others have given it up, and the end
  // of a link whose frame is here lies behind that frame. Only while it spins it reads no further than it must.
  Reach reach{UINT64_MAX, call.sequence + 1};
  while (true) {
    for (const auto& link : links_) {
      if (!link) continue;
      link->flush();
      read(*link, reach, call, wait);
    }
    if (board_.failed()) return board_.failure();
    if (is_done(call)) break;
    if (wait.waited_ns() < spin_.ns()) {
      reach.stop = call.sequence;
      yield_cpu();
      continue;
    }
    MUSTER_TRY(wait.check());
    sleep(wait.sleep_ns(poll_ms_max * ns_per_ms));
    reach.stop = UINT64_MAX;
  }
  spin_.learn(wait.waited_ns());
  return agree(call);
}

// Sleeps until a link can go on, the board fails, or the time is over.
void Exchange::sleep(int64_t timeout_ns) {
  polled_.clear();
  polled_.push_back({wake_.get(), POLLIN, 0});
  for (const auto& link : links_) {
    if (!link || link->ended()) continue;
    polled_.push_back({link->fd(), static_cast<short>(link->idle() ? POLLIN : POLLIN | POLLOUT), 0});
  }
  timespec timeout{};
  timeout.tv_sec = static_cast<time_t>(timeout_ns / 1'000'000'000);
  timeout.tv_nsec = static_cast<long>(timeout_ns % 1'000'000'000);
  ppoll(polled_.data(), polled_.size(), &timeout, nullptr);
}

void Exchange::tick(const Call& call, const Wait& wait) {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || left_ || board_.failed()) return;
  const bool beat = now_ns() - beaten_ns_ >= beat_ns_;
  for (const auto& link : links_) {
    if (!link) continue;
    read(*link, {UINT64_MAX, call.sequence}, call, wait);
    if (beat && !board_.failed()) tell(*link);
  }
  if (beat) beaten_ns_ = now_ns();
}

// News only: a link to a worker that does not read holds at most one heartbeat for each arrival.
void Exchange::tell(Link& link) {
  const std::vector<uint32_t>& local = board_.roster().local();
  now_.clear();
  for (uint32_t rank : local) now_.push_back(board_.arrived(rank));
  std::vector<Arrival>& told = spoken_[link.end().worker].arrivals;
  const auto same = [](const Arrival& a, const Arrival& b) { return a.sequence == b.sequence && a.epoch == b.epoch; };
  if (link.idle() && !std::equal(now_.begin(), now_.end(), told.begin(), same)) {
    link.queue_control(FrameKind::heartbeat, {reinterpret_cast<const uint8_t*>(now_.data()), now_.size() * sizeof(Arrival)});
    told = now_;
  }
  link.flush();
}

void Exchange::leave(bool orderly) {
  std::lock_guard lock(mutex_);
  if (left_) return;
  left_ = true;
  const FailureNote note = note_of(board_.failure());
  for (const auto& link : links_) {
    if (!link) continue;
    if (link->idle()) {  // else a frame is half sent and nothing can follow it
      if (orderly) link->queue_control(FrameKind::goodbye, {});
      else link->queue_control(FrameKind::failure, {reinterpret_cast<const uint8_t*>(&note), sizeof(note)});
      link->flush();
    }
    link->shut();
  }
}

}  // namespace muster::comm

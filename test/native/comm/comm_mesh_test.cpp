// How the mesh forms among strangers, and what a link refuses: everything here speaks raw bytes to a worker.
#include <sys/socket.h>
#include <unistd.h>

#include "comm/link.h"
#include "comm/mesh.h"
#include "harness.h"

using namespace harness;
using namespace muster::comm;
using muster::TcpListener;
using std::chrono::milliseconds;
using SteadyClock = std::chrono::steady_clock;

namespace {

constexpr CommLimits patient{5000, 10000};

Fd dial_blocking(const std::string& address) {
  std::vector<SocketAddress> addresses;
  CHECK_OK(resolve(address, false, &addresses));
  Fd fd(socket(addresses[0].storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  CHECK(connect(fd.get(), reinterpret_cast<const sockaddr*>(&addresses[0].storage), addresses[0].length) == 0);
  return fd;
}

void send_bytes(const Fd& fd, const void* bytes, size_t count) { (void)!::send(fd.get(), bytes, count, MSG_NOSIGNAL); }

// What comes back until the other side closes, at most `count` bytes.
size_t read_bytes(const Fd& fd, void* bytes, size_t count) {
  size_t filled = 0;
  while (filled < count) {
    const ssize_t got = recv(fd.get(), static_cast<uint8_t*>(bytes) + filled, count - filled, 0);
    if (got <= 0) break;
    filled += static_cast<size_t>(got);
  }
  return filled;
}

Roster roster_of(const muster::TcpGroup& group) {
  Roster roster;
  CHECK_OK(make_roster(group.worker, static_cast<uint32_t>(group.addresses.size()), group.worker_of_rank, &roster));
  return roster;
}

// A real worker 0 and, as worker 1, a bare socket that has greeted it properly.
struct Impostor {
  std::shared_ptr<Comm> comm;
  Fd fd;
  uint32_t tag = 0;
  explicit Impostor(const CommLimits& limits = patient) {
    Plan planned = plan(workers({1, 1}), limits);
    tag = frame_tag(planned.groups[1].incarnation, 1);
    std::thread other([&] {
      std::vector<Fd> links;
      const auto* listener = dynamic_cast<const Listener*>(planned.listeners[1].get());
      CHECK_OK(form_mesh(planned.groups[1], roster_of(planned.groups[1]), listener->fd(), &links));
      fd = std::move(links[0]);
    });
    CHECK_OK(make_tcp_comm(std::move(planned.listeners[0]), planned.groups[0], &comm));
    other.join();
  }
  void send(const Header& header, size_t payload_bytes) const {
    send_bytes(fd, &header, sizeof(header));
    const std::vector<uint8_t> payload(payload_bytes);
    if (!payload.empty()) send_bytes(fd, payload.data(), payload.size());
  }
  Status sum() const {
    std::vector<float> data(4);
    comm->begin(0, 5);
    return comm->sum(0, data);
  }
};

Call sum_call(uint64_t sequence, uint64_t epoch, uint32_t bytes) { return {Op::sum, sequence, epoch, bytes, bytes}; }

}  // namespace

TEST("a well-formed foreign frame is taken: the refusals below are not refusals of everything") {
  const Impostor impostor;
  impostor.send(data_header(impostor.tag, sum_call(1, 5, 16), 1), 16);
  CHECK_OK(impostor.sum());
}

TEST("C3: frames of another step, operation, length, order, incarnation or size are refused, naming the worker") {
  struct Case { const char* name; std::function<void(Header&)> spoil; };
  const Case cases[] = {
      {"older step", [](Header& h) { h.epoch = 4; }},
      {"newer step", [](Header& h) { h.epoch = 6; }},
      {"other operation", [](Header& h) { h.op = static_cast<uint8_t>(Op::gather); }},
      {"unknown operation", [](Header& h) { h.op = 77; }},
      {"other length", [](Header& h) { h.bytes = 12; h.total = 12; }},
      {"other total", [](Header& h) { h.total = 1 << 20; }},
      {"operation passed", [](Header& h) { h.sequence = 0; }},
      {"operation ahead", [](Header& h) { h.sequence = 2; }},
      {"other tag", [](Header& h) { h.tag ^= 1; }},
      {"no frame", [](Header& h) { h.magic = 0x20544547; }},
      {"unknown kind", [](Header& h) { h.kind = 9; }},
      {"monstrous length", [](Header& h) { h.bytes = 0xffffffff; }},
      {"heartbeat of a wrong size", [](Header& h) { h.kind = static_cast<uint8_t>(FrameKind::heartbeat); h.bytes = 8; }},
      {"failure of a wrong size", [](Header& h) { h.kind = static_cast<uint8_t>(FrameKind::failure); h.bytes = 511; }},
  };
  for (const Case& each : cases) {
    const Impostor impostor;
    Header header = data_header(impostor.tag, sum_call(1, 5, 16), 1);
    each.spoil(header);
    impostor.send(header, std::min(header.bytes, 4096u));
    const auto start = SteadyClock::now();
    const Status status = impostor.sum();
    const bool good = status.code == Status::Code::internal && status.detail.find("worker 1") != std::string::npos && elapsed_ms(start) < 1000;
    CHECK(good);
    if (!good) std::printf("  %s: %s\n", each.name, status.detail.c_str());
    CHECK(impostor.sum().detail == status.detail);
  }
}

TEST("L2: a frame is read ahead by one operation once ours is out, and never further") {
  Roster roster;
  CHECK_OK(make_roster(0, 2, {0, 1}, &roster));
  Board board(roster, patient);
  const auto link_with = [&](const std::vector<uint64_t>& sequences, Fd* other) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0);
    *other = Fd(pair[1]);
    for (uint64_t sequence : sequences) {
      const Header header = data_header(3, sum_call(sequence, 5, 8), 1);
      send_bytes(*other, &header, sizeof(header));
      send_bytes(*other, &sequence, sizeof(sequence));
    }
    return std::make_unique<Link>(Fd(pair[0]), LinkEnd{1, "here", {3, 1}, 4}, board);
  };
  const auto content = [](const Link& link, uint64_t sequence) {
    uint64_t value = 0;
    std::memcpy(&value, link.payload(sequence), sizeof(value));
    return value;
  };
  Fd other;
  const auto two = link_with({1, 2}, &other);
  CHECK_OK(two->receive(1, 2));
  CHECK_EQ(two->received(), 1u);
  CHECK_OK(two->receive(UINT64_MAX, 2));
  CHECK_EQ(two->received(), 2u);
  CHECK_EQ(content(*two, 1), 1u);  // untouched by the second
  CHECK_EQ(content(*two, 2), 2u);
  CHECK(!link_with({1, 2}, &other)->receive(UINT64_MAX, 1).is_ok());
  CHECK(!link_with({1, 2, 3}, &other)->receive(UINT64_MAX, 2).is_ok());
}

TEST("a frame that stops in the middle is a stall of that worker; half a frame and the end is its loss") {
  {
    const Impostor impostor({50, 200});
    impostor.send(data_header(impostor.tag, sum_call(1, 5, 16), 1), 7);
    const Status status = impostor.sum();
    CHECK(status.code == Status::Code::lost && status.rank == 1);
  }
  Impostor impostor;
  impostor.send(data_header(impostor.tag, sum_call(1, 5, 16), 1), 7);
  impostor.fd.reset();
  const auto start = SteadyClock::now();
  const Status status = impostor.sum();
  CHECK(status.code == Status::Code::lost && status.rank == 1 && elapsed_ms(start) < 1000);
}

TEST("a failure note of garbage is bounded and printable") {
  const Impostor impostor;
  FailureNote note;
  note.code = 1;
  note.rank = 1;
  std::memset(note.detail, 7, sizeof(note.detail));
  const Header header = control_header(impostor.tag, FrameKind::failure, sizeof(note));
  send_bytes(impostor.fd, &header, sizeof(header));
  send_bytes(impostor.fd, &note, sizeof(note));
  const Status status = impostor.sum();
  CHECK(status.code == Status::Code::lost && status.rank == 1 && status.detail.size() < 600);
  for (char c : status.detail) CHECK(c >= 0x20);
}

TEST("M2: garbage, silence, crowds, another incarnation and another world are dropped, and the group still forms") {
  Plan planned = plan(workers({1, 1, 1}), patient);
  const std::string address = planned.groups[0].addresses[0];
  std::vector<std::shared_ptr<Comm>> comms(3);
  std::vector<Status> statuses(3);
  std::vector<std::thread> threads;
  const auto start_worker = [&](uint32_t w) {
    threads.emplace_back([&, w] { statuses[w] = make_tcp_comm(std::move(planned.listeners[w]), planned.groups[w], &comms[w]); });
  };
  start_worker(0);

  std::vector<Fd> silent;
  for (int i = 0; i < 60; ++i) silent.push_back(dial_blocking(address));
  const Fd garbage = dial_blocking(address);
  send_bytes(garbage, "GET / HTTP/1.1\r\nHost: muster\r\n\r\n", 33);
  uint8_t answer[64];
  CHECK_EQ(read_bytes(garbage, answer, sizeof(answer)), 0u);  // dropped without a word

  const auto refusal_of = [&](const std::function<void(Greeting&)>& spoil) {
    Greeting greeting = greeting_of(roster_of(planned.groups[1]), planned.groups[1].incarnation);
    greeting.kind = static_cast<uint32_t>(GreetingKind::hello);
    spoil(greeting);
    const Fd fd = dial_blocking(address);
    send_bytes(fd, &greeting, sizeof(greeting));
    Greeting refusal;
    CHECK_EQ(read_bytes(fd, &refusal, sizeof(refusal)), sizeof(refusal));
    CHECK_EQ(refusal.kind, static_cast<uint32_t>(GreetingKind::refusal));
    CHECK_EQ(refusal.incarnation, 0u);
    return static_cast<Refusal>(refusal.reason);
  };
  CHECK(refusal_of([](Greeting& g) { g.incarnation += 1; }) == Refusal::incarnation);
  CHECK(refusal_of([](Greeting& g) { g.world = 4; }) == Refusal::group);
  CHECK(refusal_of([](Greeting& g) { g.layout ^= 1; }) == Refusal::group);
  CHECK(refusal_of([](Greeting& g) { g.version = 2; }) == Refusal::group);
  CHECK(refusal_of([](Greeting& g) { g.to = 2; }) == Refusal::worker);
  CHECK(refusal_of([](Greeting& g) { g.from = 0xffffffff; }) == Refusal::worker);

  const auto start = SteadyClock::now();
  start_worker(1);
  start_worker(2);
  for (std::thread& thread : threads) thread.join();
  CHECK(elapsed_ms(start) < 5000);
  for (const Status& status : statuses) CHECK_OK(status);
  Group group{workers({1, 1, 1}), comms};
  if (comms[0] && comms[1] && comms[2]) CHECK(all_ok(group.run([&](uint32_t rank) { return group.of(rank).barrier(rank); })));
}

TEST("M2: a worker index that is taken is refused to a second one") {
  Plan planned = plan(workers({1, 1, 1}), patient);
  planned.groups[0].connect_timeout_ms = 1500;
  std::shared_ptr<Comm> comm;
  Status status;
  std::thread worker([&] { status = make_tcp_comm(std::move(planned.listeners[0]), planned.groups[0], &comm); });
  std::vector<Fd> fds;
  Refusal last = Refusal::none;
  for (int i = 0; i < 2; ++i) {
    Greeting greeting = greeting_of(roster_of(planned.groups[1]), planned.groups[1].incarnation), reply;
    greeting.kind = static_cast<uint32_t>(GreetingKind::hello);
    fds.push_back(dial_blocking(planned.groups[0].addresses[0]));
    send_bytes(fds.back(), &greeting, sizeof(greeting));
    CHECK_EQ(read_bytes(fds.back(), &reply, sizeof(reply)), sizeof(reply));
    last = static_cast<Refusal>(reply.reason);
    if (i == 0) {
      CHECK_EQ(reply.kind, static_cast<uint32_t>(GreetingKind::welcome));
      greeting.kind = static_cast<uint32_t>(GreetingKind::confirm);
      send_bytes(fds.back(), &greeting, sizeof(greeting));
      // Once the first stands, a byte of the second pass tells: wait until the worker has taken the confirm.
      std::this_thread::sleep_for(milliseconds(100));
    }
  }
  CHECK(last == Refusal::taken);
  worker.join();
  CHECK(status.code == Status::Code::lost && status.rank == 2);
  CHECK(status.detail.find("worker 1") == std::string::npos);
}

TEST("M3: the time-out names the workers that were not reached, where and why") {
  Plan planned = plan(workers({1, 2, 1}), patient);
  planned.listeners[0].reset();  // nobody listens there any more
  planned.groups[1].connect_timeout_ms = 400;
  std::shared_ptr<Comm> comm;
  const auto start = SteadyClock::now();
  const Status status = make_tcp_comm(std::move(planned.listeners[1]), planned.groups[1], &comm);
  CHECK(elapsed_ms(start) >= 390 && elapsed_ms(start) < 1500);
  CHECK(status.code == Status::Code::lost && status.rank == 0 && comm == nullptr);
  CHECK(status.detail.find("worker 0 at " + planned.groups[1].addresses[0] + " was not reached: Connection refused") != std::string::npos);
  CHECK(status.detail.find("worker 2 at " + planned.groups[1].addresses[2] + " did not connect") != std::string::npos);
}

TEST("M3: dialling outlives an impostor at the address, and says what was wrong with it") {
  Plan planned = plan(workers({1, 1}), patient);
  Plan stale = plan(workers({1, 1}), patient);
  stale.groups[0].incarnation = 1;
  stale.groups[0].connect_timeout_ms = 1200;
  planned.groups[1].connect_timeout_ms = 500;
  planned.groups[1].addresses[0] = stale.groups[0].addresses[0];
  std::shared_ptr<Comm> old, fresh;
  std::thread stale_worker([&] { CHECK(!make_tcp_comm(std::move(stale.listeners[0]), stale.groups[0], &old).is_ok()); });
  const Status status = make_tcp_comm(std::move(planned.listeners[1]), planned.groups[1], &fresh);
  CHECK(status.code == Status::Code::lost && status.rank == 0);
  CHECK(status.detail.find("another incarnation") != std::string::npos);
  stale_worker.join();
}

TEST("addresses that are none, ports that are taken and groups that make no sense are refused by name") {
  std::unique_ptr<TcpListener> listener, second;
  for (const char* address : {"", "nowhere", ":80", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1", "::1:80", "[::1:80"}) {
    const Status status = TcpListener::open(address, &listener);
    CHECK(status.code == Status::Code::invalid && status.field == "address");
  }
  CHECK_OK(TcpListener::open("127.0.0.1:0", &listener));
  CHECK(listener->address().starts_with("127.0.0.1:") && listener->address() != "127.0.0.1:0");
  CHECK(!TcpListener::open(listener->address(), &second).is_ok());

  std::shared_ptr<Comm> comm;
  muster::TcpGroup group;
  const auto field = [&] { return make_tcp_comm(nullptr, group, &comm).field; };
  CHECK_EQ(field(), "worker_of_rank");
  group.worker_of_rank = {0, 1};
  group.addresses = {"a:1", "b:1", "c:1"};
  CHECK_EQ(field(), "addresses");
  group.addresses = {"a:1", "b:1"};
  group.worker_of_rank = {0, 2};
  CHECK_EQ(field(), "worker_of_rank");
  group.worker_of_rank = {0, 0};
  CHECK_EQ(field(), "worker_of_rank");
  group.worker_of_rank = {0, 1};
  group.worker = 2;
  CHECK_EQ(field(), "worker");
  group.worker = 1;
  CHECK_EQ(field(), "listener");
  CHECK(muster::make_peer_comm(0, {}) == nullptr);
}

MUSTER_TEST_MAIN

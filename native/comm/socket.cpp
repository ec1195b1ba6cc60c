#include "comm/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <system_error>

namespace muster::comm {

namespace {

constexpr int backlog = 128;

struct HostPort { std::string host, port; };

Status parse(const std::string& text, HostPort* out) {
  const size_t colon = text.rfind(':');
  const auto wrong = [&](const char* why) { return Status::invalid("address", "\"" + text + "\" " + why + "; HOST:PORT is wanted"); };
  if (colon == std::string::npos) return wrong("has no port");
  out->host = text.substr(0, colon);
  out->port = text.substr(colon + 1);
  if (out->host.size() > 1 && out->host.front() == '[' && out->host.back() == ']')
    out->host = out->host.substr(1, out->host.size() - 2);
  else if (out->host.find(':') != std::string::npos) return wrong("has an IPv6 address without [ ]");
  if (out->host.empty()) return wrong("has no host");
  uint16_t port = 0;
  const char* end = out->port.data() + out->port.size();
  const auto parsed = std::from_chars(out->port.data(), end, port);
  if (parsed.ec != std::errc() || parsed.ptr != end || out->port.empty()) return wrong("has no port from 0 to 65535");
  return Status::ok();
}

uint16_t port_of(int fd) {
  SocketAddress bound;
  bound.length = sizeof(bound.storage);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&bound.storage), &bound.length) != 0) return 0;
  return ntohs(bound.storage.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound.storage)->sin6_port
                                                   : reinterpret_cast<sockaddr_in*>(&bound.storage)->sin_port);
}

}  // namespace

void Fd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

std::string error_text(int error) { return std::generic_category().message(error); }

Status resolve(const std::string& host_port, bool passive, std::vector<SocketAddress>* out) {
  HostPort parts;
  MUSTER_TRY(parse(host_port, &parts));
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  addrinfo* found = nullptr;
  const int rc = getaddrinfo(parts.host.c_str(), parts.port.c_str(), &hints, &found);
  if (rc != 0) return Status::invalid("address", "\"" + host_port + "\" does not resolve: " + gai_strerror(rc));
  out->clear();
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    SocketAddress address;
    address.length = at->ai_addrlen;
    std::copy_n(reinterpret_cast<const uint8_t*>(at->ai_addr), at->ai_addrlen, reinterpret_cast<uint8_t*>(&address.storage));
    out->push_back(address);
  }
  freeaddrinfo(found);
  if (out->empty()) return Status::invalid("address", "\"" + host_port + "\" has no address");
  return Status::ok();
}

void no_delay(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

Fd dial(const SocketAddress& address, int* error) {
  *error = 0;
  Fd fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) {
    *error = errno;
    return fd;
  }
  no_delay(fd.get());
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0 && errno != EINPROGRESS)
    *error = errno;
  return fd;
}

}  // namespace muster::comm

namespace muster {

Status TcpListener::open(const std::string& host_port, std::unique_ptr<TcpListener>* out) {
  std::vector<comm::SocketAddress> addresses;
  MUSTER_TRY(comm::resolve(host_port, true, &addresses));
  std::string why;
  for (const comm::SocketAddress& address : addresses) {
    comm::Fd fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const int on = 1;
    if (fd) setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (!fd || bind(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0 ||
        listen(fd.get(), comm::backlog) != 0) {
      why = comm::error_text(errno);
      continue;
    }
    const std::string host = host_port.substr(0, host_port.rfind(':'));
    const std::string port = std::to_string(comm::port_of(fd.get()));
    *out = std::make_unique<comm::Listener>(std::move(fd), host + ":" + port);
    return Status::ok();
  }
  return Status::invalid("address", "cannot listen on \"" + host_port + "\": " + why);
}

}  // namespace muster

// Sockets as the mesh needs them: owned descriptors, HOST:PORT, listen, dial without blocking.
#pragma once
#include <sys/socket.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "muster/comm.h"

namespace muster::comm {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) { reset(); fd_ = std::exchange(other.fd_, -1); }
    return *this;
  }
  ~Fd() { reset(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

std::string error_text(int error);  // strerror, safe between threads

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

// "127.0.0.1:80", "[::1]:80", "worker-1.group:80". Names are resolved by the system's resolver, whose own time-outs bound it.
Status resolve(const std::string& host_port, bool passive, std::vector<SocketAddress>* out);

// Begins a connection; `error` is 0 where it is on its way (writable when it stands or failed).
Fd dial(const SocketAddress& address, int* error);
void no_delay(int fd);

class Listener final : public TcpListener {
 public:
  Listener(Fd fd, std::string address) : fd_(std::move(fd)), address_(std::move(address)) {}
  const std::string& address() const override { return address_; }
  int fd() const { return fd_.get(); }

 private:
  Fd fd_;
  std::string address_;
};

}  // namespace muster::comm

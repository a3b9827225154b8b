// SPDX-License-Identifier: Apache-2.0
#include "daemon/qemu_agent.h"

#include <cerrno>
#include <cstring>
#include <random>

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "blockio/base/clock.h"

namespace blockferry {

namespace {

constexpr Nanoseconds patience = std::chrono::seconds(5);
constexpr std::size_t answer_bytes_max = 65536;

Error failure(const std::string& socket, const std::string& why) {
  return make_error(ErrorCode::conflict, "talk to the guest agent at", socket, why);
}

/// Whatever an earlier client was told and did not read goes before.
Result<void> wait_for(int fd, const std::string& wanted, const std::string& socket) {
  const Nanoseconds deadline = system_clock().now() + patience;
  std::string received;
  while (received.find(wanted) == std::string::npos) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - system_clock().now());
    pollfd event{fd, POLLIN, 0};
    if (left.count() <= 0 || ::poll(&event, 1, int(left.count())) <= 0)
      return fail(failure(socket, "it does not answer: does qemu-guest-agent run in the guest?"));
    char part[4096];
    const ssize_t length = ::recv(fd, part, sizeof part, 0);
    if (length <= 0 || received.size() > answer_bytes_max)
      return fail(failure(socket, "QEMU has closed the connection"));
    received.append(part, std::size_t(length));
  }
  return {};
}

}  // namespace

Result<FileDescriptor> connect_to_agent(const std::string& socket) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket.size() >= sizeof address.sun_path) return fail(failure(socket, "the path is too long"));
  std::memcpy(address.sun_path, socket.c_str(), socket.size() + 1);
  FileDescriptor fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const auto* generic = reinterpret_cast<const sockaddr*>(&address);
  if (!fd.valid() || ::connect(fd.get(), generic, sizeof address) != 0)
    return fail(failure(socket, std::strerror(errno)));
  // The byte 0xFF ends whatever an earlier client may have begun.
  const std::string id = std::to_string(std::random_device{}() >> 1);
  const std::string line = "\xff{\"execute\":\"guest-sync\",\"arguments\":{\"id\":" + id + "}}\n";
  if (::send(fd.get(), line.data(), line.size(), MSG_NOSIGNAL) != ssize_t(line.size()))
    return fail(failure(socket, std::strerror(errno)));
  if (auto done = wait_for(fd.get(), id, socket); !done) return fail(done.error());
  return fd;
}

}  // namespace blockferry

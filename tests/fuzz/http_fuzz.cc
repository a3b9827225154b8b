// SPDX-License-Identifier: Apache-2.0
// Any bytes on the control socket: the real connection code, Beast's parser and the router, with a plain
// Control behind them. The peer sends its input, ends its side and reads; the connection must end too.
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include <boost/asio/executor_work_guard.hpp>
#include <sys/socket.h>

#include "blockio/base/file_descriptor.h"
#include "daemon/api_session.h"
#include "tests/unit/daemon/fake_control.h"

namespace {

using namespace blockferry;
namespace asio = boost::asio;

struct Server {
  Server() { control.settled = true; }
  FakeControl control;
  std::shared_ptr<ApiShared> shared = std::make_shared<ApiShared>(control);
  asio::executor_work_guard<asio::io_context::executor_type> work = asio::make_work_guard(shared->io);
};

/// Reads what there is, so that long answers do not stand still. Keeps the first bytes of all.
void drain(int fd, std::string& beginning) {
  std::array<char, 65536> buffer;
  for (;;) {
    const ssize_t bytes = ::recv(fd, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (bytes <= 0) return;
    if (beginning.size() < 9)
      beginning.append(buffer.data(), std::min<std::size_t>(static_cast<std::size_t>(bytes), 9));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Server server;
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return 0;
  const FileDescriptor peer(pair[1]);
  // What the socket's buffer does not take at once is left out.
  static_cast<void>(::send(peer.get(), data, size, MSG_DONTWAIT | MSG_NOSIGNAL));
  ::shutdown(peer.get(), SHUT_WR);
  serve_connection(*server.shared,
                   ApiStreamSocket(server.shared->io, asio::generic::stream_protocol(AF_UNIX, 0), pair[0]),
                   ApiSessionKind::control, std::nullopt);
  std::string beginning;
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (server.shared->count(ApiSessionKind::control) > 0) {
    server.shared->io.run_one_for(std::chrono::milliseconds(20));
    drain(peer.get(), beginning);
    if (std::chrono::steady_clock::now() > limit) std::abort();  // a connection that does not end
  }
  drain(peer.get(), beginning);
  if (!beginning.empty() && !beginning.starts_with("HTTP/1.1 ")) std::abort();
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
#include "ctl/client.h"

#include <array>
#include <cerrno>
#include <cstring>

#include <boost/asio/error.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <nlohmann/json.hpp>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "blockio/base/file_descriptor.h"
#include "ctl/interrupt.h"
#include "daemon/messages/messages.h"

namespace blockferry {

namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;

/// What Beast reads from and writes to: a socket with a deadline that also Ctrl-C ends. Asio's own stream
/// would take an event loop and its descriptors for this.
class BoundedSocket {
 public:
  explicit BoundedSocket(FileDescriptor fd) : fd_(std::move(fd)) {}

  void expires_after(Nanoseconds timeout) { deadline_ = system_clock().now() + timeout; }

  template <typename Buffers>
  std::size_t read_some(const Buffers& buffers, error_code& error) {
    for (const auto buffer : beast::buffers_range_ref(buffers)) {
      if (buffer.size() == 0) continue;
      const std::size_t bytes =
          transfer(POLLIN, error, [&](int fd) { return ::recv(fd, buffer.data(), buffer.size(), 0); });
      if (!error && bytes == 0) error = asio::error::eof;
      return bytes;
    }
    return 0;
  }
  template <typename Buffers>
  std::size_t write_some(const Buffers& buffers, error_code& error) {
    std::array<iovec, 16> parts;  // a request's: one system call, and ferryd wakes once
    msghdr message{};
    message.msg_iov = parts.data();
    for (const auto buffer : beast::buffers_range_ref(buffers)) {
      if (buffer.size() == 0 || message.msg_iovlen == parts.size()) continue;
      parts[message.msg_iovlen++] = {const_cast<void*>(buffer.data()), buffer.size()};
    }
    if (message.msg_iovlen == 0) return 0;
    return transfer(POLLOUT, error, [&](int fd) { return ::sendmsg(fd, &message, MSG_NOSIGNAL); });
  }
  // Beast's concept of a stream asks for these two as well.
  template <typename Buffers>
  std::size_t read_some(const Buffers& buffers) {
    error_code error;
    const std::size_t bytes = read_some(buffers, error);
    return error ? throw boost::system::system_error(error) : bytes;
  }
  template <typename Buffers>
  std::size_t write_some(const Buffers& buffers) {
    error_code error;
    const std::size_t bytes = write_some(buffers, error);
    return error ? throw boost::system::system_error(error) : bytes;
  }

 private:
  template <typename Try>
  std::size_t transfer(short events, error_code& error, Try attempt) {
    error = {};
    while (true) {
      const ssize_t bytes = attempt(fd_.get());
      if (bytes >= 0) return std::size_t(bytes);
      if (errno != EAGAIN && errno != EINTR) {
        error = error_code(errno, boost::system::system_category());
        return 0;
      }
      const Waited waited = wait_for(fd_.get(), events, deadline_ - system_clock().now());
      if (waited == Waited::ready) continue;
      error = waited == Waited::timed_out ? asio::error::timed_out : asio::error::interrupted;
      return 0;
    }
  }

  FileDescriptor fd_;
  Nanoseconds deadline_{0};
};

Error unreachable(const std::string& socket, const std::string& why) {
  return make_error(ErrorCode::unreachable, "reach ferryd at", socket, why);
}

Error connect_error(const std::string& socket, int errno_value) {
  Error error = unreachable(
      socket, "is ferryd running? `systemctl start ferryd` starts it; --socket names another socket");
  error.errno_value = errno_value;
  if (errno_value == EACCES || errno_value == EPERM)
    error.hint = "only root and members of the group blockferry may operate ferryd";
  if (errno_value == ETIMEDOUT || errno_value == EAGAIN)
    error.hint = "ferryd takes no more connections; does it hang?";
  return error;
}

Error lost_error(const std::string& socket, const error_code& why, bool changes_something) {
  const std::string doubt =
      changes_something ? "; `ferryctl list` shows whether it was done all the same" : "";
  if (why == asio::error::timed_out)
    return unreachable(socket, "no answer in time; does it hang? Its log may tell" + doubt);
  if (why == asio::error::interrupted) return unreachable(socket, "interrupted before the answer" + doubt);
  if (why == http::error::end_of_stream || why == http::error::partial_message || why == asio::error::eof ||
      why.category() == boost::system::system_category()) {
    return unreachable(socket, "ferryd went away before it answered" + doubt);
  }
  return unreachable(socket, "what answers there is not ferryd (" + why.message() + ")");
}

Result<FileDescriptor> open_socket(const std::string& path, Nanoseconds timeout) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return fail(
        make_error(ErrorCode::invalid_argument, "--socket", path,
                   "a socket's path has 1 to " + std::to_string(sizeof address.sun_path - 1) + " bytes"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  FileDescriptor fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return fail(connect_error(path, errno));
  const Nanoseconds deadline = system_clock().now() + timeout;
  while (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    const int reason = errno;
    // EAGAIN: as many connections wait as may; a UNIX socket cannot be polled for room there.
    if ((reason != EAGAIN && reason != EINTR) || system_clock().now() >= deadline)
      return fail(connect_error(path, reason));
    if (wait_for(-1, 0, std::chrono::milliseconds(20)) == Waited::interrupted)
      return fail(unreachable(path, "interrupted"));
  }
  return fd;
}

}  // namespace

struct Client::Connection {
  explicit Connection(FileDescriptor fd) : socket(std::move(fd)) {}
  BoundedSocket socket;
  beast::flat_buffer buffer;
};

Client::Client(std::string socket_path, const ClientTimeouts& timeouts)
    : socket_path_(std::move(socket_path)), timeouts_(timeouts) {}
Client::~Client() = default;

Result<nlohmann::json> Client::get(const std::string& path) {
  return request("GET", path, nullptr);
}

Result<void> Client::connect() {
  if (connection_) return {};
  auto fd = open_socket(socket_path_, timeouts_.connect);
  if (!fd) return fail(fd.error());
  connection_ = std::make_unique<Connection>(std::move(*fd));
  return {};
}

Result<nlohmann::json> Client::request(const char* method, const std::string& path,
                                       const nlohmann::json& body) {
  http::request<http::string_body> request(http::string_to_verb(method), std::string(api_prefix) + path, 11);
  request.set(http::field::host, "ferryd");
  if (!body.is_null()) {
    request.set(http::field::content_type, "application/json");
    // What is not UTF-8 cannot be said in JSON: options.cc lets none pass.
    request.body() = body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  }
  request.prepare_payload();

  if (auto connected = connect(); !connected) return fail(connected.error());
  Connection& connection = *connection_;
  http::response_parser<http::string_body> parser;
  parser.body_limit(json_bytes_max);
  connection.socket.expires_after(timeouts_.answer);
  error_code write_error, read_error;
  http::write(connection.socket, request, write_error);
  // A refused caller may find the connection closed while still writing: the answer is there all the same.
  http::read(connection.socket, connection.buffer, parser, read_error);
  if (read_error) {
    connection_.reset();
    const bool reads_only = std::strcmp(method, "GET") == 0;
    return fail(lost_error(socket_path_, write_error ? write_error : read_error, !reads_only));
  }
  const auto& response = parser.get();
  const unsigned status = response.result_int();
  if (!response.keep_alive()) connection_.reset();
  auto answer = parse_json(response.body());
  if (!answer) return fail(unreachable(socket_path_, "what answers there is not ferryd (it speaks no JSON)"));
  if (status >= 200 && status < 300) return answer;
  Error failure = error_from_json(*answer);
  if (status == 403) failure.code = ErrorCode::unreachable;
  return fail(failure);
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
#include "daemon/qmp_client.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "daemon/messages/messages.h"

namespace blockferry {

namespace {

using nlohmann::json;

// The longest answers list the block nodes of a guest, a few KiB each.
constexpr std::size_t line_bytes_max = 16 << 20;

// Of a QEMU that has just been waited for in vain no more patience is due, or whoever cleans up would wait
// for each of his commands.
constexpr Nanoseconds silence_remembered = std::chrono::seconds(10);
constexpr Nanoseconds patience_with_silence = std::chrono::milliseconds(200);

/// Milliseconds for poll(); at least one before the time is over.
int milliseconds_until(Nanoseconds deadline) {
  const auto left = deadline - system_clock().now();
  return left.count() <= 0 ? 0 : int(std::chrono::duration_cast<std::chrono::milliseconds>(left).count()) + 1;
}

std::string text_of(const json& object, const char* name) {
  const auto at = object.find(name);
  return at != object.end() && at->is_string() ? at->get<std::string>() : "";
}

}  // namespace

QmpClient::QmpClient(std::string socket, const QmpPatience& patience)
    : socket_(std::move(socket)), patience_(patience) {}

Error QmpClient::failure(ErrorCode code, const std::string& why) const {
  return make_error(code, "talk to QEMU at", socket_, why);
}

Result<json> QmpClient::execute(const std::string& command) {
  return execute(command, json::object());
}

Result<json> QmpClient::execute(const std::string& command, const json& arguments) {
  const std::lock_guard lock(mutex_);
  if (auto done = connect(); !done) return fail(done.error());
  auto answer = talk(command, arguments);
  // Whoever does not answer by the rules is not believed any further.
  if (!answer && answer.error().code != ErrorCode::conflict && answer.error().code != ErrorCode::unsupported)
    fd_.reset();
  return answer;
}

Result<int> QmpClient::descriptor() {
  const std::lock_guard lock(mutex_);
  if (auto done = connect(); !done) return fail(done.error());
  return fd_.get();
}

Result<void> QmpClient::connect() {
  if (fd_.valid()) {
    // Nothing was asked: what there is to read are events, or QEMU's end.
    char byte = 0;
    if (::recv(fd_.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) != 0) return {};
    fd_.reset();
  }
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket_.size() >= sizeof address.sun_path)
    return fail(failure(ErrorCode::invalid_argument, "the path is too long for a socket"));
  std::memcpy(address.sun_path, socket_.c_str(), socket_.size() + 1);
  FileDescriptor fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return fail(error_from_errno(errno, "make a socket for", socket_));
  const auto* generic = reinterpret_cast<const sockaddr*>(&address);
  if (::connect(fd.get(), generic, sizeof address) != 0) {
    const int why = errno;
    if (why == EAGAIN)
      return fail(failure(ErrorCode::busy, "others wait for their turn already: one client at a time"));
    if (why == ENOENT || why == ECONNREFUSED)
      return fail(failure(ErrorCode::not_found, "nobody listens there: is the guest switched off?"));
    return fail(error_from_errno(why, "talk to QEMU at", socket_));
  }
  fd_ = std::move(fd);
  received_.clear();
  searched_ = 0;
  ucred peer{};
  socklen_t length = sizeof peer;
  if (::getsockopt(fd_.get(), SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0) user_ = peer.uid;
  auto done = greet();
  if (!done) fd_.reset();
  return done;
}

Result<void> QmpClient::greet() {
  const Nanoseconds now = system_clock().now();
  const bool silent = silent_since_ && now - *silent_since_ < silence_remembered;
  auto greeting =
      read_object(now + (silent ? std::min(patience_with_silence, patience_.connect) : patience_.connect));
  if (!greeting && greeting.error().code == ErrorCode::busy) {
    return fail(failure(ErrorCode::busy,
                        "QEMU does not greet: another program, as libvirt, uses this socket; give QEMU one "
                        "more (-qmp unix:PATH,server=on,wait=off)"));
  }
  if (!greeting) return fail(greeting.error());
  if (!greeting->contains("QMP")) return fail(failure(ErrorCode::io, "whoever listens there speaks no QMP"));
  auto answer = talk("qmp_capabilities", json::object());
  return answer ? Result<void>() : fail(answer.error());
}

Result<void> QmpClient::send(const std::string& line) {
  const Nanoseconds deadline = system_clock().now() + patience_.answer;
  for (std::size_t sent = 0; sent < line.size();) {
    const ssize_t done = ::send(fd_.get(), line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (done >= 0) {
      sent += std::size_t(done);
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return fail(failure(ErrorCode::device_gone, "QEMU has closed the connection"));
    pollfd event{fd_.get(), POLLOUT, 0};
    if (::poll(&event, 1, milliseconds_until(deadline)) == 0)
      return fail(failure(ErrorCode::io, "QEMU takes no commands: it hangs"));
  }
  return {};
}

/// Without its end. busy: the time is over.
Result<std::string> QmpClient::read_line(Nanoseconds deadline) {
  for (;;) {
    const auto end = received_.find('\n', searched_);
    if (end != std::string::npos) {
      std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      searched_ = 0;
      return line;
    }
    searched_ = received_.size();
    if (received_.size() > line_bytes_max) return fail(failure(ErrorCode::io, "QEMU's answer has no end"));
    char part[16384];
    const ssize_t length = ::recv(fd_.get(), part, sizeof part, 0);
    if (length > 0) {
      received_.append(part, std::size_t(length));
      continue;
    }
    if (length == 0 || (errno != EAGAIN && errno != EINTR))
      return fail(
          failure(ErrorCode::device_gone, "QEMU has closed the connection: was the guest switched off?"));
    pollfd event{fd_.get(), POLLIN, 0};
    if (::poll(&event, 1, milliseconds_until(deadline)) == 0)
      return fail(failure(ErrorCode::busy, "QEMU did not answer in time"));
  }
}

Result<json> QmpClient::read_object(Nanoseconds deadline) {
  for (;;) {
    const auto line = read_line(deadline);
    if (!line) return fail(line.error());
    if (line->find_first_not_of(" \r\t") == std::string::npos) continue;
    auto object = parse_json(*line);
    if (!object || !object->is_object())
      return fail(failure(ErrorCode::io, "QEMU's answer makes no sense: " + line->substr(0, 80)));
    return object;
  }
}

/// Precondition: connected.
Result<json> QmpClient::talk(const std::string& command, const json& arguments) {
  const std::string id = "blockferry-" + std::to_string(++last_id_);
  json request = {{"execute", command}, {"id", id}};
  if (!arguments.empty()) request["arguments"] = arguments;
  const std::string line = request.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
  if (auto done = send(line); !done) return fail(done.error());
  const Nanoseconds deadline = system_clock().now() + patience_.answer;
  for (;;) {
    auto answer = read_object(deadline);
    if (!answer && answer.error().code == ErrorCode::busy) {
      silent_since_ = system_clock().now();
      return fail(failure(ErrorCode::io, "QEMU did not answer to " + command + " in time"));
    }
    if (!answer) return answer;
    silent_since_.reset();
    if (answer->contains("event") || text_of(*answer, "id") != id) continue;
    if (answer->contains("return")) return std::move(answer->at("return"));
    const auto error = answer->find("error");
    if (error == answer->end() || !error->is_object())
      return fail(failure(ErrorCode::io, "QEMU's answer to " + command + " makes no sense"));
    const bool unknown = text_of(*error, "class") == "CommandNotFound";
    return fail(failure(unknown ? ErrorCode::unsupported : ErrorCode::conflict,
                        command + ": " + text_of(*error, "desc")));
  }
}

std::shared_ptr<QmpClient> shared_qmp_client(const std::string& socket) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<QmpClient>> clients;
  const std::lock_guard lock(mutex);
  auto& kept = clients[socket];
  auto client = kept.lock();
  if (client == nullptr) kept = client = std::make_shared<QmpClient>(socket);
  return client;
}

}  // namespace blockferry

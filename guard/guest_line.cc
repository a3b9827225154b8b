// SPDX-License-Identifier: Apache-2.0
#include "guard/guest_line.h"

#include <algorithm>
#include <cerrno>
#include <string_view>
#include <thread>

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace blockferry {

namespace {

constexpr std::size_t seen_bytes_max = 512 * 1024;  // more than a socket's queue holds
constexpr auto look_again = std::chrono::microseconds(300);
constexpr int send_patience_ms = 1000;

/// An id of its own for each command of this process, for answers stay where they are.
std::string next_id() {
  static std::atomic<unsigned> last{0};
  return "\"blockferry-guard-" + std::to_string(::getpid()) + "-" + std::to_string(++last) + "\"";
}

}  // namespace

GuestLine::GuestLine(int fd) : fd_(fd), seen_(seen_bytes_max) {}

/// In one piece, as short as it is.
bool GuestLine::send(const std::string& line) {
  for (;;) {
    if (::send(fd_, line.data(), line.size(), MSG_NOSIGNAL | MSG_DONTWAIT) == ssize_t(line.size()))
      return true;
    pollfd event{fd_, POLLOUT, 0};
    if (errno != EAGAIN || ::poll(&event, 1, send_patience_ms) <= 0) return false;
  }
}

/// Among what waits to be read.
std::optional<std::string> GuestLine::find(const std::string& id) {
  const ssize_t length = ::recv(fd_, seen_.data(), seen_.size(), MSG_PEEK | MSG_DONTWAIT);
  closed_ = length == 0;
  if (length <= 0) return std::nullopt;
  const std::string_view seen(seen_.data(), std::size_t(length));
  const auto at = seen.find(id);
  const auto end = at == std::string_view::npos ? at : seen.find('\n', at);
  if (end == std::string_view::npos) return std::nullopt;
  const auto begin = seen.rfind('\n', at);
  return std::string(begin == std::string_view::npos ? seen.substr(0, end)
                                                     : seen.substr(begin + 1, end - begin - 1));
}

std::optional<std::string> GuestLine::ask(const std::string& members, std::chrono::milliseconds limit,
                                          const std::atomic<bool>& give_up) {
  const std::string id = next_id();
  const auto deadline = std::chrono::steady_clock::now() + limit;
  if (!send("{" + members + ",\"id\":" + id + "}\n")) return std::nullopt;
  for (;;) {
    if (auto answer = find(id)) return answer;
    if (closed_ || give_up || std::chrono::steady_clock::now() >= deadline) return std::nullopt;
    std::this_thread::sleep_for(look_again);
  }
}

std::optional<std::string> GuestLine::ask(const std::string& members, std::chrono::milliseconds limit) {
  const std::atomic<bool> never{false};
  return ask(members, limit, never);
}

/// Neither can stand within a text, where quotes are escaped.
bool GuestLine::succeeded(const std::string& answer) {
  return answer.find("\"return\":") != std::string::npos && answer.find("\"error\":") == std::string::npos;
}

std::string GuestLine::words_of(const std::string& answer) {
  const std::string member = "\"desc\":";
  const auto at = answer.find(member);
  const auto quote = at == std::string::npos ? at : answer.find('"', at + member.size());
  if (quote == std::string::npos) return "";
  std::string words;
  for (auto i = quote + 1; i < answer.size() && answer[i] != '"'; ++i) {
    if (answer[i] == '\\' && i + 1 < answer.size()) ++i;
    words += answer[i];
  }
  return words;
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// What stands in for ferryd: a thread that answers HTTP on a UNIX socket as the test tells it to.
#pragma once

#include <cstring>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "blockio/base/file_descriptor.h"

namespace blockferry {

struct FakeRequest {
  std::string method, target, body;
  std::string line() const { return method + " " + target; }
};

struct FakeAnswer {
  unsigned status = 200;
  nlohmann::json body = nlohmann::json::object();
  std::string raw = {};  ///< sent in place of status and body
  bool drop = false;     ///< ends the connection, after `raw` if there is one
  bool silent = false;   ///< never answers
};

/// One connection at a time, as ferryctl has it.
class FakeFerryd {
 public:
  using Handler = std::function<FakeAnswer(const FakeRequest&)>;

  explicit FakeFerryd(Handler handler) : handler_(std::move(handler)), stop_(::eventfd(0, EFD_CLOEXEC)) {
    std::string name = std::filesystem::temp_directory_path() / "blockferry-ctl-XXXXXX";
    directory_ = ::mkdtemp(name.data());
    listener_ = FileDescriptor(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, socket_path().c_str(), sizeof address.sun_path - 1);
    EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(::listen(listener_.get(), 8), 0);
    thread_ = std::thread([this] { serve(); });
  }
  ~FakeFerryd() {
    const std::uint64_t one = 1;
    EXPECT_EQ(::write(stop_.get(), &one, sizeof one), ssize_t(sizeof one));
    thread_.join();
    std::filesystem::remove_all(directory_);
  }
  FakeFerryd(const FakeFerryd&) = delete;
  FakeFerryd& operator=(const FakeFerryd&) = delete;

  std::string socket_path() const { return directory_ + "/control.sock"; }
  std::vector<FakeRequest> requests() const {
    const std::lock_guard lock(mutex_);
    return requests_;
  }
  std::vector<std::string> lines() const {
    std::vector<std::string> lines;
    for (const auto& request : requests()) lines.push_back(request.line());
    return lines;
  }

 private:
  /// False: the test is over, or has hung.
  bool wait(int fd) {
    constexpr int hung_ms = 60000;
    pollfd entries[] = {{fd, POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    return ::poll(entries, 2, hung_ms) > 0 && entries[1].revents == 0;
  }

  void serve() {
    while (wait(listener_.get())) {
      const FileDescriptor connection(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      std::string received;
      while (serve_request(connection.get(), received)) continue;
    }
  }

  bool receive(int fd, std::string& received) {
    if (!wait(fd)) return false;
    char buffer[65536];
    const ssize_t bytes = ::recv(fd, buffer, sizeof buffer, 0);
    if (bytes > 0) received.append(buffer, std::size_t(bytes));
    return bytes > 0;
  }

  bool serve_request(int fd, std::string& received) {
    std::size_t header_end = 0;
    while ((header_end = received.find("\r\n\r\n")) == std::string::npos)
      if (!receive(fd, received)) return false;
    const std::string header = received.substr(0, header_end);
    std::size_t length = 0;
    if (const auto at = header.find("Content-Length: "); at != std::string::npos)
      length = std::stoul(header.substr(at + 16));
    while (received.size() < header_end + 4 + length)
      if (!receive(fd, received)) return false;
    const auto first_space = header.find(' '), second_space = header.find(' ', first_space + 1);
    const FakeRequest request{header.substr(0, first_space),
                              header.substr(first_space + 1, second_space - first_space - 1),
                              received.substr(header_end + 4, length)};
    received.erase(0, header_end + 4 + length);
    {
      const std::lock_guard lock(mutex_);
      requests_.push_back(request);
    }
    return respond(fd, handler_(request));
  }

  static bool respond(int fd, const FakeAnswer& answer) {
    if (answer.silent) return true;
    const std::string body = answer.body.dump();
    std::string text = answer.raw;
    if (text.empty() && !answer.drop) {
      text = "HTTP/1.1 " + std::to_string(answer.status) +
             " Whatever\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) +
             "\r\n\r\n" + body;
    }
    std::size_t sent = 0;
    while (sent < text.size()) {
      const ssize_t bytes = ::send(fd, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
      if (bytes <= 0) return false;
      sent += std::size_t(bytes);
    }
    return !answer.drop;
  }

  const Handler handler_;
  std::string directory_;
  FileDescriptor listener_, stop_;
  mutable std::mutex mutex_;
  std::vector<FakeRequest> requests_;  // guarded by mutex_
  std::thread thread_;                 // last: starts when all else stands
};

/// A run's object as ferryd answers it, with `changes` applied.
inline nlohmann::json fake_run(const std::string& state, const nlohmann::json& changes = {}) {
  auto run = nlohmann::json::parse(R"({
    "id": "abcd1234", "name": "nightly", "kind": "clone", "mode": "full", "tracker": "checksum",
    "source": {"uri": "/dev/sdb", "bytes": 4294967296, "identity": "loop"},
    "targets": [{"uri": "/dev/sdc", "bytes": 4294967296, "identity": "loop", "error": null}],
    "granule_bytes": 4096, "bytes_total": 4294967296, "bytes_copied": 0, "bytes_zeroed": 0, "bytes_read": 0,
    "passes": [{"kind": "full", "granules": 0, "bytes": 0, "seconds": 0.0}],
    "downtime_ms": null, "throughput_bytes_per_second": null, "eta_seconds": null, "progress": 0.0,
    "activity": null, "verify": {"granules": null, "mismatches": null}, "granules_dirty": null,
    "bad_ranges": [], "restarts": 0, "error": null, "warning": null, "io_in_flight": 0,
    "io_engine": "io_uring", "rate_bytes_per_second": 0, "keep": false,
    "created_at": 1000.0, "started_at": 1000.0, "ended_at": null})");
  run["state"] = state;
  if (!changes.is_null()) run.update(changes);
  return run;
}

/// A run that completed: 4 GiB, 1.2 of it zeroes, in 1.1 s.
inline nlohmann::json fake_completed_run() {
  return fake_run("completed", nlohmann::json::parse(R"({
    "progress": 1.0, "bytes_copied": 4294967296, "bytes_zeroed": 1288490188, "ended_at": 1001.1,
    "passes": [{"kind": "full", "granules": 1048576, "bytes": 4294967296, "seconds": 1.0}],
    "verify": {"granules": 1048576, "mismatches": 0}})"));
}

inline nlohmann::json fake_error(const std::string& code, const std::string& operation,
                                 const std::string& device, const std::string& hint) {
  nlohmann::json error;
  error["code"] = code;
  error["message"] = operation + " " + device + ": " + hint;
  error["operation"] = operation;
  error["device"] = device;
  error["offset"] = nullptr;
  error["errno"] = 0;
  error["hint"] = hint;
  return nlohmann::json::object({{"error", error}});
}

}  // namespace blockferry

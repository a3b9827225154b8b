// SPDX-License-Identifier: Apache-2.0
// An nbdkit of the test's own, on a UNIX socket or on a TCP port of the loopback; it ends with the test.
#pragma once

#include <csignal>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blockio/base/clock.h"
#include "blockio/nbd_device.h"
#include "tests/unit/blockio/volumes.h"

namespace blockferry {

class NbdServer {
 public:
  /// `words`: nbdkit's own, as {"memory", "1M"}. Ready for connections when it returns.
  NbdServer(Scratch& scratch, const std::string& name, std::vector<std::string> words, std::string port = "")
      : socket_(scratch.file(name + ".sock")),
        ready_(scratch.file(name + ".pid")),
        port_(std::move(port)),
        words_(std::move(words)) {
    start();
  }
  ~NbdServer() { stop(); }
  NbdServer(const NbdServer&) = delete;
  NbdServer& operator=(const NbdServer&) = delete;

  void start() {
    ::unlink(socket_.c_str());
    ::unlink(ready_.c_str());
    std::vector<std::string> command = {"nbdkit", "-f", "--exit-with-parent", "-P", ready_};
    const auto where = port_.empty() ? std::vector<std::string>{"-U", socket_}
                                     : std::vector<std::string>{"-i", "127.0.0.1", "-p", port_};
    command.insert(command.end(), where.begin(), where.end());
    command.insert(command.end(), words_.begin(), words_.end());
    std::vector<char*> arguments;
    arguments.reserve(command.size() + 1);
    for (auto& word : command) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    if (::posix_spawnp(&process_, "nbdkit", nullptr, nullptr, arguments.data(), environ) != 0) process_ = -1;
    ASSERT_GT(process_, 0) << "nbdkit cannot be started";
    for (int i = 0; i < 1000 && ::access(ready_.c_str(), F_OK) != 0; ++i)
      system_clock().sleep_for(std::chrono::milliseconds(10));
    ASSERT_EQ(::access(ready_.c_str(), F_OK), 0) << "nbdkit did not become ready";
  }

  void stop() {
    if (process_ <= 0) return;
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
    process_ = -1;
  }

  NbdAddress address() const {
    NbdAddress address;
    address.uri = port_.empty() ? "nbd+unix:///?socket=" + socket_ : "nbd://127.0.0.1:" + port_;
    return address;
  }

 private:
  std::string socket_, ready_, port_;
  std::vector<std::string> words_;
  pid_t process_ = -1;
};

}  // namespace blockferry

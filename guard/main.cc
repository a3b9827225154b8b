// SPDX-License-Identifier: Apache-2.0
// ferryd-guard: see protocol.h. Locked in memory and deaf to signals.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>

#include "guard/guard.h"

namespace blockferry {

namespace {

void harden() {
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGABRT, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2})
    ::signal(signal, SIG_IGN);
  // As far as the process's rights go.
  static_cast<void>(::mlockall(MCL_CURRENT | MCL_FUTURE));
  std::ofstream("/proc/self/oom_score_adj") << -1000;
}

/// Takes its words off `words`. Nothing: they make no hold.
std::unique_ptr<Hold> hold_of(std::vector<std::string>& words) {
  const std::string kind = words.front();
  const auto is = [&](const char* name, std::size_t arguments) {
    return kind == name && words.size() > arguments;
  };
  const auto take = [&](std::size_t arguments, std::unique_ptr<Hold> hold) {
    words.erase(words.begin(), words.begin() + std::ptrdiff_t(1 + arguments));
    return hold;
  };
  if (is("filesystem", 1) || is("fenced-filesystem", 1))
    return take(1, make_filesystem_hold(std::atoi(words[1].c_str()), kind == "fenced-filesystem"));
  if (is("commands", 2)) return take(2, make_command_hold(words[1], words[2]));
  return nullptr;
}

}  // namespace

}  // namespace blockferry

int main(int argc, char** argv) {
  using namespace blockferry;
  if (argc < 2) return 2;
  std::vector<std::string> words(argv + 2, argv + argc);
  std::vector<std::unique_ptr<Hold>> holds;
  while (!words.empty()) {
    auto hold = hold_of(words);
    if (hold == nullptr) return 2;
    holds.push_back(std::move(hold));
  }
  // Not for the user's commands.
  for (int fd = guard_socket_fd; ::fcntl(fd, F_GETFD) >= 0; ++fd) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  harden();
  return Guard(std::move(holds), argv[1], guard_socket_fd, guard_mark_fd).run();
}

// SPDX-License-Identifier: Apache-2.0
// ferryd-guard: see protocol.h, and hardening.h for what keeps it going.
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <fcntl.h>

#include "guard/guard.h"
#include "guard/hardening.h"
#include "guard/qemu_hold.h"
#include "guard/shell_command.h"

namespace blockferry {

namespace {

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
  if (is("map", 3))
    return take(3, make_map_hold(std::atoi(words[1].c_str()), std::strtoull(words[2].c_str(), nullptr, 10),
                                 words[3]));
  if (is("record", 3)) return take(3, make_record_hold(std::atoi(words[1].c_str()), words[2], words[3]));
  if (is("guest", 1) || is("guest-for-good", 1))
    return take(1, make_guest_hold(std::atoi(words[1].c_str()), kind == "guest-for-good"));
  if (is("guest-disk", 3))
    return take(3, make_guest_disk_hold(std::atoi(words[1].c_str()), words[2], words[3]));
  if (is("guest-agent", 1)) return take(1, make_guest_agent_hold(std::atoi(words[1].c_str())));
  if (is("node", 4))
    return take(4, make_node_hold(std::atoi(words[1].c_str()), words[2], words[3], words[4]));
  if (is("commands", 2) || is("commands-of-moved", 2))
    return take(2, make_command_hold(words[1], words[2], kind == "commands-of-moved"));
  return nullptr;
}

}  // namespace

}  // namespace blockferry

int main(int argc, char** argv) {
  using namespace blockferry;
  if (argc < 3) return 2;
  if (argv[1] == std::string(guard_commands_as_units)) run_commands_as_units();
  std::vector<std::string> words(argv + 3, argv + argc);
  std::vector<std::unique_ptr<Hold>> holds;
  while (!words.empty()) {
    auto hold = hold_of(words);
    if (hold == nullptr) return 2;
    holds.push_back(std::move(hold));
  }
  // Not for the user's commands.
  for (int fd = guard_socket_fd; ::fcntl(fd, F_GETFD) >= 0; ++fd) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  harden();
  return Guard(std::move(holds), argv[2], guard_socket_fd, guard_mark_fd).run();
}

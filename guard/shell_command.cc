// SPDX-License-Identifier: Apache-2.0
#include "guard/shell_command.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string_view>
#include <thread>

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "blockio/base/file_descriptor.h"

extern char** environ;

namespace blockferry {

namespace {

constexpr std::size_t said_bytes_max = 250;

/// The beginning and the end, on one line: some programs say first what was wrong, and others last.
std::string one_line_of(int output) {
  const off_t end = ::lseek(output, 0, SEEK_END);
  std::string said(std::size_t(std::min<off_t>(end, off_t(said_bytes_max))), '\0');
  const auto read_at = [&](off_t offset, std::size_t from) {
    const ssize_t length = ::pread(output, said.data() + from, said.size() - from, offset);
    said.resize(from + std::size_t(std::max<ssize_t>(length, 0)));
  };
  read_at(0, 0);
  if (end > off_t(said_bytes_max)) {
    const std::string_view gap = " ... ";
    const std::size_t half = said_bytes_max / 2;
    said.replace(half, gap.size(), gap);
    read_at(end - off_t(said_bytes_max - half - gap.size()), half + gap.size());
  }
  while (!said.empty() && std::isspace(static_cast<unsigned char>(said.back())) != 0) said.pop_back();
  std::replace_if(
      said.begin(), said.end(), [](char each) { return std::iscntrl(static_cast<unsigned char>(each)) != 0; },
      ' ');
  return said;
}

int spawn_shell(const std::string& command_line, int output, pid_t& process) {
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files, output, 1);
  posix_spawn_file_actions_adddup2(&files, output, 2);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  const char* const arguments[] = {"sh", "-c", command_line.c_str(), nullptr};
  const int error =
      ::posix_spawn(&process, "/bin/sh", &files, &attributes, const_cast<char* const*>(arguments), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  return error;
}

/// Our own score is not for the user's commands.
void make_killable(pid_t process) {
  std::ofstream("/proc/" + std::to_string(process) + "/oom_score_adj") << 0;
}

std::string how_it_ended(int status, bool killed) {
  if (killed) return "did not end within --max-freeze and was killed";
  if (WIFSIGNALED(status)) return "was ended by signal " + std::to_string(WTERMSIG(status));
  return "ended with status " + std::to_string(WEXITSTATUS(status));
}

}  // namespace

CommandOutcome run_shell_command(const std::string& command_line, std::chrono::milliseconds limit,
                                 const std::atomic<bool>& give_up) {
  const FileDescriptor output(::memfd_create("output", MFD_CLOEXEC));
  pid_t process = 0;
  if (const int error = spawn_shell(command_line, output.get(), process); error != 0)
    return {false, std::string("cannot be started: ") + std::strerror(error)};
  make_killable(process);
  const auto deadline = std::chrono::steady_clock::now() + limit;
  int status = 0;
  bool killed = false;
  while (::waitpid(process, &status, killed ? 0 : WNOHANG) == 0) {
    if (give_up || std::chrono::steady_clock::now() >= deadline) {
      ::kill(-process, SIGKILL);
      killed = true;
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  if (!killed && WIFEXITED(status) && WEXITSTATUS(status) == 0) return {true, ""};
  const std::string said = one_line_of(output.get());
  return {false, how_it_ended(status, killed) + (said.empty() ? "" : ": " + said)};
}

}  // namespace blockferry

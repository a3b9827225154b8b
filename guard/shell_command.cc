// SPDX-License-Identifier: Apache-2.0
#include "guard/shell_command.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string_view>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"

extern char** environ;

namespace blockferry {

namespace {

constexpr std::size_t said_bytes_max = 250;
constexpr int lock_fd = 3;

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

bool as_units = false;

std::vector<std::string> shell_words(const std::string& command_line) {
  return {"/bin/sh", "-c", command_line};
}

/// systemd replaces variables of its own accord, and the shell is to do that.
std::string without_variables(const std::string& command_line) {
  std::string plain;
  for (const char letter : command_line) plain += letter == '$' ? "$$" : std::string(1, letter);
  return plain;
}

std::vector<std::string> unit_words(const std::string& unit, const std::string& command_line,
                                    std::chrono::milliseconds limit) {
  // The time is kept here; should nobody be here any more, systemd keeps it.
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(limit).count() + 2;
  std::vector<std::string> words{"systemd-run",
                                 "--quiet",
                                 "--wait",
                                 "--pipe",
                                 "--collect",
                                 "--service-type=exec",
                                 "--unit=" + unit,
                                 "--description=A command of Blockferry's",
                                 "--property=KillMode=process",  // what it leaves running goes on
                                 "--property=RuntimeMaxSec=" + std::to_string(seconds)};
  for (char** variable = environ; *variable != nullptr; ++variable) {  // the others are ferryd's own
    if (std::string_view(*variable).starts_with("BLOCKFERRY_"))
      words.push_back(std::string("--setenv=") + *variable);
  }
  words.emplace_back("--");
  const auto shell = shell_words(without_variables(command_line));
  words.insert(words.end(), shell.begin(), shell.end());
  return words;
}

/// In a process group of its own. `lock`: -1 for none.
int spawn(std::vector<std::string> words, int output, int lock, pid_t& process) {
  std::vector<char*> arguments;
  arguments.reserve(words.size() + 1);
  for (auto& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files, output, 1);
  posix_spawn_file_actions_adddup2(&files, output, 2);
  if (lock >= 0) posix_spawn_file_actions_adddup2(&files, lock, lock_fd);
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
  const int error =
      ::posix_spawnp(&process, arguments.front(), &files, &attributes, arguments.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  return error;
}

/// Of what is killed.
void wait_for(pid_t process, std::chrono::milliseconds patience) {
  for (auto left = patience; left.count() > 0 && ::waitpid(process, nullptr, WNOHANG) == 0; --left)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

/// Who asked for the unit first, so that it is not begun after it was killed.
void kill_all(pid_t process, const std::string& unit) {
  ::kill(-process, SIGKILL);
  if (unit.empty()) return;
  const FileDescriptor output(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  pid_t killer = 0;
  if (spawn({"systemctl", "kill", "--signal=KILL", unit + ".service"}, output.get(), -1, killer) != 0) return;
  wait_for(killer, std::chrono::seconds(1));
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

void run_commands_as_units() {
  as_units = true;
}

namespace {

/// `unit`: of which it is the command; empty: it is a child of ours.
CommandOutcome run_command(const std::string& command_line, const std::string& unit, int lock,
                           std::chrono::milliseconds limit, const std::atomic<bool>& give_up) {
  const FileDescriptor output(::memfd_create("output", MFD_CLOEXEC));
  pid_t process = 0;
  const auto words = unit.empty() ? shell_words(command_line) : unit_words(unit, command_line, limit);
  if (const int error = spawn(words, output.get(), lock, process); error != 0)
    return {false, std::string("cannot be started: ") + std::strerror(error)};
  make_killable(process);
  const auto deadline = std::chrono::steady_clock::now() + limit;
  int status = 0;
  bool killed = false;
  while (::waitpid(process, &status, killed ? 0 : WNOHANG) == 0) {
    if (give_up || std::chrono::steady_clock::now() >= deadline) {
      kill_all(process, unit);
      killed = true;
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  if (!killed && WIFEXITED(status) && WEXITSTATUS(status) == 0) return {true, ""};
  const std::string said = one_line_of(output.get());
  return {false, how_it_ended(status, killed) + (said.empty() ? "" : ": " + said)};
}

}  // namespace

CommandOutcome run_shell_command(const std::string& command_line, std::chrono::milliseconds limit,
                                 const std::atomic<bool>& give_up) {
  static std::atomic<unsigned> commands{0};
  const std::string unit =
      as_units ? "ferryd-command-" + std::to_string(::getpid()) + "-" + std::to_string(++commands) : "";
  return run_command(command_line, unit, -1, limit, give_up);
}

/// LVM's programs close descriptors that they do not know. So the shell keeps it, and does not become the
/// last command.
CommandOutcome run_own_command(const std::string& command_line, std::chrono::milliseconds limit,
                               const std::atomic<bool>& give_up, int lock) {
  return run_command(command_line + "\nexit $?", "", lock, limit, give_up);
}

}  // namespace blockferry

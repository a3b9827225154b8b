// SPDX-License-Identifier: Apache-2.0
#include "daemon/guard_process.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

extern char** environ;

namespace blockferry {

namespace {

/// It lies beside this program.
std::string guard_path() {
  char path[PATH_MAX];
  const ssize_t length = ::readlink("/proc/self/exe", path, sizeof path);
  const std::string self(path, length > 0 ? std::size_t(length) : 0);
  return self.substr(0, self.rfind('/') + 1) + "ferryd-guard";
}

/// Puts `descriptors` at guard_socket_fd and up. Twice, so that none is overwritten before it has been
/// copied.
void pass_on(posix_spawn_file_actions_t& files, const std::vector<int>& descriptors) {
  const int beyond = 1 + *std::max_element(descriptors.begin(), descriptors.end());
  const int base = std::max(beyond, guard_socket_fd + int(descriptors.size()));
  for (int i = 0; i < int(descriptors.size()); ++i)
    posix_spawn_file_actions_adddup2(&files, descriptors[std::size_t(i)], base + i);
  for (int i = 0; i < int(descriptors.size()); ++i)
    posix_spawn_file_actions_adddup2(&files, base + i, guard_socket_fd + i);
  posix_spawn_file_actions_addclosefrom_np(&files, guard_socket_fd + int(descriptors.size()));
  for (const int standard : {0, 1, 2})  // the log may be frozen
    posix_spawn_file_actions_addopen(&files, standard, "/dev/null", O_RDWR, 0);
}

/// Whether systemd started this very process as a service: then it is confined as its unit says.
bool is_unit() {
  const char* const started = std::getenv("SYSTEMD_EXEC_PID");
  return started != nullptr && started == std::to_string(::getpid()) && ::sd_booted() > 0;
}

std::vector<char*> pointers(std::vector<std::string>& words) {
  std::vector<char*> list;
  list.reserve(words.size() + 1);
  for (auto& word : words) list.push_back(word.data());
  list.push_back(nullptr);
  return list;
}

}  // namespace

GuardProcess::~GuardProcess() {
  socket_.reset();
  if (process_ != 0) ::waitpid(process_, nullptr, 0);
}

Result<void> GuardProcess::start(const GuardOptions& options) {
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
    return fail(error_from_errno(errno, "make a socket for", "the guard"));
  socket_ = FileDescriptor(pair[0]);
  const FileDescriptor theirs(pair[1]);
  std::vector<int> descriptors{theirs.get(), options.mark};
  std::vector<std::string> arguments{
      "ferryd-guard", is_unit() ? guard_commands_as_units : guard_commands_as_children, options.cutover_cmd};
  for (const auto& hold : options.holds) {
    arguments.push_back(hold.kind);
    for (const int descriptor : hold.descriptors) {
      arguments.push_back(std::to_string(guard_socket_fd + int(descriptors.size())));
      descriptors.push_back(descriptor);
    }
    arguments.insert(arguments.end(), hold.words.begin(), hold.words.end());
  }
  std::vector<std::string> variables = options.environment;
  for (char** variable = environ; *variable != nullptr; ++variable) variables.emplace_back(*variable);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  pass_on(files, descriptors);
  const std::string path = guard_path();
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);  // what stops ferryd's terminal does not stop it
  const int error = ::posix_spawn(&process_, path.c_str(), &files, &attributes, pointers(arguments).data(),
                                  pointers(variables).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  if (error == 0) return {};
  process_ = 0;
  return fail(error_from_errno(error, "start", path));
}

/// One that does not answer must not go on: it might still hand over what its caller gives up.
void GuardProcess::kill() {
  socket_.reset();
  if (process_ == 0) return;
  ::kill(process_, SIGKILL);
  constexpr Nanoseconds moment = std::chrono::milliseconds(1), patience = std::chrono::seconds(5);
  for (Nanoseconds waited{0}; waited < patience && ::waitpid(process_, nullptr, WNOHANG) == 0;
       waited += moment)
    system_clock().sleep_for(moment);
  process_ = 0;
}

Result<GuardAnswer> GuardProcess::ask(GuardRequest request, Nanoseconds patience) {
  auto answer = answer_to(request, patience);
  if (!answer) kill();
  return answer;
}

Result<GuardAnswer> GuardProcess::answer_to(GuardRequest request, Nanoseconds patience) {
  const auto gone = [] {
    return fail(make_error(ErrorCode::internal, "talk to", "the guard", "it has ended, or does not answer"));
  };
  if (::send(socket_.get(), &request, sizeof request, MSG_NOSIGNAL) != ssize_t(sizeof request)) return gone();
  GuardAnswer answer{};
  pollfd event{socket_.get(), POLLIN, 0};
  const auto milliseconds = std::chrono::duration_cast<std::chrono::milliseconds>(patience).count();
  if (::poll(&event, 1, int(milliseconds)) <= 0) return gone();
  if (::recv(socket_.get(), &answer, sizeof answer, 0) != ssize_t(sizeof answer)) return gone();
  answer.detail[sizeof answer.detail - 1] = '\0';
  return answer;
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// ferryd-guard: see protocol.h. Locked in memory and deaf to signals, it touches no file while something is
// quiesced.
//
// Threads: this one answers, watches the limit and the socket; the worker does what may block (freezing waits
// for the filesystem's writes, commands take their time).
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "guard/protocol.h"
#include "guard/shell_command.h"

namespace blockferry {

namespace {

// Of ext4 and xfs alike (xfs calls it GOINGDOWN): the filesystem takes no more writes, and its log stays as
// it is.
constexpr unsigned long shut_down_filesystem = _IOR('X', 125, std::uint32_t);
constexpr std::uint32_t without_log_flush = 2;
constexpr auto resume_limit = std::chrono::seconds(30);

std::int64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

class Guard {
 public:
  Guard(std::vector<int> filesystems, const char* const* commands)
      : filesystems_(std::move(filesystems)),
        frozen_(filesystems_.size()),
        quiesce_cmd_(commands[0]),
        resume_cmd_(commands[1]),
        cutover_cmd_(commands[2]),
        fence_(*commands[3] != '\0') {}

  int run();

 private:
  void start(void (Guard::*job)());
  bool wait_for_worker();
  void freeze();
  bool freeze_one(std::size_t index);
  void quiesce();
  void hand_over();
  bool fence();
  void let_go();
  void answer(GuardAnswer::Kind kind);
  void fail(GuardAnswer::Step step, int errno_value, std::size_t filesystem = 0,
            const std::string& detail = "");
  std::chrono::milliseconds time_left() const {
    return std::chrono::milliseconds(std::max<std::int64_t>(0, (deadline_ns_ - now_ns()) / 1'000'000));
  }

  const std::vector<int> filesystems_;
  std::mutex mutex_;
  std::vector<bool> frozen_;          // guarded by mutex_
  bool quiesced_ = false;             // guarded by mutex_: the quiesce command was begun
  std::atomic<bool> let_go_ = false;  // set with mutex_ held: nothing is frozen any more from then on
  bool committed_ = false;            // guarded by mutex_: handed over, too late to let go without it

  const std::string quiesce_cmd_, resume_cmd_, cutover_cmd_;
  const bool fence_;
  std::int64_t deadline_ns_ = 0;
  bool expired_ = false;
  GuardAnswer answer_{};  ///< the worker's, read when it has ended
  bool failed_ = false;
  const int worker_done_ = ::eventfd(0, EFD_CLOEXEC);
  std::thread worker_;
};

void Guard::start(void (Guard::*job)()) {
  worker_ = std::thread([this, job] {
    (this->*job)();
    ::eventfd_write(worker_done_, 1);
  });
}

/// Watches meanwhile. False: ferryd is gone.
bool Guard::wait_for_worker() {
  bool alive = true;
  for (;;) {
    pollfd events[2] = {{worker_done_, POLLIN, 0}, {guard_socket_fd, short(alive ? POLLRDHUP : 0), 0}};
    ::poll(events, alive ? 2 : 1, let_go_ ? -1 : int(time_left().count()) + 1);
    if (events[0].revents != 0) break;
    if (alive && events[1].revents != 0) {
      alive = false;
      let_go();
    }
    if (!let_go_ && now_ns() >= deadline_ns_) {
      expired_ = true;
      let_go();
    }
  }
  eventfd_t count = 0;
  ::eventfd_read(worker_done_, &count);
  if (worker_.joinable()) worker_.join();
  return alive;
}

void Guard::fail(GuardAnswer::Step step, int errno_value, std::size_t filesystem, const std::string& detail) {
  failed_ = true;
  answer_.step = step;
  answer_.errno_value = errno_value;
  answer_.filesystem = std::uint32_t(filesystem);
  std::strncpy(answer_.detail, detail.c_str(), sizeof answer_.detail - 1);
}

/// Whether the next one may be frozen.
bool Guard::freeze_one(std::size_t index) {
  if (let_go_) return false;
  if (::ioctl(filesystems_[index], FIFREEZE, 0) != 0) {
    fail(GuardAnswer::freezing, errno, index);
    return false;
  }
  const std::lock_guard lock(mutex_);
  frozen_[index] = !let_go_;
  if (let_go_) ::ioctl(filesystems_[index], FITHAW, 0);  // it took longer than there was time
  return !let_go_;
}

void Guard::freeze() {
  answer_.at_ns = now_ns();
  if (!quiesce_cmd_.empty()) return quiesce();
  for (std::size_t i = 0; i < filesystems_.size(); ++i) {
    if (!freeze_one(i)) return;
  }
}

void Guard::quiesce() {
  {
    const std::lock_guard lock(mutex_);
    if (let_go_) return;
    quiesced_ = true;
  }
  const auto outcome = run_shell_command(quiesce_cmd_, time_left(), let_go_);
  if (!outcome.succeeded) fail(GuardAnswer::quiesce_command, 0, 0, outcome.detail);
}

/// After the mark there is no way back: whoever takes the run up again finds it.
void Guard::hand_over() {
  const std::int64_t begun = now_ns();
  if (!cutover_cmd_.empty()) {
    const auto outcome = run_shell_command(cutover_cmd_, time_left(), let_go_);
    if (!outcome.succeeded) return fail(GuardAnswer::cutover_command, 0, 0, outcome.detail);
  }
  answer_.command_ns = now_ns() - begun;
  const std::lock_guard lock(mutex_);
  if (let_go_) return;
  if (::mkdirat(guard_mark_fd, guard_mark, 0700) != 0) return fail(GuardAnswer::marking, errno);
  if (!fence()) {
    ::unlinkat(guard_mark_fd, guard_mark, AT_REMOVEDIR);
    return;
  }
  committed_ = true;
}

/// Writers that wait must not write to the old disk once it is released: they get errors instead (attack H).
bool Guard::fence() {
  for (std::size_t i = 0; fence_ && i < filesystems_.size(); ++i) {
    std::uint32_t how = without_log_flush;
    if (::ioctl(filesystems_[i], shut_down_filesystem, &how) == 0) continue;
    fail(GuardAnswer::fencing, errno, i);
    return false;
  }
  return true;
}

/// Once. A volume that was quiesced by command and handed over stays quiesced.
void Guard::let_go() {
  bool resume = false;
  {
    const std::lock_guard lock(mutex_);
    if (let_go_) return;
    let_go_ = true;
    for (std::size_t i = 0; i < filesystems_.size(); ++i) {
      if (frozen_[i]) ::ioctl(filesystems_[i], FITHAW, 0);
    }
    resume = quiesced_ && !committed_;
  }
  if (!resume) return;
  if (worker_.joinable()) worker_.join();  // a command of ours is being killed
  const std::atomic<bool> never{false};
  if (!resume_cmd_.empty()) run_shell_command(resume_cmd_, resume_limit, never);
}

void Guard::answer(GuardAnswer::Kind kind) {
  answer_.kind = kind;
  if (kind != GuardAnswer::frozen) answer_.at_ns = now_ns();
  ::send(guard_socket_fd, &answer_, sizeof answer_, MSG_NOSIGNAL);
}

int Guard::run() {
  GuardRequest request{};
  if (::recv(guard_socket_fd, &request, sizeof request, 0) != ssize_t(sizeof request)) return 0;
  deadline_ns_ = now_ns() + std::int64_t(request.limit_ms) * 1'000'000;
  start(&Guard::freeze);
  const bool alive = wait_for_worker();
  if (!alive || failed_ || let_go_) {
    let_go();
    if (alive) answer(failed_ ? GuardAnswer::failed : GuardAnswer::expired);
    return 0;
  }
  answer(GuardAnswer::frozen);
  pollfd event{guard_socket_fd, POLLIN | POLLRDHUP, 0};
  if (::poll(&event, 1, int(time_left().count()) + 1) <= 0) {
    expired_ = true;
    let_go();
  }
  if (::recv(guard_socket_fd, &request, sizeof request, 0) != ssize_t(sizeof request)) {
    let_go();
    return 0;
  }
  if (!let_go_ && request.kind == GuardRequest::hand_over) {
    start(&Guard::hand_over);
    wait_for_worker();
  }
  let_go();
  const bool granted = request.kind == GuardRequest::hand_over ? committed_ : !expired_;
  answer(granted ? GuardAnswer::released : failed_ && !expired_ ? GuardAnswer::failed : GuardAnswer::expired);
  return 0;
}

void harden() {
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGABRT, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2})
    ::signal(signal, SIG_IGN);
  // As far as the process's rights go.
  static_cast<void>(::mlockall(MCL_CURRENT | MCL_FUTURE));
  std::ofstream("/proc/self/oom_score_adj") << -1000;
}

}  // namespace

}  // namespace blockferry

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  std::vector<int> filesystems;
  for (int fd = blockferry::guard_socket_fd; ::fcntl(fd, F_GETFD) >= 0; ++fd) {
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);  // not for the user's commands
    if (fd >= blockferry::guard_filesystems_fd) filesystems.push_back(fd);
  }
  blockferry::harden();
  return blockferry::Guard(std::move(filesystems), argv + 1).run();
}

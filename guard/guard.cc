// SPDX-License-Identifier: Apache-2.0
#include "guard/guard.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "guard/shell_command.h"

namespace blockferry {

namespace {

std::int64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

Guard::Guard(std::vector<std::unique_ptr<Hold>> holds, std::string cutover_cmd, int socket, int mark)
    : holds_(std::move(holds)),
      cutover_cmd_(std::move(cutover_cmd)),
      socket_(socket),
      mark_(mark),
      taken_(holds_.size(), Taken::no),
      worker_done_(::eventfd(0, EFD_CLOEXEC)) {}

std::chrono::milliseconds Guard::time_left() const {
  return std::chrono::milliseconds(std::max<std::int64_t>(0, (deadline_ns_ - now_ns()) / 1'000'000));
}

void Guard::start(void (Guard::*job)()) {
  worker_ = std::thread([this, job] {
    (this->*job)();
    ::eventfd_write(worker_done_, 1);
  });
}

void Guard::end_worker() {
  if (!worker_.joinable()) return;
  eventfd_t count = 0;
  ::eventfd_read(worker_done_, &count);
  worker_.join();
}

void Guard::end_worker_until_deadline() {
  pollfd event{worker_done_, POLLIN, 0};
  if (worker_.joinable() && ::poll(&event, 1, int(time_left().count())) > 0) end_worker();
}

/// Watches meanwhile. False: ferryd is gone.
bool Guard::wait_for_worker() {
  bool alive = true;
  while (worker_.joinable()) {
    pollfd events[2] = {{worker_done_, POLLIN, 0}, {socket_, short(alive ? POLLRDHUP : 0), 0}};
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
  end_worker();
  return alive;
}

void Guard::fail(GuardAnswer::Step step, const HoldFailure& failure, std::size_t hold) {
  failed_ = true;
  answer_.step = step;
  answer_.errno_value = failure.errno_value;
  answer_.hold = std::uint32_t(hold);
  std::strncpy(answer_.detail, failure.detail.c_str(), sizeof answer_.detail - 1);
}

void Guard::take_holds() {
  answer_.at_ns = now_ns();
  for (std::size_t i = 0; i < holds_.size(); ++i) {
    if (!take(i)) return;
  }
}

/// Whether the next one may be taken. let_go() passes over the one under way: it is released here.
bool Guard::take(std::size_t index) {
  {
    const std::lock_guard lock(mutex_);
    if (let_go_) return false;
    taken_[index] = Taken::under_way;
  }
  const auto failure = holds_[index]->take(time_left(), let_go_);
  const std::lock_guard lock(mutex_);
  taken_[index] = Taken::yes;
  if (failure) fail(GuardAnswer::quiescing, *failure, index);
  if (let_go_ && !holds_[index]->released_by_command()) {  // it took longer than there was time
    holds_[index]->release(false);
    taken_[index] = Taken::no;
  }
  return !failure && !let_go_;
}

/// After the mark there is no way back: whoever takes the run up again finds it.
void Guard::hand_over() {
  const std::int64_t begun = now_ns();
  if (!cutover_cmd_.empty()) {
    const auto outcome = run_shell_command(cutover_cmd_, time_left(), let_go_);
    if (!outcome.succeeded)
      return fail(GuardAnswer::cutover_command, {0, "the --cutover-cmd " + outcome.detail});
  }
  for (std::size_t i = 0; i < holds_.size(); ++i) {
    if (const auto failure = holds_[i]->prepare_hand_over(time_left(), let_go_))
      return fail(GuardAnswer::handing_over, *failure, i);
  }
  answer_.command_ns = now_ns() - begun;
  const std::lock_guard lock(mutex_);
  if (let_go_) return;
  if (::mkdirat(mark_, guard_mark, 0700) != 0) return fail(GuardAnswer::marking, {errno, ""});
  committed_ = hand_holds_over();
  if (!committed_) ::unlinkat(mark_, guard_mark, AT_REMOVEDIR);
}

bool Guard::hand_holds_over() {
  for (std::size_t i = 0; i < holds_.size(); ++i) {
    const auto failure = holds_[i]->hand_over();
    if (!failure) continue;
    fail(GuardAnswer::handing_over, *failure, i);
    while (i-- > 0) holds_[i]->take_back();
    return false;
  }
  return true;
}

void Guard::undo_preparation() {
  for (std::size_t i = holds_.size(); i-- > 0;) holds_[i]->undo_preparation();
}

/// Precondition: let_go_, so that no more are taken. The last one taken goes first.
void Guard::release(bool by_command) {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = holds_.size(); i-- > 0;) {
    if (taken_[i] != Taken::yes || holds_[i]->released_by_command() != by_command) continue;
    holds_[i]->release(committed_);
    taken_[i] = Taken::no;
  }
}

/// Before the release, but never beyond the deadline.
void Guard::undo_in_time() {
  end_worker_until_deadline();  // a command of ours is being killed
  if (worker_.joinable() || time_left().count() == 0) return;
  start(&Guard::undo_preparation);
  end_worker_until_deadline();
}

/// Once.
void Guard::let_go() {
  bool committed = false;
  {
    const std::lock_guard lock(mutex_);
    if (let_go_) return;
    let_go_ = true;
    committed = committed_;
  }
  if (handing_over_ && !committed &&
      std::any_of(holds_.begin(), holds_.end(), [](const auto& hold) { return hold->undoes_preparation(); }))
    undo_in_time();
  release(false);
  const bool commands =
      std::any_of(holds_.begin(), holds_.end(), [](const auto& hold) { return hold->released_by_command(); });
  if (!commands) return;
  end_worker();
  release(true);
}

void Guard::answer(GuardAnswer::Kind kind) {
  answer_.kind = kind;
  if (kind != GuardAnswer::quiesced) answer_.at_ns = now_ns();
  ::send(socket_, &answer_, sizeof answer_, MSG_NOSIGNAL);
}

int Guard::run() {
  GuardRequest request{};
  if (::recv(socket_, &request, sizeof request, 0) != ssize_t(sizeof request)) return 0;
  deadline_ns_ = now_ns() + std::int64_t(request.limit_ms) * 1'000'000;
  start(&Guard::take_holds);
  const bool alive = wait_for_worker();
  if (!alive || failed_ || let_go_) {
    let_go();
    if (alive) answer(failed_ ? GuardAnswer::failed : GuardAnswer::expired);
    return 0;
  }
  answer(GuardAnswer::quiesced);
  pollfd event{socket_, POLLIN | POLLRDHUP, 0};
  if (::poll(&event, 1, int(time_left().count()) + 1) <= 0) {
    expired_ = true;
    let_go();
  }
  if (::recv(socket_, &request, sizeof request, 0) != ssize_t(sizeof request)) {
    let_go();
    return 0;
  }
  if (!let_go_ && request.kind == GuardRequest::hand_over) {
    handing_over_ = true;
    start(&Guard::hand_over);
    wait_for_worker();
  }
  let_go();
  const bool granted = request.kind == GuardRequest::hand_over ? committed_ : !expired_;
  answer(granted ? GuardAnswer::released : failed_ && !expired_ ? GuardAnswer::failed : GuardAnswer::expired);
  return 0;
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
#include "ctl/interrupt.h"

#include <algorithm>
#include <cerrno>

#include <poll.h>

namespace blockferry {

namespace {

volatile sig_atomic_t interrupt_seen = 0;
sigset_t waiting_mask;  ///< of wait_for() while `guarded`
bool guarded = false;

timespec timespec_of(Nanoseconds duration) {
  const auto nanoseconds = std::max<std::int64_t>(duration.count(), 0);
  return {time_t(nanoseconds / 1'000'000'000), long(nanoseconds % 1'000'000'000)};
}

sigset_t interrupt_alone() {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

InterruptGuard::InterruptGuard() {
  interrupt_seen = 0;
  ::sigaction(SIGINT, nullptr, &action_before_);
  active_ = action_before_.sa_handler != SIG_IGN;
  if (!active_) return;
  struct sigaction action {};
  action.sa_handler = [](int) { interrupt_seen = 1; };
  ::sigaction(SIGINT, &action, nullptr);
  // Blocked outside of ppoll(): a signal between a look at the flag and the wait would be slept over.
  const sigset_t interrupt = interrupt_alone();
  ::sigprocmask(SIG_BLOCK, &interrupt, &mask_before_);
  waiting_mask = mask_before_;
  guarded = true;
}

InterruptGuard::~InterruptGuard() {
  interrupt_seen = 0;
  if (!active_) return;
  guarded = false;
  // Let through now, it would end the process before its output is written.
  const sigset_t interrupt = interrupt_alone();
  const timespec at_once{};
  while (::sigtimedwait(&interrupt, nullptr, &at_once) < 0 && errno == EINTR) continue;
  ::sigaction(SIGINT, &action_before_, nullptr);
  ::sigprocmask(SIG_SETMASK, &mask_before_, nullptr);
}

bool interrupted() {
  if (interrupt_seen != 0 || !guarded) return interrupt_seen != 0;
  sigset_t held_back;
  ::sigemptyset(&held_back);
  ::sigpending(&held_back);
  return ::sigismember(&held_back, SIGINT) == 1;
}

Waited wait_for(int fd, short events, Nanoseconds timeout) {
  const Nanoseconds until = system_clock().now() + timeout;
  while (true) {
    if (interrupted()) return Waited::interrupted;
    pollfd entry{fd, events, 0};
    const timespec left = timespec_of(until - system_clock().now());
    const int ready = ::ppoll(&entry, 1, &left, guarded ? &waiting_mask : nullptr);
    if (ready > 0) return Waited::ready;
    // Other signals (a resized terminal, a stop and its end) only begin the wait anew.
    if (ready == 0) return interrupted() ? Waited::interrupted : Waited::timed_out;
    if (errno != EINTR) return Waited::ready;  // the caller's next read or write names what is wrong
  }
}

}  // namespace blockferry

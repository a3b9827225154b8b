// SPDX-License-Identifier: Apache-2.0
// Ctrl-C while ferryctl waits: noticed at once and never lost, so that the user can be told what becomes of
// the run.
#pragma once

#include <cstdint>

#include <signal.h>

#include "blockio/base/clock.h"

namespace blockferry {

/// While one lives, SIGINT does not end the process: it is held back but for the time spent in wait_for(),
/// and remembered. One that nobody asked about is gone with the guard: what it was to end is over. A SIGINT
/// that was ignored before stays ignored. One guard at a time; for one thread.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  bool active_ = false;  ///< false: SIGINT is ignored anyway
  struct sigaction action_before_ {};
  sigset_t mask_before_{};
};

/// Whether Ctrl-C was pressed while the present guard lived.
bool interrupted();

enum class Waited : std::uint8_t { ready, timed_out, interrupted };

/// Until `fd` is ready for `events` (POLLIN, POLLOUT). A negative `fd` is never ready: plain sleep.
Waited wait_for(int fd, short events, Nanoseconds timeout);

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// Time is injected, so that the simulator decides it.
#pragma once

#include <chrono>

namespace blockferry {

using Nanoseconds = std::chrono::nanoseconds;

class Clock {
 public:
  virtual ~Clock() = default;
  /// Monotonic, from an arbitrary start.
  virtual Nanoseconds now() const = 0;
  /// Seconds since 1970, for people and records only; never for measuring.
  virtual double wall_seconds() const = 0;
  /// The only way the engine and runs ever sleep.
  virtual void sleep_for(Nanoseconds duration) = 0;
};

/// CLOCK_MONOTONIC and CLOCK_REALTIME. Thread-safe.
Clock& system_clock();

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// A steady rate and an honest ETA from a stream of totals.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "blockio/base/clock.h"

namespace blockferry {

/// Exponentially weighted: what happened `time_constant` ago counts 1/e. Until that long has passed, the
/// plain mean.
class ProgressMeter {
 public:
  void restart(Nanoseconds now, std::uint64_t bytes_done) {
    started_ = updated_ = now;
    bytes_at_start_ = bytes_at_update_ = bytes_done;
    rate_ = 0;
  }

  void update(Nanoseconds now, std::uint64_t bytes_done) {
    const double seconds = seconds_between(updated_, now);
    if (seconds < 0.1) return;
    const double recent = double(bytes_done - bytes_at_update_) / seconds;
    const double since_start = seconds_between(started_, now);
    const double weight = 1 - std::exp(-seconds / std::min(time_constant_seconds, since_start));
    rate_ = since_start <= seconds ? recent : rate_ + weight * (recent - rate_);
    updated_ = now;
    bytes_at_update_ = bytes_done;
  }

  double bytes_per_second() const { return rate_; }
  std::optional<double> eta_seconds(std::uint64_t bytes_left) const {
    if (rate_ <= 0) return std::nullopt;
    return double(bytes_left) / rate_;
  }
  /// Over the whole time since restart().
  double mean(Nanoseconds now, std::uint64_t bytes_done) const {
    const double seconds = seconds_between(started_, now);
    return seconds > 0 ? double(bytes_done - bytes_at_start_) / seconds : 0;
  }

 private:
  static constexpr double time_constant_seconds = 8;
  static double seconds_between(Nanoseconds from, Nanoseconds to) {
    return std::chrono::duration<double>(to - from).count();
  }

  Nanoseconds started_{0}, updated_{0};
  std::uint64_t bytes_at_start_ = 0, bytes_at_update_ = 0;
  double rate_ = 0;
};

/// A token bucket that may go into debt, so that an I/O larger than a moment's allowance still passes.
class RateLimiter {
 public:
  void set_rate(std::uint64_t bytes_per_second, Nanoseconds now) {
    rate_ = bytes_per_second;
    tokens_ = 0;
    refilled_ = now;
  }
  bool may_start(Nanoseconds now) {
    if (rate_ == 0) return true;
    const double seconds = std::chrono::duration<double>(now - refilled_).count();
    tokens_ = std::min(tokens_ + seconds * double(rate_), double(rate_) * burst_seconds);
    refilled_ = now;
    return tokens_ >= 0;
  }
  void spend(std::uint64_t bytes) {
    if (rate_ != 0) tokens_ -= double(bytes);
  }

 private:
  static constexpr double burst_seconds = 0.05;
  std::uint64_t rate_ = 0;  ///< 0: no limit
  double tokens_ = 0;
  Nanoseconds refilled_{0};
};

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// What a run's progress looks like: functions from the run's object to text.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "blockio/base/clock.h"

namespace blockferry {

struct ProgressStyle {
  std::size_t columns = 80;
  bool unicode = true;
};

/// For a terminal. On a wide one a single line, else two: the bar with percent and time left, below it what
/// happens. No line is wider than the terminal: the least important parts are left out.
std::vector<std::string> progress_lines(const nlohmann::json& run, std::optional<double> eta_seconds,
                                        const ProgressStyle& style);

/// For logs: the same in one plain line, whole.
std::string progress_text(const nlohmann::json& run, std::optional<double> eta_seconds);

/// "copied 4.0 GiB (1.2 GiB of zeroes) in 1.1s, 3.6 GiB/s; verified, no mismatch"
std::string summary_line(const nlohmann::json& run);
/// "the source paused for 42ms: freeze 30ms, …"; empty where nothing was quiesced.
std::string pause_line(const nlohmann::json& run);
/// "tracker ebpf, pass 7; written at 50.0 MiB/s; …", and the last pause below; empty where no source is live.
std::string live_line(const nlohmann::json& run);
/// As summary_line(), of `verify`, which took `seconds`.
std::string verify_summary_line(const nlohmann::json& run, double seconds);

/// "about 2 min": coarser the farther away it is. Empty where the time means nothing.
std::string eta_text(double seconds);

/// ferryd's estimates, calmed down for the eye: wait for a second one, follow them slowly, and do not step
/// back and forth between two neighbouring times.
class SteadyEta {
 public:
  /// What to show now. `eta_seconds` is ferryd's present estimate; nothing: there is none.
  std::optional<double> update(Nanoseconds now, std::optional<double> eta_seconds);

 private:
  std::optional<double> calmed(double seconds_left);

  bool known_ = false;
  Nanoseconds first_{0}, last_{0}, disagrees_since_{0};
  double end_seconds_ = 0;  ///< when it will be over, by the clock of `now`
  std::optional<double> shown_;
};

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// What a run publishes of itself: state, rate, estimate, stalls.
#include <algorithm>

#include "daemon/run_core.h"

namespace blockferry {

namespace {

double seconds(Nanoseconds duration) {
  return std::chrono::duration<double>(duration).count();
}

constexpr std::uint64_t in_flight_bytes_quick = 8 * MiB, in_flight_bytes_slow = 16 * MiB;

/// Of the requests that ended between the two; 0 where none did.
double mean_latency_seconds(const CopyEngineStats& from, const CopyEngineStats& to) {
  const std::uint64_t count = to.reads.count() + to.writes.count() - from.reads.count() - from.writes.count();
  const double sum =
      to.reads.seconds_sum + to.writes.seconds_sum - from.reads.seconds_sum - from.writes.seconds_sum;
  return count > 0 ? sum / double(count) : 0;
}

}  // namespace

std::uint64_t RunCore::work_left() const {
  const auto& geometry = volume_->geometry();
  const auto& status = record_.status;
  const std::uint64_t verify_all =
      status.request.verify
          ? geometry.bytes * std::uint64_t(std::count_if(status.targets.begin(), status.targets.end(),
                                                         [](const auto& target) { return !target.error; }))
          : 0;
  std::uint64_t in_flight = 0;
  for (const auto& range : engine_->ranges_in_flight()) in_flight += range.bytes;
  const std::uint64_t dirty = std::min(volume_->dirty().count() * geometry.granule_bytes, geometry.bytes);
  switch (record_.phase) {
    case RunPhase::collecting:
      return geometry.bytes - std::min(geometry.bytes, scan_->collected() * geometry.granule_bytes) + dirty +
             verify_all;
    case RunPhase::copying:
      return dirty + in_flight + verify_all;
    case RunPhase::verifying: {
      std::uint64_t left = 0;
      for (std::size_t i = record_.verify_target + 1; i < status.targets.size(); ++i)
        left += status.targets[i].error ? 0 : geometry.bytes;
      return left + in_flight + geometry.bytes -
             std::min(geometry.bytes, verify_next_ * geometry.granule_bytes);
    }
  }
  return 0;
}

void RunCore::update_status() {
  RunStatus& status = record_.status;
  if (volume_ == nullptr || engine_ == nullptr || finished_) return;
  const CopyEngineStats& stats = engine_->stats();
  status.bytes_read += stats.bytes_read - stats_seen_.bytes_read;
  if (limits_.metrics != nullptr) limits_.metrics->add_io(stats_seen_, stats);
  adapt_depth(stats);
  stats_seen_ = stats;
  status.granules_dirty = volume_->dirty().count();
  status.io_in_flight = unsigned(engine_->jobs_in_flight());
  if (record_.paused) {
    status.state = RunState::paused;
    status.activity = engine_->jobs_in_flight() > 0 ? "pausing" : "paused";
  } else {
    const bool tracking =
        live_.passes > 0 && (waits_for_user() || !live_.waits_for.empty()) && !record_.cut_over;
    status.state = cutover_.stage != CutoverStage::none                   ? RunState::cutting_over
                   : record_.phase == RunPhase::verifying                 ? RunState::verifying
                   : live() && tracking && !run_state_ended(status.state) ? RunState::tracking
                                                                          : RunState::copying;
    status.activity = live_.resting                            ? "tracking"
                      : quiesced()                             ? "cutting over"
                      : ending_ != Ending::none || phase_done_ ? "flushing"
                      : record_.phase == RunPhase::collecting  ? "comparing"
                      : record_.phase == RunPhase::copying     ? "copying"
                                                               : "verifying";
    if (!status.passes.empty() && record_.phase != RunPhase::verifying) {
      current_pass().seconds += seconds(clock_.now() - pass_clock_);
    }
  }
  pass_clock_ = status_updated_ = clock_.now();
  update_estimate();
  watch_for_stalls();
}

/// Devices that answer quickly are copied faster through the processor's cache than past it; those that take
/// their time need more of it under way. `stats`: since stats_seen_.
void RunCore::adapt_depth(const CopyEngineStats& stats) {
  const auto& request = record_.status.request;
  if (request.queue_depth != 0 || request.io_size_bytes != 0) {
    in_flight_bytes_max_ = UINT64_MAX;  // as the user chose
    return;
  }
  if (in_flight_bytes_best_ != 0) {
    in_flight_bytes_max_ = in_flight_bytes_best_;
    return;
  }
  constexpr double slow_seconds = 0.004, quick_seconds = 0.002;
  const double mean = mean_latency_seconds(stats_seen_, stats);
  if (mean > slow_seconds) in_flight_bytes_max_ = in_flight_bytes_slow;
  if (mean < quick_seconds) in_flight_bytes_max_ = in_flight_bytes_quick;
}

void RunCore::update_estimate() {
  RunStatus& status = record_.status;
  const std::uint64_t left = work_left();
  const double all = double(work_done_) + double(left);
  status.progress = all > 0 ? double(work_done_) / all : 1;
  if (record_.paused) status.throughput_bytes_per_second = 0;
  if (record_.paused || live_.resting) {  // until the user decides
    status.eta_seconds.reset();
    return;
  }
  meter_.update(clock_.now(), work_done_);
  if (meter_.bytes_per_second() <= 0) {
    const double mean = meter_.mean(clock_.now(), work_done_);
    if (mean > 0) status.throughput_bytes_per_second = std::uint64_t(mean);
    return;
  }
  status.throughput_bytes_per_second = std::uint64_t(meter_.bytes_per_second());
  status.eta_seconds = meter_.eta_seconds(left);
}

void RunCore::watch_for_stalls() {
  RunStatus& status = record_.status;
  status.warning = live_.note;
  if (!live_.waits_for.empty()) status.warning = "ready; it is cut over together with run " + live_.waits_for;
  status.cutover_error = live_.cutover_refused;
  const auto oldest = engine_->oldest_request();
  if (!oldest || oldest->age < limits_.stall_warning) return;
  static constexpr const char* names[] = {"read", "write", "zero", "flush"};
  status.warning = "no answer from " + oldest->device->info().uri + " for " +
                   std::to_string(std::int64_t(seconds(oldest->age))) + " s (" +
                   names[std::size_t(oldest->operation)] + " at offset " + std::to_string(oldest->offset) +
                   ")";
}

}  // namespace blockferry

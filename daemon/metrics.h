// SPDX-License-Identifier: Apache-2.0
// Prometheus metrics. Counters live as long as the process, whatever becomes of the runs; gauges are read off
// the runs when scraped. Thread-safe.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "blockio/copy_engine.h"
#include "daemon/run_status.h"

namespace blockferry {

class Metrics {
 public:
  Metrics();
  ~Metrics();

  /// Adds what happened between two readings of one engine's totals.
  void add_io(const CopyEngineStats& before, const CopyEngineStats& now);
  void add_verified(std::uint64_t bytes, std::uint64_t mismatches);
  void add_tracker_losses(std::uint64_t count);
  void add_audit_misses(std::uint64_t granules);
  void add_pass(PassKind kind);
  void add_checkpoint(double seconds);
  void add_run_ended(RunState state);
  void add_error(ErrorCode code);

  /// The text format, with gauges for these runs: runs by state, dirty granules, I/O in flight, progress.
  /// `can_track_live`: of this machine.
  std::string text(const std::vector<RunStatus>& runs, bool can_track_live) const;

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// Where trackers of live sources are, and how a run finds its own again: in the kernel (tracker_pins.h), or
// in QEMU (qemu_sources.h).
#pragma once

#include <memory>
#include <optional>

#include "bitmap/live_tracker.h"
#include "daemon/run_record.h"

namespace blockferry {

class Trackers {
 public:
  virtual ~Trackers() = default;
  /// A new one; an earlier one of this run is removed.
  virtual Result<std::unique_ptr<LiveTracker>> attach(const RunRecord& record) = 0;
  /// What another process left; state_damaged: it does not vouch for anything.
  virtual Result<std::unique_ptr<LiveTracker>> adopt(const RunRecord& record) = 0;
  virtual void remove(const RunRecord& record) = 0;
  /// Whether the run's volume was handed over. Nothing: what would tell is gone.
  virtual std::optional<bool> handed_over(const RunRecord& record) = 0;
};

}  // namespace blockferry

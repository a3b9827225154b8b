// SPDX-License-Identifier: Apache-2.0
// How a run that swaps a device-mapper volume (swap_plan.h) reads and writes: past the volume's own map,
// through two maps of ferryd's own over the same disks. So the last pass reads while the volume is suspended,
// and the target is held by the kernel for device-mapper, which a table that is loaded over it passes.
#pragma once

#include <optional>
#include <string>

#include "blockio/base/file_descriptor.h"
#include "daemon/run_record.h"
#include "daemon/tracker_pins.h"

namespace blockferry {

class SwapDevices {
 public:
  /// Precondition: record.swap. Nobody uses the paths any more when this goes.
  SwapDevices(const TrackerPins& pins, const RunRecord& record);
  ~SwapDevices();
  SwapDevices(const SwapDevices&) = delete;
  SwapDevices& operator=(const SwapDevices&) = delete;

  /// Once more after each swap: what was the source is the target then.
  Result<void> open(const RunRecord& record);
  const std::string& source() const { return source_; }
  const std::string& target() const { return target_; }

 private:
  const std::string old_name_, new_name_;
  std::string source_, target_;
  FileDescriptor target_volume_;  ///< so that LVM does not remove it
};

/// As RunEnvironment has them.
Result<void> settle_swap(const RunRecord& record);
std::optional<bool> swap_came_to_pass(const TrackerPins& pins, const RunRecord& record);

}  // namespace blockferry

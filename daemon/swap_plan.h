// SPDX-License-Identifier: Apache-2.0
// Swapping a device-mapper volume onto another disk while it is in use: where it lies, where it is to lie,
// and what must be true for that.
//
// Numbers of devices change with a reboot, and a table with a wrong one would be the end of somebody's data:
// so disks are written down by their identities, and looked up anew each time.
#pragma once

#include <string>
#include <vector>

#include <sys/types.h>

#include "blockio/base/error.h"
#include "daemon/device_mapper.h"

namespace blockferry {

/// Consecutive sectors of a disk that a volume takes up.
struct DiskStretch {
  std::string identity;  ///< of the disk, as block_identity() tells it
  std::string number;    ///< "8:16" when it was written down: which of several of the same identity
  std::uint64_t offset_sectors = 0;
  std::uint64_t sectors = 0;
  bool operator==(const DiskStretch&) const = default;
};
/// A volume's stretches in its own order.
using Place = std::vector<DiskStretch>;

struct SwapPlan {
  Place old_place, new_place;
  /// Of a multipath map, with "@" for its one path; empty: the map is linear.
  std::string multipath;
  /// Both of one LVM group: the logical volumes exchange their extents. Empty: the volume is not LVM's.
  std::string group, volume, target_volume;
  bool lvm() const { return !group.empty(); }
};

/// unsupported, with the reason as hint: the volume cannot be swapped onto this target.
Result<SwapPlan> plan_swap(dev_t source, dev_t target);

/// The table of the volume's own map when it lies there. device_gone: a disk is not there any more.
Result<MapTable> volume_table(const SwapPlan& plan, const Place& place);
/// For maps of ferryd's own, past the volume's.
Result<MapTable> linear_table(const Place& place);
/// Whether the map now lies there.
Result<bool> lies_on(dev_t map, const SwapPlan& plan, const Place& place);

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// What sysfs knows of a block device: which disk it belongs to, what names it over restarts, whether it was
// written.
#pragma once

#include <optional>
#include <string>

#include <sys/types.h>

namespace blockferry {

/// The whole disk's device number: of itself, or of the disk that a partition lies on.
dev_t whole_disk_of(dev_t device);

/// Names the same volume over restarts of ferryd, and over reboots where the device has a name of its own
/// (WWID, serial, device-mapper UUID, partition UUID); a loop device is named by its backing file.
std::string block_identity(dev_t device, const std::string& path);

/// A text that changes with every write to the whole disk: boot, disk sequence number and write counters.
/// Nothing where the disk does not count.
std::optional<std::string> block_change_stamp(dev_t device);

/// One line of a sysfs or procfs file, without its line break; empty where there is none.
std::string read_line(const std::string& path);

}  // namespace blockferry

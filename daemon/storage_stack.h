// SPDX-License-Identifier: Apache-2.0
// What a volume stands on and what stands on it, from sysfs and procfs: partitions, holders, loop devices,
// mounts in every mount namespace, swap, programs that have it open for writing. Reads only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <sys/types.h>

namespace blockferry {

/// A block device by its number, or a regular file by its device and inode.
struct VolumeNode {
  bool block = false;
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const VolumeNode&) const = default;
};

/// The node behind a path (symlinks followed); nothing where there is no such file.
bool node_of_path(const std::string& path, VolumeNode& node);

/// "/dev/sda" for a block device.
std::string device_path(dev_t device);

/// All that it stands on, itself first: the disk of a partition, slaves of device-mapper and md, a loop
/// device's file, and the filesystem's device below a file.
std::vector<VolumeNode> nodes_below(const VolumeNode& node);

/// Whether one of the two stands on the other, or they are the same.
bool same_storage(const VolumeNode& one, const VolumeNode& other);

/// Partitions of a disk.
std::vector<dev_t> partitions_of(dev_t disk);

/// Whether a device is a partition, and of which disk.
bool is_partition(dev_t device);

/// What uses a volume. The lists hold text for people.
struct VolumeUse {
  std::vector<std::string> mounts;   ///< mount points
  std::vector<std::string> holders;  ///< "dm-0 (vg-root)", "loop3", "swap"
  std::vector<std::string> writers;  ///< "process 123 (qemu)": open for writing
  bool any() const { return !mounts.empty() || !holders.empty() || !writers.empty(); }
  /// "mounted on /srv", "held by dm-0", …: the first and weightiest.
  std::string reason() const;
};

/// Of the node itself; for a disk its partitions' too. `with_writers` looks through /proc, which takes some
/// ms.
VolumeUse use_of(const VolumeNode& node, bool with_writers);

}  // namespace blockferry

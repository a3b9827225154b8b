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

/// A stretch of a node that a volume above it takes up, in bytes. `exact`: all of it (partitions and loop
/// devices say where they lie); otherwise somewhere within (a file in its filesystem, a device-mapper table).
struct StorageExtent {
  VolumeNode node;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  bool exact = true;
  bool operator==(const StorageExtent&) const = default;
};

/// All that it stands on, itself first: the disk of a partition, slaves of device-mapper and md, a loop
/// device's file, and the filesystem's device below a file.
std::vector<StorageExtent> extents_below(const VolumeNode& node);
std::vector<VolumeNode> nodes_below(const VolumeNode& node);

/// Whether the two share bytes: the same, one standing on the other, or both on the same stretch of a third
/// (two loop devices on one file). Two partitions of a disk, two logical volumes of a group and two files of
/// a filesystem share none.
bool same_storage(const VolumeNode& one, const VolumeNode& other);

/// Itself, its partitions, and all that stands on these: device-mapper and md devices.
std::vector<dev_t> devices_above(dev_t device);

/// Partitions of a disk.
std::vector<dev_t> partitions_of(dev_t disk);

bool is_partition(dev_t device);

/// Whether a filesystem on it may map its memory: what is written there is no write to the device.
bool may_use_dax(dev_t device);

/// mountinfo and fstab write spaces and the like as "\\040".
std::string unescape_octal(const std::string& text);

/// What uses a volume. The lists hold text for people.
struct VolumeUse {
  std::vector<std::string> mounts;   ///< mount points
  std::vector<std::string> holders;  ///< "dm-0 (vg-root)", "loop3", "swap"
  std::vector<std::string> writers;  ///< "process 123 (qemu)": open for writing
  std::vector<std::string> readers;  ///< "loop4", read-only: changes nothing, but would see a target change
  bool may_be_written() const { return !mounts.empty() || !holders.empty() || !writers.empty(); }
  bool any() const { return may_be_written() || !readers.empty(); }
  /// "mounted on /srv", "held by dm-0", …: the first and weightiest.
  std::string reason() const;
};

/// Of the node itself, of a disk's partitions, of what lies wholly below it (the disk of a partition, the
/// file of a loop device), and of loop devices that share its bytes. `with_writers` looks through every
/// process's descriptors, which takes some ms. What cannot be looked at (a process that ends meanwhile) is
/// passed over.
VolumeUse use_of(const VolumeNode& node, bool with_writers);

/// With writers, but for those that are gone a moment later: they were only passing, as losetup is, which
/// tries one device after another.
VolumeUse settled_use_of(const VolumeNode& node);

/// Of what lies below the volume's disk, by others: they write to the volume's bytes past it, where no
/// tracker of the disk sees them.
VolumeUse use_below(const VolumeNode& node);

/// Somebody holds it in a way that leaves no trace in sysfs or procfs (a mount namespace that no process
/// lives in, a program that opened it exclusively, a target exported by the kernel). Opening says so and
/// changes nothing. Our own descriptors are closed by the kernel a little after we have let go of them: hence
/// some tries.
bool held_exclusively(const std::string& path);

}  // namespace blockferry

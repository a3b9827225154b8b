// SPDX-License-Identifier: Apache-2.0
// What sysfs knows of a block device: which disk it belongs to, what names it over restarts, whether it was
// written; and whether a file was.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include <sys/stat.h>
#include <sys/types.h>

namespace blockferry {

/// The whole disk's device number: of itself, or of the disk that a partition lies on.
dev_t whole_disk_of(dev_t device);

/// "/dev/sda": where devtmpfs has the device's node.
std::string device_node(dev_t device);

/// Names the same volume over restarts of ferryd, by whatever path it is reached:
///   disk:NAME[-partN]         WWID, serial, device-mapper or md UUID: over reboots too
///   loop:DEV:INODE:START+LIMIT[-partN]  the backing file, attached to whichever loop device
///   boot:BOOT:diskseq:N[-partN]         a disk without a name: another one may stand in its place after a
///                                       reboot, so then it is not recognised
std::string block_identity(dev_t device, const std::string& path);

/// Writes, sectors written, discards, sectors discarded since the kernel found the device.
using WriteCounters = std::array<std::uint64_t, 4>;

/// Of a partition: of itself, and of the whole disk's own node, by which it can be reached too; not of the
/// other partitions. Nothing where the kernel does not say.
std::optional<WriteCounters> write_counters(dev_t device);

/// A text that changes with every write to the volume: boot, disk sequence number and write counters, and of
/// a loop device its backing file's stamp. Nothing where the disk does not count, and for a partition of a
/// loop device: a write to its neighbour changes the file too. `fd` is the open device.
std::optional<std::string> block_change_stamp(dev_t device, int fd);

/// A text that changes with every write to the file: "file:DEV:INODE:SIZE:CHANGED". May sleep for a tick of
/// the kernel's clock. Nothing for a file that is being written this instant.
std::optional<std::string> file_change_stamp(const std::string& path);

std::string file_identity(const struct stat& status);  ///< "file:DEV:INODE"

/// One line of a sysfs or procfs file, without its line break; empty where there is none.
std::string read_line(const std::string& path);

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// Filesystems that are mounted from given devices, in every mount namespace, by libmount.
#pragma once

#include <string>
#include <vector>

#include <sys/types.h>

namespace blockferry {

struct Mount {
  std::string point;     ///< as people of its namespace see it
  std::string reach;     ///< a path to it from our own: /proc/PID/root/…
  std::string type;      ///< "ext4"
  std::string options;   ///< of the filesystem and the mount, comma-separated
  dev_t superblock = 0;  ///< the same for all mounts of one filesystem
  int id = 0;            ///< the kernel's number of the mount
};

/// The device numbers of all members of btrfs filesystems that `device` is a member of, itself included.
std::vector<dev_t> btrfs_members(dev_t device);

/// All mounts from these devices, and from btrfs filesystems that have members among them. A mount that
/// several namespaces share stands here once.
std::vector<Mount> mounts_of(const std::vector<dev_t>& devices);

}  // namespace blockferry

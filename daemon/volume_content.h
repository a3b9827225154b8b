// SPDX-License-Identifier: Apache-2.0
// What lies on a volume, by libblkid: filesystem, RAID or LVM signature, partition table. Reads only.
#pragma once

#include <string>

namespace blockferry {

struct VolumeContent {
  std::string type;  ///< "ext4", "LVM2_member", "gpt", …; empty: none known
  bool partition_table = false;
  std::string uuid, label;  ///< of the filesystem
  std::string table_uuid;   ///< of the partition table
};

/// An empty one also where the volume cannot be read: preflight tries reading by itself.
VolumeContent content_of(const std::string& path);

}  // namespace blockferry

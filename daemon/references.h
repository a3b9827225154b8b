// SPDX-License-Identifier: Apache-2.0
// What refers to the old disk by name, and will go on doing so after a move.
#pragma once

#include <string>
#include <vector>

#include "daemon/preflight.h"
#include "daemon/storage_stack.h"

namespace blockferry {

/// fstab and crypttab lines, LVM, multipath, /dev/disk links, and identifiers that the clone doubles. Of the
/// volume and, for a disk, of its partitions. `root` stands before /etc and /dev/disk: other than "" in tests
/// only.
std::vector<PreflightFinding> references_to(const std::string& path, const VolumeNode& node,
                                            const std::string& root = "");

}  // namespace blockferry

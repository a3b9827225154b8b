// SPDX-License-Identifier: Apache-2.0
// A block device that is still because every filesystem on it is frozen, or because the user's commands have
// stopped who writes there.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/messages/messages.h"
#include "daemon/mounts.h"
#include "daemon/quiesced_volume.h"
#include "daemon/storage_stack.h"

namespace blockferry {

struct FreezeOptions {
  bool by_command = false;  ///< the quiesce command sees to the filesystems
  bool fence = false;       ///< migrate: when it is handed over, they are shut down
};
FreezeOptions freeze_options_for(const RunRequest& request);

/// Why writes of this filesystem's would not be seen; empty: they are.
std::string unseen_writes_of(const Mount& mount);

/// An active swap file; empty: none. They go on being written on a frozen filesystem (attack I).
std::string swap_file_on(const std::vector<Mount>& mounts);

/// What stands against quiescing this volume, now; empty: nothing. One line, what and what to do.
std::string quiescing_refused(const std::string& path, const VolumeNode& source,
                              const FreezeOptions& options);

/// refused: see above.
Result<std::unique_ptr<QuiescedVolume>> open_quiesced_filesystems(const std::string& path,
                                                                  const FreezeOptions& options);

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// A disk of a QEMU guest, held still by stopping the guest; and, handed over, replaced by the target while it
// is stopped.
#pragma once

#include <memory>
#include <string>

#include "daemon/qemu_disk.h"
#include "daemon/quiesced_volume.h"

namespace blockferry {

struct GuestOptions {
  bool by_command = false;  ///< the user's commands stop the writers; the guest itself is left alone
  std::string target;       ///< handed over, the guest's disk is this from then on; empty: it is not
  bool stays = false;       ///< handed over, the guest stays stopped
};

/// What stands against it, in words for the user; empty: nothing.
Result<std::string> quiescing_guest_refused(QmpClient& client, const QemuNode& node,
                                            const GuestOptions& options);

Result<std::unique_ptr<QuiescedVolume>> open_quiesced_guest(std::shared_ptr<QemuDisk> disk,
                                                            const GuestOptions& options);

}  // namespace blockferry

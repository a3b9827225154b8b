// SPDX-License-Identifier: Apache-2.0
// How a volume would be handed over: a swap of its map where that serves, since nothing that uses the volume
// notices.
#pragma once

#include <optional>
#include <string>

#include "daemon/messages/messages.h"
#include "daemon/storage_stack.h"
#include "daemon/swap_plan.h"

namespace blockferry {

struct Handover {
  std::string how;  ///< "dm-swap", "fs" or "cmd"
  std::optional<SwapPlan> swap;
  std::string refused;  ///< it was asked for, and cannot be; one line
  std::string warning;  ///< what the user should know; may be empty
};

/// As `migrate` would have it with this request, also where it is a clone's.
Handover choose_handover(const RunRequest& request, const VolumeNode& source);

}  // namespace blockferry

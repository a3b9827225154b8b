// SPDX-License-Identifier: Apache-2.0
// A device-mapper volume that is still because its map is suspended, which freezes what is mounted from it,
// whatever lies between. Handed over, it is resumed on another disk (swap_plan.h).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "daemon/quiesced_volume.h"
#include "daemon/storage_stack.h"
#include "daemon/swap_plan.h"

namespace blockferry {

/// What stands against suspending this volume, now; empty: nothing. One line, what and what to do.
std::string suspending_refused(const VolumeNode& volume);

/// `back`: from the new disk to the old one. `key`: of the run.
Result<std::unique_ptr<QuiescedVolume>> open_quiesced_map(const std::string& path, const SwapPlan& plan,
                                                          bool back, const std::string& key);

/// After a process and its guard were killed: waits until a guard that lives (`guarded`) has done with the
/// map. Whether it is suspended, and nobody will resume it any more.
bool is_left_suspended(dev_t map, const std::function<bool()>& guarded, Nanoseconds limit);
/// With the table that it had.
Result<void> resume_left_suspended(dev_t map);

}  // namespace blockferry

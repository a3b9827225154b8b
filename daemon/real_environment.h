// SPDX-License-Identifier: Apache-2.0
// The world as the daemon gives it to a run: real devices, the real clock, threads.
#pragma once

#include <memory>
#include <vector>

#include "blockio/io_queue.h"
#include "daemon/cutover_group.h"
#include "daemon/qemu_sources.h"
#include "daemon/run_environment.h"
#include "daemon/tracker_pins.h"

namespace blockferry {

/// Where live sources are tracked and held.
struct LiveSources {
  TrackerPins& pins;
  QemuSources& qemu;
};

/// `state`, `buffers` and `sources` outlive the environment. `engine` is what ferryd was told; a run's own
/// choice goes before it. `after_restart`: an earlier process may still hold the devices for a while.
/// `group`: of volumes that are cut over together; null for one alone.
std::unique_ptr<RunEnvironment> make_real_environment(StateDirectory& state, BufferPool& buffers,
                                                      LiveSources sources, IoEngine engine,
                                                      bool after_restart,
                                                      std::shared_ptr<CutoverGroup> group);

/// For volumes that are cut over together: the records of all their runs, in their order.
std::shared_ptr<CutoverGroup> make_cutover_group(LiveSources sources, const std::vector<RunRecord>& members);

}  // namespace blockferry

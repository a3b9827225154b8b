// SPDX-License-Identifier: Apache-2.0
// The world as the daemon gives it to a run: real devices, the real clock, threads.
#pragma once

#include <memory>

#include "blockio/io_queue.h"
#include "daemon/run_environment.h"
#include "daemon/tracker_pins.h"

namespace blockferry {

/// `state`, `buffers` and `pins` outlive the environment. `engine` is what ferryd was told; a run's own
/// choice goes before it. `after_restart`: an earlier process may still hold the devices for a while.
std::unique_ptr<RunEnvironment> make_real_environment(StateDirectory& state, BufferPool& buffers,
                                                      TrackerPins& pins, IoEngine engine, bool after_restart);

}  // namespace blockferry

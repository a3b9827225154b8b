// SPDX-License-Identifier: Apache-2.0
// Holds of a QEMU guest. `qmp` is a connection to QEMU that ferryd has opened, and that it has agreed on
// capabilities over; it reads nothing from it while it asks the guard for something.
#pragma once

#include <memory>
#include <string>

#include "guard/hold.h"

namespace blockferry {

/// Stops the guest, if it runs, and starts it again: what somebody else has stopped stays so. Handed over, it
/// goes on, too, unless it `stays`.
std::unique_ptr<Hold> make_guest_hold(int qmp, bool stays);

/// Handing over gives one of the guest's devices another disk, by the members of a QMP command: `"execute":…,
/// "arguments":…`. `back` undoes it.
std::unique_ptr<Hold> make_guest_disk_hold(int qmp, std::string there, std::string back);

/// Handing over gives whoever uses a block node another one, by the members of a QMP command that begins this
/// `job`, a mirror without content. `back` undoes it.
std::unique_ptr<Hold> make_node_hold(int qmp, std::string there, std::string back, std::string job);

/// Freezes the guest's filesystems by its agent, over a connection to that.
std::unique_ptr<Hold> make_guest_agent_hold(int agent);

}  // namespace blockferry

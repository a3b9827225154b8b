// SPDX-License-Identifier: Apache-2.0
// What ferryd and its service manager say to each other: socket activation, readiness, watchdog.
#pragma once

#include <string>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"

namespace blockferry {

/// The control socket that systemd opened for us, or -1. More than one is refused.
Result<int> activated_socket();

void notify_ready();
void notify_stopping();
void notify_alive();

/// How often notify_alive is expected; 0: never.
Nanoseconds watchdog_interval();

}  // namespace blockferry

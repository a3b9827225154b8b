// SPDX-License-Identifier: Apache-2.0
// What each verb does: asks ferryd, and prints. The exit status is the contract's.
#pragma once

#include <string>
#include <vector>

#include "blockio/base/error.h"
#include "ctl/follow.h"
#include "ctl/options.h"

namespace blockferry {

constexpr int interrupted_status = 130;  ///< as shells have it for Ctrl-C; the run goes on

/// ferryctl, whole. 0 done; 1 the run failed, was cancelled or rolled back; 2 usage; 3 ferryd cannot be
/// reached or refused the caller; 4 preflight refused; 130 left by Ctrl-C while the run goes on.
int run_ferryctl(const std::vector<std::string>& arguments, const FollowPatience& patience = {});

/// One line (or, with `json`, one object) on stderr, and the exit status that goes with it.
int report_error(const Error& error, bool json);

}  // namespace blockferry

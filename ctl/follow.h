// SPDX-License-Identifier: Apache-2.0
// Following a run until it ends.
#pragma once

#include <cstdint>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "ctl/client.h"

namespace blockferry {

enum class FollowOutput : std::uint8_t {
  progress,  ///< for people: lines that are rewritten on a terminal, now and then a line elsewhere
  silent,    ///< nothing
  lines,     ///< each change as a line of JSON on stdout
};

enum class FollowEnd : std::uint8_t {
  ended,     ///< the run has, or its volume is swapped
  detached,  ///< by Ctrl-C; the run goes on
};

struct FollowPatience {
  Nanoseconds reconnect = std::chrono::seconds(30);  ///< ferryd may be restarting
  Nanoseconds first_line = std::chrono::seconds(5);  ///< where there is no terminal
  Nanoseconds next_line = std::chrono::seconds(5);
};

/// What a run is followed to: its end, or, sooner, the swap of its volume, after which it goes on without
/// end.
enum class FollowUntil : std::uint8_t { ended, swapped };

/// Until all these runs have come so far or Ctrl-C, under an InterruptGuard of the caller's. `runs` are the
/// runs' objects as known so far, and in the end as last seen.
Result<FollowEnd> follow_runs(Client& client, std::vector<nlohmann::json>& runs, FollowOutput output,
                              const FollowPatience& patience = {}, FollowUntil until = FollowUntil::ended);

bool run_ended(const nlohmann::json& run);

}  // namespace blockferry

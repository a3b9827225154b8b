// SPDX-License-Identifier: Apache-2.0
// Following a run until it ends.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "blockio/base/error.h"
#include "ctl/client.h"

namespace blockferry {

enum class FollowOutput : std::uint8_t {
  progress,  ///< for people: a line that is rewritten on a terminal, now and then a line elsewhere
  silent,    ///< nothing
  lines,     ///< each change as a line of JSON on stdout
};

struct FollowEnd {
  nlohmann::json run;     ///< as last seen
  bool detached = false;  ///< by Ctrl-C; the run goes on
};

/// Until the run has ended or Ctrl-C. Outlives a restart of ferryd of up to half a minute.
Result<FollowEnd> follow_run(Client& client, const std::string& id, FollowOutput output);

bool run_ended(const nlohmann::json& run);

/// The terminal's width, 80 where there is none.
std::size_t terminal_columns(int fd);

}  // namespace blockferry

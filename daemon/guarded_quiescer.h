// SPDX-License-Identifier: Apache-2.0
// The real quiescer: a guard process (guard/protocol.h) holds the volumes still, as one, and releases them
// whatever becomes of this process.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/messages/messages.h"
#include "daemon/quiesced_volume.h"
#include "daemon/quiescer.h"

namespace blockferry {

struct QuiescerOptions {
  std::string sources;               ///< for errors
  std::vector<std::string> targets;  ///< the cutover command may use them
  std::string quiesce_cmd, resume_cmd, cutover_cmd;
  bool writers_go_on = false;            ///< also after a hand-over: they are moved to the target
  std::string mark_directory;            ///< where a hand-over is marked; empty: none will be made
  std::vector<std::string> environment;  ///< of the commands: "BLOCKFERRY_RUN=…"
};

/// Starts the guard.
Result<std::unique_ptr<Quiescer>> make_guarded_quiescer(QuiescerOptions options,
                                                        std::vector<std::unique_ptr<QuiescedVolume>> volumes);

}  // namespace blockferry

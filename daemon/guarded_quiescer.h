// SPDX-License-Identifier: Apache-2.0
// The real quiescer: every filesystem on the volume is frozen, or the user's commands are run, by a guard
// process (guard/protocol.h) that releases them whatever becomes of this one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/messages/messages.h"
#include "daemon/mounts.h"
#include "daemon/quiescer.h"
#include "daemon/storage_stack.h"

namespace blockferry {

struct QuiescerOptions {
  std::vector<std::string> sources;  ///< block devices, quiesced as one
  std::vector<std::string> targets;  ///< the cutover command may use them
  std::string quiesce_cmd, resume_cmd, cutover_cmd;
  bool hands_over = false;               ///< migrate: hand_over() fences the filesystems
  std::string mark_directory;            ///< where a hand-over is marked; empty: none will be made
  std::vector<std::string> environment;  ///< of the commands: "BLOCKFERRY_RUN=…"
};

/// As a run asks for it; mark and environment are the run's to add.
QuiescerOptions quiescer_options_for(const RunRequest& request);

/// What stands against quiescing this volume, now; empty: nothing. One line, what and what to do.
std::string quiescing_refused(const std::string& path, const VolumeNode& source,
                              const QuiescerOptions& options);

/// Opens the filesystems, and starts the guard. refused: see above.
Result<std::unique_ptr<Quiescer>> make_guarded_quiescer(const QuiescerOptions& options);

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// A user's command line, bounded in time. It writes to memory, not to files: those may be frozen.
#pragma once

#include <atomic>
#include <chrono>
#include <string>

namespace blockferry {

struct CommandOutcome {
  bool succeeded = false;  ///< exit status 0 in time
  std::string detail;      ///< otherwise: how it ended, and the last that it said
};

/// Asked for once, before the first command: each runs as a transient unit of systemd's, for what confines
/// ferryd's own (its view of the filesystems, the system calls that it may make) is not meant for the user's
/// commands.
void run_commands_as_units();

/// Runs `/bin/sh -c command_line` in a process group of its own, which is killed when the time is over or
/// `give_up` becomes true.
CommandOutcome run_shell_command(const std::string& command_line, std::chrono::milliseconds limit,
                                 const std::atomic<bool>& give_up);

/// One of ferryd's own, always a child of ours: it waits for nobody else, who may need what is still. As long
/// as it runs, also without us, it has the descriptor `lock`.
CommandOutcome run_own_command(const std::string& command_line, std::chrono::milliseconds limit,
                               const std::atomic<bool>& give_up, int lock);

}  // namespace blockferry

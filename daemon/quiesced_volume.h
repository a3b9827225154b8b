// SPDX-License-Identifier: Apache-2.0
// What is to be done to one volume so that it is still: by kinds of volumes (quiesced_filesystems.h). All is
// opened when it is made, and its calls come from one thread after another.
#pragma once

#include <vector>

#include "blockio/base/error.h"
#include "daemon/guard_process.h"

namespace blockferry {

class QuiescedVolume {
 public:
  virtual ~QuiescedVolume() = default;

  /// The guard is asked for something, or was: meanwhile nobody here uses what it may have to talk over.
  virtual void guard_talks(bool /*begins*/) {}

  /// In the order in which they are to be taken.
  virtual std::vector<GuardHold> holds() const = 0;
  /// Writes out what is held back, so that taking the holds has little left to do.
  virtual Result<void> sync_ahead() = 0;
  /// All is held. When it returns, what was written before has been sent to the device.
  virtual Result<void> settle() = 0;
  /// What its commands will take that the guard runs when it hands over.
  virtual Nanoseconds expected_command_time() const { return Nanoseconds(0); }
  /// Somebody has killed the guard, which may have held something.
  virtual void release_without_guard() = 0;
};

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// Keeps a source still for its cutover. One quiescer a cutover; its calls may block, and are made one after
// another on threads of background tasks.
#pragma once

#include <cstdint>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"

namespace blockferry {

/// Where a volume of several that are cut over together has come to (cutover_group.h).
enum class CutoverStep : std::uint8_t { joined, caught_up, still, copied, targets_closed };

class Quiescer {
 public:
  virtual ~Quiescer() = default;  ///< whatever is still quiesced is released

  /// Writes out what the filesystems hold back, so that freezing them has little left to do.
  virtual Result<void> sync_ahead() = 0;

  /// This volume has come so far. Whether all that are cut over with it have, too; an error: one has given
  /// up.
  virtual Result<bool> all_at(CutoverStep) { return true; }
  /// Whether it is a rehearsal, where this volume alone would have it so or not. Settled when all are still.
  virtual bool rehearses(bool wanted) const { return wanted; }

  /// All or nothing. When it returns, what was written before has been sent to the device, and nobody writes
  /// until release, hand_over, or until `limit` has passed since the call.
  virtual Result<void> quiesce(Nanoseconds limit) = 0;

  /// False: it had been released before, for its time was over.
  virtual Result<bool> release() = 0;

  /// Runs the cutover command, fences the source against its writers, and releases it. False: as above, and
  /// nothing was handed over. An error: the command or the fence failed, and all was released.
  virtual Result<bool> hand_over() = 0;

  /// hand_over has succeeded, whoever of several volumes asked for it.
  virtual bool handed_over() const = 0;

  /// On system_clock(): before the first was frozen, and after the last was released.
  virtual Nanoseconds quiesced_at() const = 0;
  virtual Nanoseconds released_at() const = 0;
  /// What the cutover command took.
  virtual Nanoseconds command_time() const = 0;
  /// What of ferryd's own commands is to be expected of hand_over().
  virtual Nanoseconds expected_command_time() const { return Nanoseconds(0); }
};

}  // namespace blockferry

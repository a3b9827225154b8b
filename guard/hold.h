// SPDX-License-Identifier: Apache-2.0
// One thing that keeps the source still. All that it needs is opened before: while something is quiesced, it
// touches no file.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace blockferry {

struct HoldFailure {
  int errno_value = 0;
  std::string detail;  ///< where errno does not say it
};

/// Its calls never overlap. release() comes from another thread when the time is over.
class Hold {
 public:
  virtual ~Hold() = default;

  /// When it returns nothing, what was written before has been sent to the device, and nobody writes until
  /// release(). May block; gives up when `limit` has passed or `give_up` is set, as far as it can.
  virtual std::optional<HoldFailure> take(std::chrono::milliseconds limit,
                                          const std::atomic<bool>& give_up) = 0;

  /// Precondition: all holds are taken, and the target is complete. What may block of handing over, or fail.
  /// Undone by release(false).
  virtual std::optional<HoldFailure> prepare_hand_over(std::chrono::milliseconds, const std::atomic<bool>&) {
    return std::nullopt;
  }

  /// What prepare_hand_over() does is to be undone while all is still held, where nothing comes of it. Where
  /// there is no time for that, release(false) does it.
  virtual bool undoes_preparation() const { return false; }
  virtual void undo_preparation() {}

  /// Precondition: taken. The source is given up: from release() on nobody writes to it whose writes would be
  /// lost. May be undone by `take_back` until the release, where another hold's failed.
  virtual std::optional<HoldFailure> hand_over() { return std::nullopt; }
  virtual void take_back() {}

  /// After take() was begun, whatever came of it.
  virtual void release(bool handed_over) = 0;

  /// It is released by a command, which must not meet one of ours that is still being killed.
  virtual bool released_by_command() const { return false; }
};

std::unique_ptr<Hold> make_filesystem_hold(int fd, bool fence);
/// `control`: device-mapper's node. `device`: as the kernel encodes its number. `table`: as `dmsetup` reads
/// it.
std::unique_ptr<Hold> make_map_hold(int control, std::uint64_t device, const std::string& table);
/// `lock`: its commands have it as long as they run, whatever becomes of this process.
std::unique_ptr<Hold> make_record_hold(int lock, std::string change_cmd, std::string undo_cmd);
/// `goes_on`: whoever was quiesced goes on also after handing over, for he has been moved.
std::unique_ptr<Hold> make_command_hold(std::string quiesce_cmd, std::string resume_cmd, bool goes_on);

}  // namespace blockferry

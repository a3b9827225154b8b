// SPDX-License-Identifier: Apache-2.0
// How a run learns what is written to a volume in use. Behind it: the kernel's eBPF programs
// (ebpf_tracker.h), or a simulation.
//
//   collect(): what was marked since the last call is added to the owner's bitmap, and kept besides
//   release(): the owner has committed all of that; it is kept no longer
//
// So nothing is forgotten by a crash (invariant 4): a mark is set, kept or committed, at any moment.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "bitmap/change_bitmap.h"
#include "blockio/base/error.h"

namespace blockferry {

/// What the tracker could not see since it was attached. Any of it: only a checksum pass can tell what
/// changed (invariant 6).
struct TrackerLosses {
  std::uint64_t records_refused = 0;   ///< more writes queued at a time than there is room for
  std::uint64_t ranges_unknown = 0;    ///< operations whose range could not be told
  std::uint64_t ends_unmatched = 0;    ///< writes that ended and were not seen to begin
  std::uint64_t programs_skipped = 0;  ///< by the kernel's own count
  std::uint64_t interruptions = 0;     ///< the tracker was not there for a while
  /// No loss: the kernel sometimes hides a write's end from every program. Its record stood, and its range
  /// was marked once more when its memory served for another write.
  std::uint64_t ends_unseen = 0;
  std::uint64_t count() const {
    return records_refused + ranges_unknown + ends_unmatched + programs_skipped + interruptions;
  }
  bool any() const { return count() > 0; }
  void add(const TrackerLosses& more) {
    records_refused += more.records_refused;
    ranges_unknown += more.ranges_unknown;
    ends_unmatched += more.ends_unmatched;
    programs_skipped += more.programs_skipped;
    interruptions += more.interruptions;
    ends_unseen += more.ends_unseen;
  }
};

class LiveTracker {
 public:
  virtual ~LiveTracker() = default;

  /// Adds to `dirty` what was marked since the last call, and the ranges of writes that are still queued
  /// (their ends will mark them once more). device_gone: the volume is not the one that was attached to, or
  /// has another size now.
  virtual Result<void> collect(ChangeBitmap& dirty) = 0;
  virtual void release() = 0;
  /// What the owner commits together with all that was collected so far: by it, whoever takes the tracker up
  /// again sees whether something that was not committed has gone. Nothing: the tracker needs none.
  virtual std::optional<std::uint64_t> position() { return std::nullopt; }

  /// Writes that were queued and whose end was not seen, as granules. None: nothing is on its way.
  virtual std::vector<GranuleRange> queued() = 0;
  /// By the kernel's own count nothing is on its way to the disk. No proof by itself: writes may wait in a
  /// scheduler.
  virtual bool device_idle() = 0;
  virtual TrackerLosses losses() = 0;
};

}  // namespace blockferry

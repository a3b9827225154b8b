// SPDX-License-Identifier: Apache-2.0
// How a run learns what changed. A tracker marks granules in the run's change bitmap; the run copies them.
//
// The life of a pass: begin_pass() ─ step() until done ─ the run commits the bitmap, so that every granule
// the tracker gave up is durably dirty before it is overwritten on the target (invariants 1 and 4, attack F)
// ─ copy.
//
// Trackers: `checksum` here (reads the source and marks what differs from the recorded checksums), `none`
// (marks nothing); `ebpf` and `qemu` later. A tracker that may have missed something answers trusted() ==
// false, and the run does a checksum pass (invariant 6).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "bitmap/change_bitmap.h"
#include "blockio/base/error.h"

namespace blockferry {

/// The recorded checksums, by granule. Knows nothing of files: the daemon's checksum table is behind it.
class RecordedChecksums {
 public:
  virtual ~RecordedChecksums() = default;
  /// The records of granules first … first+out.size()-1.
  virtual Result<void> read(std::uint64_t first, std::span<std::uint64_t> out) = 0;
};

class Tracker {
 public:
  virtual ~Tracker() = default;
  virtual const char* name() const = 0;

  /// False when a write may have been missed since the last checksum pass.
  virtual bool trusted() const = 0;

  /// Starts collecting what changed into `dirty`, at or after granule `cursor` (0, or where an earlier
  /// process stopped).
  virtual Result<void> begin_pass(ChangeBitmap& dirty, std::uint64_t cursor) = 0;

  /// A tracker that must read the source says what it wants read next, at most `count_max` granules; nothing
  /// when all has been asked for. Trackers that know by themselves never ask.
  virtual std::optional<GranuleRange> next_read(std::uint64_t count_max) = 0;

  /// Answers a next_read(): the checksums as read now. Differing granules are marked dirty.
  virtual Result<void> on_read(GranuleRange range, std::span<const std::uint64_t> checksums) = 0;

  /// Everything below this granule has been collected; equals the granule count when the pass's collection is
  /// done.
  virtual std::uint64_t collected() const = 0;
};

}  // namespace blockferry

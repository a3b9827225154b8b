// SPDX-License-Identifier: Apache-2.0
// What changed, by reading everything: granules that differ from their recorded checksums are marked. For
// volumes that nobody tracks, and for trackers that may have missed something (invariant 6).
//
// begin_pass() ─ next_read() and on_read() until collected() is the granule count ─ the owner commits the
// bitmap, so that every granule is durably dirty before it is overwritten on the target ─ copy.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

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

class ChecksumTracker {
 public:
  /// `records` outlives it.
  ChecksumTracker(std::uint64_t granule_count, RecordedChecksums& records)
      : granule_count_(granule_count), records_(records) {}

  /// Starts marking into `dirty`, at granule `cursor` (0, or where an earlier process stopped). Granules that
  /// are dirty already are not read: they will be copied anyhow.
  void begin_pass(ChangeBitmap& dirty, std::uint64_t cursor);

  /// What is to be read next, at most `count_max` granules; nothing when all has been asked for.
  std::optional<GranuleRange> next_read(std::uint64_t count_max);

  /// Answers a next_read(): the checksums as read now. Differing granules are marked dirty.
  Result<void> on_read(GranuleRange range, std::span<const std::uint64_t> checksums);

  /// Everything below this granule is done.
  std::uint64_t collected() const;

 private:
  const std::uint64_t granule_count_;
  RecordedChecksums& records_;
  ChangeBitmap* dirty_ = nullptr;
  std::uint64_t next_ = 0;
  std::vector<GranuleRange> asked_;  ///< as many as there are reads in flight: few
  std::vector<std::uint64_t> recorded_;
};

}  // namespace blockferry

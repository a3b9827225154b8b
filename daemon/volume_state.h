// SPDX-License-Identifier: Apache-2.0
// What is known of a volume's granules, in memory and on disk: where the change bitmap and the checksums
// meet.
//
//             claim()            record_copied()           begin_checkpoint()          finish_checkpoint()
//   dirty ────────────> in flight ────────────> copied_now ────────────> copied_flushing ────────────> synced
//     ^                     │                        │                          │
//     └──── give_back() ────┴──── (a flush or commit failed: copied_* stay) ────┘
//
// On disk a granule is dirty until it is synced: the committed bitmap is dirty ∪ in flight ∪ copied, so that
// a crash at any moment finds every granule whose target content is not vouched for (invariants 3 and 4). One
// thread owns this; commit() alone may run on another one meanwhile.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bitmap/bitmap_file.h"
#include "bitmap/change_bitmap.h"
#include "daemon/checksum_table.h"
#include "daemon/copied_ranges.h"
#include "daemon/run_record.h"

namespace blockferry {

class VolumeState {
 public:
  /// New files, every granule dirty.
  static Result<std::unique_ptr<VolumeState>> create(StateDirectory& state, const std::string& volume_id,
                                                     const VolumeGeometry& geometry);
  static Result<std::unique_ptr<VolumeState>> open(StateDirectory& state, const std::string& volume_id,
                                                   const VolumeGeometry& geometry,
                                                   std::uint64_t generation_min);

  const VolumeGeometry& geometry() const { return geometry_; }
  ChangeBitmap& dirty() { return dirty_; }
  ChecksumTable& checksums() { return *checksums_; }
  std::uint64_t generation() const { return bitmap_file_->generation(); }
  /// What generation() will be when these are committed.
  std::uint64_t generation_after(const std::vector<BitmapPage>& pages) const {
    return generation() + (durable_ && pages.empty() ? 0 : 1);
  }

  std::optional<GranuleRange> claim(std::uint64_t from, std::uint64_t count_max) {
    return dirty_.claim(from, count_max);
  }
  void give_back(GranuleRange range) { dirty_.set(range); }
  /// The granules reached every target that counts. An empty span: they are zeroes.
  Result<void> record_copied(GranuleRange range, std::span<const std::uint64_t> checksums);
  /// While the source is frozen no file may be written: from true on the records are kept in memory, and
  /// written with false.
  Result<void> defer_records(bool defer);
  /// A target was found to differ from its checksum.
  void mark_mismatched(GranuleRange range);
  /// Granules from `first` on, up to `end`, may have been marked by a tracker since the last commit.
  void note_collected(std::uint64_t first, std::uint64_t end);

  /// Ranges of granules that the next checkpoint would take up: what they cost is memory.
  std::size_t copied_ranges() const { return copied_now_.size(); }

  /// What was copied until now is to be flushed. Precondition: no checkpoint is under way.
  void begin_checkpoint();
  /// The flush succeeded: the pages to commit, given what is in flight at this moment.
  std::vector<BitmapPage> pages_to_commit(std::span<const ByteRange> in_flight);
  /// Makes checksums and pages durable. Runs on any one thread.
  Result<void> commit(const std::vector<BitmapPage>& pages);
  /// `committed`: copied_flushing is synced now. Otherwise it counts as merely copied again.
  void finish_checkpoint(bool committed);
  /// A flush failed and no target is left that it succeeded on: all since the last good one is dirty again.
  void copied_to_dirty();

  /// A failed target's own bitmap: all that it may lack, now. Durable when it returns.
  Result<void> save_lag(StateDirectory& state, const std::string& name, std::span<const ByteRange> in_flight);
  /// Marks all that a returning target lacks dirty.
  Result<void> merge_lag(StateDirectory& state, const std::string& name);

 private:
  VolumeState(const VolumeGeometry& geometry, std::unique_ptr<BitmapFile> bitmap_file,
              std::unique_ptr<ChecksumTable> checksums);
  Result<void> write_record(GranuleRange range, std::span<const std::uint64_t> checksums);
  void read_dirty(std::uint64_t index, std::vector<BitmapPage>& pages) const;
  void touch(GranuleRange range);
  std::vector<GranuleRange> to_granules(std::span<const ByteRange> ranges) const;

  const VolumeGeometry geometry_;
  std::unique_ptr<BitmapFile> bitmap_file_;
  std::unique_ptr<ChecksumTable> checksums_;
  ChangeBitmap dirty_;
  CopiedRanges copied_now_, copied_flushing_;
  struct DeferredRecord {
    GranuleRange range;
    std::vector<std::uint64_t> checksums;
  };
  bool deferring_ = false;
  std::vector<DeferredRecord> deferred_;
  std::vector<bool> touched_;     ///< pages whose committed content may differ from what it must become
  bool durable_ = true;           ///< false until a new volume's first commit
  std::vector<bool> committing_;  ///< of the commit under way, to be touched again if it fails
};

}  // namespace blockferry

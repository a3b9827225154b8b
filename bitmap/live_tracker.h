// SPDX-License-Identifier: Apache-2.0
// What is written to a volume in use, as the kernel sees it: eBPF programs (change_tracker.bpf.c) mark each
// write's granules when it ends. No kernel module, no device-mapper layer, nothing to prepare.
//
// Two sets of marks alternate, so that no mark falls between collecting and clearing (and none is cleared
// before the owner has it in a safe place):
//
//   collect(): the other set comes into use; what the first one holds is added to the owner's bitmap
//   release(): the owner has committed it; the first set is emptied
//
// Kernel memory: two bits a granule (64 MiB for 1 TiB of 4 KiB granules), and 64 bytes for each write that
// may be queued at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bitmap/change_bitmap.h"
#include "blockio/base/error.h"

namespace blockferry {

/// A volume as a range of the whole disk that it lies on.
struct TrackedRange {
  unsigned major = 0, minor = 0;    ///< the whole disk's
  std::uint64_t disk_sequence = 0;  ///< tells it from a later disk of that name
  std::uint64_t offset = 0;         ///< on the disk; a multiple of 512
  std::uint64_t bytes = 0;
};

/// Of a block device: a disk or a partition. unsupported: the kernel numbers no disks (before 5.15).
Result<TrackedRange> tracked_range_of(const std::string& device);

struct LiveTrackerOptions {
  std::uint64_t granule_bytes = 4096;      ///< a power of two
  unsigned queued_writes_max = 64 * 1024;  ///< more at a time are a loss
};

/// What the tracker could not see since it was attached. Any of it: only a checksum pass can tell what
/// changed.
struct TrackerLosses {
  std::uint64_t records_refused = 0;   ///< more writes queued at a time than there is room for
  std::uint64_t ranges_unknown = 0;    ///< operations whose range could not be told
  std::uint64_t ends_unmatched = 0;    ///< writes that ended and were not seen to begin
  std::uint64_t programs_skipped = 0;  ///< by the kernel's own count
  /// No loss: the kernel sometimes hides a write's end from every program. Its record stood, and its range
  /// was marked once more when its memory served for another write.
  std::uint64_t ends_unseen = 0;
  bool any() const { return records_refused + ranges_unknown + ends_unmatched + programs_skipped > 0; }
};

class LiveTracker {
 public:
  /// When it returns, the end of each later write will be marked. unsupported: the kernel or the process's
  /// rights do not allow it, and the hint says why.
  static Result<std::unique_ptr<LiveTracker>> attach(const TrackedRange& range,
                                                     const LiveTrackerOptions& options = {});
  /// Pinned in a new directory of a bpf filesystem, the tracker goes on whatever becomes of this process.
  Result<void> pin(const std::string& directory);
  /// Takes up what another process pinned. state_damaged: pins are missing, or are not those of this volume:
  /// then only a checksum pass can tell what changed. The first collect() gives again what was not released.
  static Result<std::unique_ptr<LiveTracker>> adopt(const std::string& directory, const TrackedRange& range,
                                                    std::uint64_t granule_bytes);
  /// Ends a pinned tracker, once nobody uses it.
  static void remove_pins(const std::string& directory);

  ~LiveTracker();
  LiveTracker(const LiveTracker&) = delete;
  LiveTracker& operator=(const LiveTracker&) = delete;

  /// Adds to `dirty` what was marked since the last call, and the ranges of writes that are still queued
  /// (their ends will mark them once more). Until release() it gives the same again.
  Result<void> collect(ChangeBitmap& dirty);
  void release();

  /// Writes that were queued and whose end was not seen, as granules. None: nothing is on its way.
  Result<std::vector<GranuleRange>> queued() const;
  TrackerLosses losses() const;

 private:
  struct Kernel;
  LiveTracker(const TrackedRange& range, std::uint64_t granule_bytes);

  const std::unique_ptr<Kernel> kernel_;
  const TrackedRange range_;
  const std::uint64_t granule_bytes_;
  const std::uint64_t granule_count_;
  unsigned in_use_ = 0;     ///< which marks the programs set
  bool collected_ = false;  ///< the others hold what was collected and not released
};

}  // namespace blockferry

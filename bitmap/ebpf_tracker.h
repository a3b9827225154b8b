// SPDX-License-Identifier: Apache-2.0
// What is written to a volume in use, as the kernel sees it: eBPF programs (change_tracker.bpf.c) mark each
// write's granules when it ends. No kernel module, no device-mapper layer, nothing to prepare.
//
// collect() moves the marks to a second set, and only release() empties that one.
//
// Kernel memory: two bits a granule (64 MiB for 1 TiB of 4 KiB granules), and some 50 bytes for each write
// that may be queued at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bitmap/live_tracker.h"
#include "blockio/base/error.h"

namespace blockferry {

/// A volume as a range of the whole disk that it lies on.
struct TrackedRange {
  std::string device;               ///< its path
  std::string sysfs;                ///< its directory there
  std::string disk_sysfs;           ///< the whole disk's
  unsigned major = 0, minor = 0;    ///< the whole disk's
  std::uint64_t disk_sequence = 0;  ///< tells it from a later disk of that name
  std::uint64_t offset = 0;         ///< on the disk; a multiple of 512
  std::uint64_t bytes = 0;
  std::uint64_t zone_bytes = 0;  ///< 0: the disk has no zones
  bool operator==(const TrackedRange&) const = default;
};

/// Of a block device: a disk or a partition. unsupported: the kernel numbers no disks (before 5.15).
Result<TrackedRange> tracked_range_of(const std::string& device);

struct EbpfTrackerOptions {
  std::uint64_t granule_bytes = 4096;      ///< a power of two
  unsigned queued_writes_max = 64 * 1024;  ///< more at a time are a loss
};

class EbpfTracker : public LiveTracker {
 public:
  /// Whether this kernel would take the programs from this process: they are loaded, and attached to nothing.
  static Result<void> probe();
  /// When it returns, the end of each later write will be marked. unsupported: the kernel or the process's
  /// rights do not allow it, and the hint says why.
  static Result<std::unique_ptr<EbpfTracker>> attach(const TrackedRange& range,
                                                     const EbpfTrackerOptions& options = {});
  /// Pinned in a new directory of a bpf filesystem, the tracker goes on whatever becomes of this process.
  Result<void> pin(const std::string& directory);
  /// Takes up what another process pinned. state_damaged: pins are missing, or are not those of this volume:
  /// then only a checksum pass can tell what changed. The first collect() gives again what was not released.
  static Result<std::unique_ptr<EbpfTracker>> adopt(const std::string& directory, const TrackedRange& range,
                                                    std::uint64_t granule_bytes);
  /// Ends a pinned tracker, once nobody uses it.
  static void remove_pins(const std::string& directory);

  ~EbpfTracker() override;
  EbpfTracker(const EbpfTracker&) = delete;
  EbpfTracker& operator=(const EbpfTracker&) = delete;

  Result<void> collect(ChangeBitmap& dirty) override;
  void release() override;
  std::vector<GranuleRange> queued() override;
  bool device_idle() override;
  TrackerLosses losses() override;

 private:
  struct Kernel;
  EbpfTracker(const TrackedRange& range, std::uint64_t granule_bytes);
  void wait_for_earlier_writes();
  void take_marks(std::uint64_t page, ChangeBitmap& dirty);

  const std::unique_ptr<Kernel> kernel_;
  const TrackedRange range_;
  const std::uint64_t granule_bytes_;
  const std::uint64_t granule_count_;
  bool give_again_ = false;  ///< what another process collected and did not release is to be collected
};

}  // namespace blockferry

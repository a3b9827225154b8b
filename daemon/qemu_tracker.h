// SPDX-License-Identifier: Apache-2.0
// Tracks what a guest writes by dirty bitmaps in QEMU, which marks each write when it completes.
//
// Bitmaps take turns. collect() begins number N+1 and ends N in one moment, and reads N; release() removes
// it. So whatever is not committed stands in a bitmap, and a later process finds them by their names:
//
//   P … N-1     disabled: collected, and not released
//         N     recording
//
// The owner's commits say where P is, so that also the lowest one is missed. They go with QEMU, unless the
// user has named them: then the image keeps them, and QEMU says which are not what they were. Whatever
// becomes of them otherwise is a loss (invariant 6): somebody removed or disabled the one that was recording,
// or one that was not released.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bitmap/live_tracker.h"
#include "blockio/base/units.h"
#include "daemon/qemu_disk.h"

namespace blockferry {

/// read_qemu_bitmap(), but in tests.
using ReadQemuBitmap =
    std::function<Result<void>(const std::string& uri, const std::string& bitmap, std::uint64_t bytes,
                               const std::function<void(ByteRange)>& found, Nanoseconds patience)>;

class QemuTracker : public LiveTracker {
 public:
  /// Begins anew; an earlier one of this run is removed, of which `last` was the position: its numbers are
  /// not used again. All writes that end after it has returned are tracked.
  static Result<std::unique_ptr<QemuTracker>> attach(std::shared_ptr<QemuDisk> disk,
                                                     std::uint64_t granule_bytes, ReadQemuBitmap read,
                                                     std::optional<std::uint64_t> last = {});
  /// Takes up what another process began and committed up to `position`. state_damaged: its bitmaps are not
  /// all there, or the disk is another node now. The first collect() gives again what was not committed.
  static Result<std::unique_ptr<QemuTracker>> adopt(std::shared_ptr<QemuDisk> disk,
                                                    std::uint64_t granule_bytes, ReadQemuBitmap read,
                                                    std::uint64_t position);

  Result<void> collect(ChangeBitmap& dirty) override;
  void release() override;
  std::optional<std::uint64_t> position() override { return given_; }
  /// A transaction of QEMU's waits for what is on its way, and so does stopping the guest.
  std::vector<GranuleRange> queued() override { return {}; }
  bool device_idle() override { return true; }
  TrackerLosses losses() override { return losses_; }

 private:
  QemuTracker(std::shared_ptr<QemuDisk> disk, const QemuNode& node, std::uint64_t granule_bytes,
              ReadQemuBitmap read);
  Result<bool> vouches(const QemuNode& node) const;
  Result<void> rotate();
  Result<bool> written(const QemuNode& node) const;
  Result<void> take(std::uint64_t number, ChangeBitmap& dirty);

  const std::shared_ptr<QemuDisk> disk_;
  const std::string node_;
  const std::uint64_t bytes_, granule_bytes_, granularity_;
  const ReadQemuBitmap read_;
  std::uint64_t first_ = 0;      ///< not released
  std::uint64_t recording_ = 0;  ///< first_ … recording_ - 1 are disabled
  std::uint64_t given_ = 0;      ///< those below were collected by this process
  TrackerLosses losses_;
};

}  // namespace blockferry

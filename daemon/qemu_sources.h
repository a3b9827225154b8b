// SPDX-License-Identifier: Apache-2.0
// Disks of QEMU guests as sources of runs: read over NBD, tracked by bitmaps, moved by QEMU itself.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "blockio/device.h"
#include "blockio/io_queue.h"
#include "daemon/qemu_disk.h"
#include "daemon/quiesced_volume.h"
#include "daemon/trackers.h"

namespace blockferry {

class QemuSources : public Trackers {
 public:
  /// `directory`: see QemuDisk.
  explicit QemuSources(std::string directory) : directory_(std::move(directory)) {}

  /// Exports the disk, and opens it. An earlier process's guard may still have QEMU's attention: `patience`.
  Result<std::unique_ptr<Device>> open(FileQueue& queue, const RunRecord& record, Nanoseconds patience);
  Result<std::unique_ptr<QuiescedVolume>> quiesced(const RunRecord& record);

  Result<std::unique_ptr<LiveTracker>> attach(const RunRecord& record) override;
  Result<std::unique_ptr<LiveTracker>> adopt(const RunRecord& record) override;
  /// All that the run added to QEMU, but for bitmaps that the user has named.
  void remove(const RunRecord& record) override;
  /// Those as well.
  void forget(const RunRecord& record);
  /// QEMU tells which disk the guest has.
  std::optional<bool> handed_over(const RunRecord& record) override;

 private:
  Result<std::shared_ptr<QemuDisk>> disk(const RunRecord& record);

  const std::string directory_;
  std::mutex mutex_;
  std::map<std::string, std::weak_ptr<QemuDisk>> disks_;  // guarded by mutex_; by run
};

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// Block devices and raw files, with O_DIRECT where the file's filesystem has it.
#pragma once

#include <memory>
#include <string>

#include "blockio/base/error.h"
#include "blockio/device.h"
#include "blockio/io_queue.h"

namespace blockferry {

enum class DeviceRole : std::uint8_t { source, target };

struct FileDeviceOptions {
  DeviceRole role = DeviceRole::source;
  /// source: open also when mounted or held by others (block: no O_EXCL; file: no lock).
  bool shared = false;
  /// target files: created when missing, and set to this size when the file is new, empty or `resize`.
  /// 0: as it is, unless `resize`.
  std::uint64_t file_bytes = 0;
  bool create = false;
  bool resize = false;  ///< target files only: cut or grow an existing file to file_bytes
  /// After a crash of our own the kernel may still hold the device for the dead process's I/O: keep trying
  /// this long.
  Nanoseconds busy_wait = Nanoseconds(0);
  /// The path of the volume that this one gives access to: name and identity are that one's. Empty: its own.
  std::string stands_for;
};

/// Opens and claims the device: O_EXCL for block devices (and the BSD lock of the whole disk, for targets, so
/// that udev leaves it alone), flock for files (shared for sources, exclusive for targets). The queue must
/// outlive the device; the device must outlive its requests. Everything is released when the device is
/// destroyed.
Result<std::unique_ptr<Device>> open_file_device(FileQueue& queue, const std::string& path,
                                                 const FileDeviceOptions& options);

/// The identity that open_file_device would give, without claiming anything.
Result<DeviceInfo> probe_file_device(const std::string& path);

}  // namespace blockferry

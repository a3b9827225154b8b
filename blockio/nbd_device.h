// SPDX-License-Identifier: Apache-2.0
// A volume behind an NBD server, over one connection or several (nbd_channel.h). One that breaks is made
// anew, and what was under way is repeated.
#pragma once

#include <memory>

#include "blockio/base/error.h"
#include "blockio/device.h"
#include "blockio/file_device.h"
#include "blockio/io_queue.h"
#include "blockio/nbd_connection.h"

namespace blockferry {

struct NbdDeviceOptions {
  DeviceRole role = DeviceRole::source;
  Nanoseconds connect_timeout = std::chrono::seconds(10);
  /// A server that is not there (yet, or again) is tried for so long.
  Nanoseconds patience = std::chrono::seconds(2);
  /// How long a connection that broke is tried to be made anew before its requests fail.
  Nanoseconds reconnect_for = std::chrono::seconds(60);
  unsigned connections = 0;  ///< where the server allows several; 0: as suits it
  /// Local connections have threads, too: a server whose clients' work waits until we have read its replies
  /// must not wait for what else the run's thread does.
  bool always_threads = false;
  /// A target that an earlier process of ours, which was killed, may have sent writes to: the server may
  /// still carry them out.
  bool taken_up_again = false;
  /// A target whose server can neither flush nor write through: taken all the same, and flushes mean nothing.
  bool unsafe = false;
};

/// Refused where the target is read-only, or cannot keep what was written (unless `unsafe`).
Result<std::unique_ptr<Device>> open_nbd_device(FileQueue& queue, const NbdAddress& address,
                                                const NbdDeviceOptions& options);

/// What an opened device would say of itself.
DeviceInfo nbd_device_info(const NbdAddress& address, const NbdExport& about);

}  // namespace blockferry

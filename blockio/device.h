// SPDX-License-Identifier: Apache-2.0
// A block device, as the engine sees it: real ones (file_device.h), volumes behind NBD servers
// (nbd_device.h), and in tests FaultDevice and SimDevice.
//
// A device is submitted requests, and its queue (io_queue.h) gives them back when they are done. One thread
// owns a queue and every device on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "blockio/base/error.h"
#include "blockio/base/units.h"

namespace blockferry {

enum class IoOperation : std::uint8_t {
  read,
  write,
  zero,  ///< make the range read as zeroes, giving its space back where the device can (never a mere discard)
  flush,  ///< everything completed before is durable after; offset and bytes are unused
};

class Device;

/// One operation in flight. Owned by whoever submits it; must stay in place until the queue has given it
/// back.
struct IoRequest {
  IoOperation operation = IoOperation::read;
  /// Aligned to the device's logical block. `bytes` may be any length where the range ends at the end of what
  /// is copied; then the buffer behind `data` must have room up to the next multiple of 4096 bytes, which the
  /// device may read into or, for a write, fill with zeroes and write.
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::byte* data = nullptr;  ///< read and write only; inside the memory registered with the queue

  /// Set when it comes back: bytes done, never more than `bytes` (short counts happen), 0 for zero and flush,
  /// or -errno. -ESTALE, of a flush alone: the device is well, but its connection broke since the last good
  /// flush, and what was written since, or is in flight now, may not be there: it must be written again.
  std::int64_t result = 0;

  // Kept by the device and the queue; the submitter may read them.
  Device* device = nullptr;
  std::int64_t submitted_at_ns = 0;  ///< by the queue's clock
  std::int64_t completed_at_ns = 0;
  void* owner = nullptr;  ///< the submitter's own
};

enum class DeviceKind : std::uint8_t { block, file, nbd, simulated };

struct DeviceInfo {
  std::string uri;  ///< as shown to people: an absolute path, or a URI
  std::string
      identity;  ///< names the same volume over restarts: "diskseq:…", "file:dev:inode", partition UUIDs
  DeviceKind kind = DeviceKind::file;
  std::uint64_t bytes = 0;
  std::uint32_t logical_block_bytes = 512;
  /// Zero runs shorter than this are written as data: below it a zero request costs more than it saves.
  std::uint64_t zero_run_bytes_min = 64 * KiB;
  // How it is driven fastest: the size of a request, and of all that are under way. 0: no matter.
  std::uint64_t io_bytes_best = 0, in_flight_bytes_best = 0;
};

/// What lies at an offset: data or a hole, up to `end`.
struct DeviceRegion {
  bool hole = false;
  std::uint64_t end = 0;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual const DeviceInfo& info() const = 0;

  /// Takes the request; it comes back, in any order, out of IoQueue::wait(). Never blocks for the I/O itself.
  virtual void submit(IoRequest& request) = 0;

  /// The region that begins at `offset` (offset < bytes). A device without holes answers {false, bytes}. It
  /// may answer from what it asked before, until forget_regions().
  virtual Result<DeviceRegion> region_at(std::uint64_t offset) = 0;
  /// The volume may have been written since: holes that were seen before are none any more.
  virtual void forget_regions() {}

  /// How often a write of ours was given up, and repeated, that may still be carried out at some later time:
  /// what stands there then must be read back and compared before anybody relies on it.
  virtual std::uint64_t doubts() { return 0; }

  /// An opaque text that differs whenever the device may have been written since an earlier call (write
  /// counters of the disk, a file's change time), or nothing where the device cannot vouch for that. Equal
  /// texts, also across processes, mean: unchanged. Asked only while no write of ours is in flight.
  virtual std::optional<std::string> change_stamp() = 0;
};

}  // namespace blockferry

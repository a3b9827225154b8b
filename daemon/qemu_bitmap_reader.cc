// SPDX-License-Identifier: Apache-2.0
#include "daemon/qemu_bitmap_reader.h"

#include <algorithm>

#include "blockio/nbd_connection.h"

namespace blockferry {

namespace {

constexpr std::uint64_t asked_bytes_max = 4 * GiB - 64 * KiB;  // the protocol has 32 bits
constexpr std::uint32_t dirty_flag = 1;

}  // namespace

Result<void> read_qemu_bitmap(const std::string& uri, const std::string& bitmap, std::uint64_t bytes,
                              const std::function<void(ByteRange)>& found, Nanoseconds patience) {
  NbdAddress address;
  address.uri = uri;
  const std::string context = "qemu:dirty-bitmap:" + bitmap;
  address.contexts = {context};
  auto connection = NbdConnection::connect(address, patience);
  if (!connection) return fail(connection.error());
  if (!connection->has_context(context) || connection->about().bytes < bytes)
    return fail(make_error(ErrorCode::io, "read " + context + " from", uri, "QEMU does not offer it"));
  for (std::uint64_t at = 0; at < bytes;) {
    const auto extents =
        connection->block_status(context, {at, std::min(bytes - at, asked_bytes_max)}, patience);
    if (!extents) return fail(extents.error());
    for (const auto& extent : *extents) {
      const std::uint64_t length = std::min(extent.bytes, bytes - at);
      if ((extent.flags & dirty_flag) != 0 && length > 0) found({at, length});
      at += length;
    }
  }
  return {};
}

}  // namespace blockferry

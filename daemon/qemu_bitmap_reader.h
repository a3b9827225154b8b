// SPDX-License-Identifier: Apache-2.0
// What a bitmap in QEMU holds, read over NBD.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "blockio/base/units.h"

namespace blockferry {

/// Calls `found` with each dirty range of the bitmap, in order, up to `bytes`. `uri` is of an export that
/// offers it.
Result<void> read_qemu_bitmap(const std::string& uri, const std::string& bitmap, std::uint64_t bytes,
                              const std::function<void(ByteRange)>& found, Nanoseconds patience);

}  // namespace blockferry

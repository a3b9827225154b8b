// SPDX-License-Identifier: Apache-2.0
// A picture of a volume: what is known of its granules, cell by cell.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/volume_state.h"

namespace blockferry {

/// Granules of a cell; each granule counts once.
struct VolumeMapCell {
  std::uint64_t synced = 0;  ///< data that the targets hold
  std::uint64_t zero = 0;    ///< zeroes that the targets hold
  std::uint64_t dirty = 0;
  std::uint64_t bad = 0;  ///< unreadable on the source
};

/// At most `cells` of them, never more than there are granules. Large volumes are judged by the holes of the
/// checksum table, 512 granules at a time.
std::vector<VolumeMapCell> map_volume(VolumeState& volume, const std::vector<ByteRange>& bad_ranges,
                                      std::uint32_t cells);

}  // namespace blockferry

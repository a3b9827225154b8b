// SPDX-License-Identifier: Apache-2.0
// The trackers that need no tracking. `checksum` reads the source and marks what differs from the recorded
// checksums; `none` marks nothing, for sources that the user vouches for.
#pragma once

#include <memory>

#include "bitmap/tracker.h"

namespace blockferry {

/// `records` outlives the tracker. Granules that are dirty already are not read: they will be copied anyhow.
std::unique_ptr<Tracker> make_checksum_tracker(std::uint64_t granule_count, RecordedChecksums& records);

std::unique_ptr<Tracker> make_none_tracker(std::uint64_t granule_count);

}  // namespace blockferry

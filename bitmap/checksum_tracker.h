// SPDX-License-Identifier: Apache-2.0
// The tracker that needs no tracking: `checksum` reads the source and marks what differs from the recorded
// checksums.
#pragma once

#include <memory>

#include "bitmap/tracker.h"

namespace blockferry {

/// `records` outlives the tracker. Granules that are dirty already are not read: they will be copied anyhow.
std::unique_ptr<Tracker> make_checksum_tracker(std::uint64_t granule_count, RecordedChecksums& records);

}  // namespace blockferry

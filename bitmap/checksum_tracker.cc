// SPDX-License-Identifier: Apache-2.0
#include "bitmap/checksum_tracker.h"

#include <algorithm>

#include "blockio/base/check.h"

namespace blockferry {

void ChecksumTracker::begin_pass(ChangeBitmap& dirty, std::uint64_t cursor) {
  dirty_ = &dirty;
  next_ = std::min(cursor, granule_count_);
  asked_.clear();
}

std::optional<GranuleRange> ChecksumTracker::next_read(std::uint64_t count_max) {
  BLOCKFERRY_CHECK(dirty_ != nullptr && count_max > 0, "a read of nothing, or outside of a pass");
  while (next_ < granule_count_) {
    const auto dirty = dirty_->find(next_, UINT64_MAX);
    if (dirty && dirty->first == next_) {
      next_ = dirty->end();
      continue;
    }
    const std::uint64_t end = std::min(dirty ? dirty->first : granule_count_, next_ + count_max);
    const GranuleRange range{next_, end - next_};
    next_ = end;
    asked_.push_back(range);
    return range;
  }
  return std::nullopt;
}

Result<void> ChecksumTracker::on_read(GranuleRange range, std::span<const std::uint64_t> checksums) {
  const auto asked = std::find(asked_.begin(), asked_.end(), range);
  BLOCKFERRY_CHECK(asked != asked_.end() && checksums.size() == range.count,
                   "an answer that was not asked for");
  recorded_.resize(range.count);
  if (auto done = records_.read(range.first, recorded_); !done) return done;
  for (std::uint64_t i = 0; i < range.count;) {
    const std::uint64_t first = i;
    while (i < range.count && recorded_[i] != checksums[i]) ++i;
    dirty_->set({range.first + first, i - first});
    i += i == first ? 1 : 0;
  }
  asked_.erase(asked);
  return {};
}

std::uint64_t ChecksumTracker::collected() const {
  std::uint64_t below = next_;  // up to the first read that is still out
  for (const auto& range : asked_) below = std::min(below, range.first);
  return below;
}

}  // namespace blockferry

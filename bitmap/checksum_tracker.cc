// SPDX-License-Identifier: Apache-2.0
#include "bitmap/checksum_tracker.h"

#include <algorithm>
#include <vector>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

class ChecksumTracker : public Tracker {
 public:
  ChecksumTracker(std::uint64_t granule_count, RecordedChecksums& records)
      : granule_count_(granule_count), records_(records) {}

  const char* name() const override { return "checksum"; }
  bool trusted() const override { return true; }  // it looks at everything, each time

  Result<void> begin_pass(ChangeBitmap& dirty, std::uint64_t cursor) override {
    dirty_ = &dirty;
    next_ = std::min(cursor, granule_count_);
    asked_.clear();
    return {};
  }

  std::optional<GranuleRange> next_read(std::uint64_t count_max) override {
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

  Result<void> on_read(GranuleRange range, std::span<const std::uint64_t> checksums) override {
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

  /// Up to the first read that is still out.
  std::uint64_t collected() const override {
    std::uint64_t below = next_;
    for (const auto& range : asked_) below = std::min(below, range.first);
    return below;
  }

 private:
  const std::uint64_t granule_count_;
  RecordedChecksums& records_;
  ChangeBitmap* dirty_ = nullptr;
  std::uint64_t next_ = 0;
  std::vector<GranuleRange> asked_;  ///< as many as there are reads in flight: few
  std::vector<std::uint64_t> recorded_;
};

}  // namespace

std::unique_ptr<Tracker> make_checksum_tracker(std::uint64_t granule_count, RecordedChecksums& records) {
  return std::make_unique<ChecksumTracker>(granule_count, records);
}

}  // namespace blockferry

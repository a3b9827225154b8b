// SPDX-License-Identifier: Apache-2.0
// Which granules were copied since a checkpoint: a list, since copying goes in order and what lies side by
// side becomes one entry. (A bitmap costs 32 MiB and several passes over them for a TiB of holes.)
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "bitmap/change_bitmap.h"

namespace blockferry {

class CopiedRanges {
 public:
  /// Joined with its neighbours where those are among the latest: reads end a little out of order.
  void add(GranuleRange range) {
    const auto beside = [&range](const GranuleRange& other) {
      return other.end() == range.first || range.end() == other.first;
    };
    for (int side = 0; side < 2; ++side) {
      const auto latest = ranges_.end() - std::ptrdiff_t(std::min<std::size_t>(ranges_.size(), 32));
      const auto other = std::find_if(latest, ranges_.end(), beside);
      if (other == ranges_.end()) break;
      range = {std::min(other->first, range.first), other->count + range.count};
      *other = ranges_.back();
      ranges_.pop_back();
    }
    ranges_.push_back(range);
  }
  void add(const CopiedRanges& others) {
    ranges_.insert(ranges_.end(), others.ranges_.begin(), others.ranges_.end());
  }
  void clear() { ranges_.clear(); }

  bool empty() const { return ranges_.empty(); }
  std::size_t size() const { return ranges_.size(); }
  auto begin() const { return ranges_.begin(); }
  auto end() const { return ranges_.end(); }

 private:
  std::vector<GranuleRange> ranges_;  ///< in no order; may overlap
};

}  // namespace blockferry

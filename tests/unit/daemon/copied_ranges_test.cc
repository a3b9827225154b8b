// SPDX-License-Identifier: Apache-2.0
// The list of copied ranges against a plain set of granules.
#include "daemon/copied_ranges.h"

#include <random>
#include <set>

#include <gtest/gtest.h>

namespace blockferry {
namespace {

std::set<std::uint64_t> granules_of(const CopiedRanges& ranges) {
  std::set<std::uint64_t> granules;
  for (const auto& range : ranges) {
    for (std::uint64_t granule = range.first; granule < range.end(); ++granule) granules.insert(granule);
  }
  return granules;
}

TEST(CopiedRanges, HoldWhatWasAddedAndNothingElse) {
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    std::mt19937_64 random(seed);
    CopiedRanges ranges, others;
    std::set<std::uint64_t> model;
    for (int i = 0; i < 100; ++i) {
      const GranuleRange range{random() % 500, 1 + random() % 8};
      (random() % 4 == 0 ? others : ranges).add(range);
      for (std::uint64_t granule = range.first; granule < range.end(); ++granule) model.insert(granule);
    }
    ranges.add(others);
    ASSERT_EQ(granules_of(ranges), model) << "seed " << seed;
  }
}

TEST(CopiedRanges, CopyingAlmostInOrderTakesOneEntry) {
  CopiedRanges ranges;
  for (std::uint64_t pair = 0; pair < 1000; ++pair) {
    ranges.add({pair * 512 + 256, 256});
    ranges.add({pair * 512, 256});
  }
  EXPECT_LE(ranges.size(), 2u);
  EXPECT_EQ(granules_of(ranges).size(), 512'000u);
}

}  // namespace
}  // namespace blockferry

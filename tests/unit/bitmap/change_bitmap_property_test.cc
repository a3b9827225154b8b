// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <set>
#include <vector>

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "bitmap/change_bitmap.h"

namespace blockferry {
namespace {

using Granules = std::set<std::uint64_t>;

struct Scattered {
  std::uint64_t granule_count;
  std::vector<GranuleRange> ranges;
  Granules granules;  ///< of all ranges
};

/// Ranges that begin anywhere in a volume of up to four levels, mostly short.
Scattered scattered() {
  Scattered made;
  made.granule_count = *rc::gen::inRange<std::uint64_t>(1, 400000);
  const auto count = *rc::gen::inRange<std::size_t>(0, 30);
  for (std::size_t i = 0; i < count; ++i) {
    const auto first = *rc::gen::inRange<std::uint64_t>(0, made.granule_count);
    const auto length_max =
        std::min<std::uint64_t>(made.granule_count - first, *rc::gen::element(1, 70, 5000));
    made.ranges.push_back({first, *rc::gen::inRange<std::uint64_t>(1, length_max + 1)});
    for (std::uint64_t at = first; at < made.ranges.back().end(); ++at)
      made.granules.insert(made.granules.end(), at);
  }
  return made;
}

void mark(ChangeBitmap& bitmap, const Scattered& marks) {
  for (const auto& range : marks.ranges) bitmap.set(range);
}

Granules all_claims(ChangeBitmap& bitmap, std::uint64_t count_max) {
  Granules claimed;
  while (const auto range = bitmap.claim(0, count_max)) {
    RC_ASSERT(range->count >= 1 && range->count <= count_max);
    for (std::uint64_t at = range->first; at < range->end(); ++at) RC_ASSERT(claimed.insert(at).second);
  }
  return claimed;
}

TEST(ChangeBitmapProperty, ClaimsGiveEachMarkedGranuleOnce) {
  EXPECT_TRUE(rc::check([] {
    const auto marks = scattered();
    ChangeBitmap bitmap(marks.granule_count);
    mark(bitmap, marks);
    RC_ASSERT(bitmap.count() == marks.granules.size());
    RC_ASSERT(all_claims(bitmap, *rc::gen::inRange<std::uint64_t>(1, 300)) == marks.granules);
    RC_ASSERT(bitmap.empty());
  }));
}

TEST(ChangeBitmapProperty, MarkingTwiceIsMarkingOnce) {
  EXPECT_TRUE(rc::check([] {
    const auto marks = scattered();
    ChangeBitmap bitmap(marks.granule_count);
    mark(bitmap, marks);
    mark(bitmap, marks);
    RC_ASSERT(bitmap.count() == marks.granules.size());
    RC_ASSERT(all_claims(bitmap, UINT64_MAX) == marks.granules);
  }));
}

TEST(ChangeBitmapProperty, FindSeesTheFirstRunWhole) {
  EXPECT_TRUE(rc::check([] {
    const auto marks = scattered();
    ChangeBitmap bitmap(marks.granule_count);
    mark(bitmap, marks);
    const auto from = *rc::gen::inRange<std::uint64_t>(0, marks.granule_count + 2);
    const auto found = bitmap.find(from, UINT64_MAX);
    const auto first = marks.granules.lower_bound(from);
    RC_ASSERT(found.has_value() == (first != marks.granules.end()));
    if (!found) return;
    RC_ASSERT(found->first == *first);
    for (std::uint64_t at = found->first; at < found->end(); ++at) RC_ASSERT(marks.granules.contains(at));
    RC_ASSERT(!marks.granules.contains(found->end()));
  }));
}

TEST(ChangeBitmapProperty, ClearingTakesExactlyItsRange) {
  EXPECT_TRUE(rc::check([] {
    const auto marks = scattered();
    ChangeBitmap bitmap(marks.granule_count);
    mark(bitmap, marks);
    const auto first = *rc::gen::inRange<std::uint64_t>(0, marks.granule_count);
    const GranuleRange range{first, *rc::gen::inRange<std::uint64_t>(0, marks.granule_count - first + 1)};
    RC_ASSERT(bitmap.count(range) == std::uint64_t(std::distance(marks.granules.lower_bound(range.first),
                                                                 marks.granules.lower_bound(range.end()))));
    bitmap.clear(range);
    Granules expected = marks.granules;
    expected.erase(expected.lower_bound(range.first), expected.lower_bound(range.end()));
    RC_ASSERT(bitmap.count() == expected.size());
    RC_ASSERT(all_claims(bitmap, UINT64_MAX) == expected);
  }));
}

}  // namespace
}  // namespace blockferry

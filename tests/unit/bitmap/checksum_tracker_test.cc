// SPDX-License-Identifier: Apache-2.0
#include "bitmap/checksum_tracker.h"

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include <gtest/gtest.h>

namespace blockferry {
namespace {

class Records : public RecordedChecksums {
 public:
  explicit Records(std::uint64_t granules) : values(granules) {
    for (std::uint64_t i = 0; i < granules; ++i) values[i] = i * 31 + 7;
  }
  Result<void> read(std::uint64_t first, std::span<std::uint64_t> out) override {
    if (fails) return fail(make_error(ErrorCode::io, "read", "the records", "as told"));
    std::copy_n(values.begin() + std::ptrdiff_t(first), out.size(), out.begin());
    return {};
  }

  std::vector<std::uint64_t> values;
  bool fails = false;
};

/// A source, a tracker that compares it with the records, and the reads that are out.
class ChecksumTrackerTest : public testing::Test {
 protected:
  static constexpr std::uint64_t granules = 1000;

  void change(std::uint64_t granule) { source[granule] ^= 1; }
  Result<void> answer(GranuleRange range) {
    return tracker.on_read(range, std::span(source).subspan(range.first, range.count));
  }

  Records records{granules};
  std::vector<std::uint64_t> source = records.values;
  ChangeBitmap dirty{granules};
  ChecksumTracker tracker{granules, records};
};

TEST_F(ChecksumTrackerTest, MarksExactlyWhatDiffers) {
  for (const std::uint64_t changed : {0, 1, 2, 63, 64, 500, 999}) change(changed);
  tracker.begin_pass(dirty, 0);
  std::uint64_t expected = 0;
  while (const auto range = tracker.next_read(64)) {
    EXPECT_EQ(range->first, expected);  // in order, without gaps
    EXPECT_LE(range->count, 64U);
    EXPECT_EQ(tracker.collected(), expected);
    expected = range->end();
    ASSERT_TRUE(answer(*range));
    EXPECT_EQ(tracker.collected(), expected);
  }
  EXPECT_EQ(expected, granules);
  EXPECT_EQ(dirty.count(), 7U);
  for (const std::uint64_t changed : {0, 1, 2, 63, 64, 500, 999}) EXPECT_TRUE(dirty.test(changed));
}

TEST_F(ChecksumTrackerTest, ReadsNothingThatIsDirtyAlready) {
  dirty.set({10, 50});
  dirty.set({999, 1});
  change(20);
  change(70);
  tracker.begin_pass(dirty, 0);
  std::vector<GranuleRange> asked;
  while (const auto range = tracker.next_read(400)) asked.push_back(*range);
  EXPECT_EQ(asked, (std::vector<GranuleRange>{{0, 10}, {60, 400}, {460, 400}, {860, 139}}));
  for (const auto& range : asked) ASSERT_TRUE(answer(range));
  EXPECT_EQ(tracker.collected(), granules);
  EXPECT_EQ(dirty.count(), 52U);
}

TEST_F(ChecksumTrackerTest, AllDirtyNeedsNoReadAtAll) {
  dirty.set_all();
  tracker.begin_pass(dirty, 0);
  EXPECT_EQ(tracker.next_read(64), std::nullopt);
  EXPECT_EQ(tracker.collected(), granules);
}

TEST_F(ChecksumTrackerTest, CollectedWaitsForTheOldestAnswer) {
  tracker.begin_pass(dirty, 0);
  const auto first = *tracker.next_read(100), second = *tracker.next_read(100),
             third = *tracker.next_read(100);
  EXPECT_EQ(tracker.collected(), 0U);
  ASSERT_TRUE(answer(second));
  EXPECT_EQ(tracker.collected(), 0U);
  ASSERT_TRUE(answer(first));
  EXPECT_EQ(tracker.collected(), 200U);
  ASSERT_TRUE(answer(third));
  EXPECT_EQ(tracker.collected(), 300U);
}

TEST_F(ChecksumTrackerTest, AnswersInAnyOrderMarkTheSameAndNeverTooEarly) {
  std::mt19937_64 random(11);
  std::set<std::uint64_t> changed;
  for (int i = 0; i < 100; ++i) changed.insert(random() % granules);
  for (const std::uint64_t granule : changed) change(granule);
  tracker.begin_pass(dirty, 0);
  std::vector<GranuleRange> out;
  for (bool more = true; more || !out.empty();) {
    if (more && (out.size() < 5 || random() % 2 == 0)) {
      const auto range = tracker.next_read(1 + random() % 40);
      more = range.has_value();
      if (range) out.push_back(*range);
    } else {
      const auto chosen = out.begin() + std::ptrdiff_t(random() % out.size());
      ASSERT_TRUE(answer(*chosen));
      out.erase(chosen);
    }
    // All that lies below collected() must be marked: a crash goes on from there.
    for (const std::uint64_t granule : changed) {
      ASSERT_TRUE(granule >= tracker.collected() || dirty.test(granule)) << granule;
    }
  }
  EXPECT_EQ(tracker.collected(), granules);
  EXPECT_EQ(dirty.count(), changed.size());
}

TEST_F(ChecksumTrackerTest, GoesOnWhereAnEarlierProcessStopped) {
  change(299);
  change(300);
  tracker.begin_pass(dirty, 300);
  EXPECT_EQ(tracker.collected(), 300U);
  while (const auto range = tracker.next_read(128)) ASSERT_TRUE(answer(*range));
  EXPECT_FALSE(dirty.test(299));
  EXPECT_TRUE(dirty.test(300));
  tracker.begin_pass(dirty, granules + 5);
  EXPECT_EQ(tracker.collected(), granules);
  EXPECT_EQ(tracker.next_read(128), std::nullopt);
}

TEST_F(ChecksumTrackerTest, RecordsThatCannotBeReadHoldThePassUp) {
  tracker.begin_pass(dirty, 0);
  const auto range = *tracker.next_read(100);
  records.fails = true;
  const auto failed = answer(range);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, ErrorCode::io);
  EXPECT_EQ(tracker.collected(), 0U);
  records.fails = false;
  ASSERT_TRUE(answer(range));
  EXPECT_EQ(tracker.collected(), 100U);
}

TEST_F(ChecksumTrackerTest, AnEmptyVolumeIsCollectedAtOnce) {
  ChangeBitmap empty(0);
  Records none(0);
  ChecksumTracker nothing(0, none);
  nothing.begin_pass(empty, 0);
  EXPECT_EQ(nothing.next_read(64), std::nullopt);
  EXPECT_EQ(nothing.collected(), 0U);
}

}  // namespace
}  // namespace blockferry

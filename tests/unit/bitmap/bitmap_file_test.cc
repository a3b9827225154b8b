// SPDX-License-Identifier: Apache-2.0
#include "bitmap/bitmap_file.h"

#include <cstring>

#include <gtest/gtest.h>

#include "blockio/base/checksum.h"
#include "blockio/base/units.h"
#include "tests/unit/bitmap/bitmap_file_fixture.h"

namespace blockferry::test {
namespace {

class AtSize : public testing::TestWithParam<std::uint64_t> {};

TEST_P(AtSize, GivesBackWhatWasCommitted) {
  const std::uint64_t granules = GetParam();
  for (const bool all_set : {false, true}) {
    Medium medium;
    auto created = BitmapFile::create(file_on(medium), granules, granule_bytes, all_set);
    ASSERT_TRUE(created) << created.error().message();
    Content content = uniform_content(granules, all_set);
    std::mt19937_64 random(granules);
    for (std::uint64_t generation = 1; generation < 12; ++generation) {
      EXPECT_EQ((*created)->generation(), generation);
      const auto opened = open_and_load(medium, granules, generation);
      ASSERT_TRUE(opened) << opened.error().message();
      EXPECT_EQ(opened->file->generation(), generation);
      ASSERT_EQ(opened->content, content);
      EXPECT_FALSE(open_and_load(medium, granules, generation + 1));
      ASSERT_TRUE((*created)->commit(change_pages(content, granules, random)));
    }
  }
}

TEST_P(AtSize, GoesOnFromWhatAnotherProcessLeft) {
  const std::uint64_t granules = GetParam();
  Medium medium;
  ASSERT_TRUE(BitmapFile::create(file_on(medium), granules, granule_bytes, true));
  Content content = uniform_content(granules, true);
  std::mt19937_64 random(granules);
  for (std::uint64_t generation = 1; generation < 12; ++generation) {
    auto opened = open_and_load(medium, granules, generation);
    ASSERT_TRUE(opened) << opened.error().message();
    ASSERT_EQ(opened->content, content);
    ASSERT_TRUE(opened->file->commit(change_pages(content, granules, random)));
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, AtSize, testing::Values(0, 1, 64, 32767, 32768, 32769, 5 * 32768 + 77),
                         testing::PrintToStringParamName());

TEST(BitmapFile, AddsToWhatTheBitmapHolds) {
  Medium medium;
  auto created = BitmapFile::create(file_on(medium), 100, granule_bytes, false);
  ASSERT_TRUE(created);
  BitmapPage page;
  page.words[0] = 0b1010;
  ASSERT_TRUE((*created)->commit({page}));
  ChangeBitmap bitmap(100);
  bitmap.set({0, 1});
  ASSERT_TRUE((*created)->load(bitmap));
  EXPECT_EQ(bitmap.count(), 3U);
  EXPECT_TRUE(bitmap.test(0) && bitmap.test(1) && bitmap.test(3));
}

TEST(BitmapFile, TheLastOfTwoContentsOfAPageCounts) {
  Medium medium;
  auto created = BitmapFile::create(file_on(medium), 100, granule_bytes, false);
  ASSERT_TRUE(created);
  BitmapPage before, first, second;
  before.words[0] = 4;
  first.words[0] = 1;
  second.words[0] = 2;
  ASSERT_TRUE((*created)->commit({before}));
  medium.crash_at = medium.operations + 3;  // after both pages and their sync, before the index
  EXPECT_THROW(static_cast<void>((*created)->commit({first, second})), Crash);
  EXPECT_EQ(open_and_load(medium, 100)->content[0], 4U);
  medium.crash_at.reset();
  ASSERT_TRUE(open_and_load(medium, 100)->file->commit({first, second}));
  EXPECT_EQ(open_and_load(medium, 100)->content[0], 2U);
}

/// The format is what another version has to read: the bytes themselves.
TEST(BitmapFile, WritesTheFormatAsDrawn) {
  Medium medium;
  auto created = BitmapFile::create(file_on(medium), 3 * 32768 - 1, 8192, true);
  ASSERT_TRUE(created);
  BitmapPage clear, mixed;
  clear.index = 0;
  mixed.index = 2;
  mixed.words[1] = 5;
  ASSERT_TRUE((*created)->commit({clear, mixed}));
  ASSERT_EQ(medium.durable.size(), 2 * 4096 + 3 * 2 * 4096U);
  const auto u64 = [&](std::size_t offset) {
    std::uint64_t value = 0;
    std::memcpy(&value, medium.durable.data() + offset, sizeof value);
    return value;
  };
  EXPECT_EQ(std::memcmp(medium.durable.data(), "BFBITMP1", 8), 0);  // generation 2: index 0
  EXPECT_EQ(u64(8), 1U);
  EXPECT_EQ(u64(16), 2U);
  EXPECT_EQ(u64(24), 3 * 32768U - 1);
  EXPECT_EQ(u64(32), 8192U);
  EXPECT_EQ(u64(48), 0U);  // all clear
  EXPECT_EQ(u64(64), 1U);  // all set
  EXPECT_EQ(u64(80), 2U);  // slot 0
  EXPECT_EQ(u64(88), crc64(std::as_bytes(std::span(mixed.words))));
  Bytes index(medium.durable.begin(), medium.durable.begin() + 48 + 3 * 16);
  std::fill_n(index.begin() + 40, 8, std::byte(0));
  EXPECT_EQ(u64(40), crc64(index));
  EXPECT_EQ(u64(2 * 4096 + 2 * 2 * 4096 + 8), 5U);
}

TEST(BitmapFile, ACommitWritesChangedPagesAndTheIndexAlone) {
  constexpr std::uint64_t granules = TiB / (4 * KiB);
  constexpr std::uint64_t index_bytes = 48 + 8192 * 16;
  Medium medium;
  auto created = BitmapFile::create(file_on(medium), granules, granule_bytes, true);
  ASSERT_TRUE(created);
  BitmapPage uniform, mixed;
  uniform.index = 77;
  mixed.index = 4711;
  mixed.words[13] = 1;
  medium.writes = medium.bytes_written = 0;
  ASSERT_TRUE((*created)->commit({uniform, mixed}));
  EXPECT_EQ(medium.writes, 2U);
  EXPECT_LE(medium.bytes_written, 4096 + index_bytes + 4096);
  medium.writes = medium.bytes_written = 0;
  ASSERT_TRUE((*created)->commit({}));
  EXPECT_EQ(medium.writes, 1U);
}

TEST(BitmapFile, PagesThatBecomeUniformGiveTheirSpaceBack) {
  constexpr std::uint64_t granules = 2 * 32768;
  Medium medium;
  auto created = BitmapFile::create(file_on(medium), granules, granule_bytes, false);
  ASSERT_TRUE(created);
  BitmapPage page;
  page.index = 1;
  const auto slots_hold_data = [&] {
    return std::any_of(medium.current.begin() + 4 * 4096, medium.current.end(),
                       [](std::byte value) { return value != std::byte(0); });
  };
  for (int i = 1; i < 4; ++i) {
    page.words[9] = std::uint64_t(i);
    ASSERT_TRUE((*created)->commit({page}));
  }
  EXPECT_TRUE(slots_hold_data());
  page.words[9] = 0;
  ASSERT_TRUE((*created)->commit({page}));
  EXPECT_FALSE(slots_hold_data());
  std::fill(std::begin(page.words), std::end(page.words), ~0ULL);
  ASSERT_TRUE((*created)->commit({page}));
  EXPECT_FALSE(slots_hold_data());
  EXPECT_EQ(open_and_load(medium, granules)->content[512], ~0ULL);
}

TEST(BitmapFile, AbsurdSizesAreRefused) {
  Medium medium;
  EXPECT_EQ(BitmapFile::create(file_on(medium), UINT64_MAX, granule_bytes, true).error().code,
            ErrorCode::invalid_argument);
  EXPECT_EQ(BitmapFile::open(file_on(medium), UINT64_MAX, granule_bytes, 0).error().code,
            ErrorCode::state_damaged);
  // A large volume's file that is not there costs no memory either.
  EXPECT_EQ(BitmapFile::open(file_on(medium), 1ULL << 40, granule_bytes, 0).error().code,
            ErrorCode::state_damaged);
}

}  // namespace
}  // namespace blockferry::test

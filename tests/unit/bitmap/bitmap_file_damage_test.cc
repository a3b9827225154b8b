// SPDX-License-Identifier: Apache-2.0
// Files that are not what was written: cut, flipped, of another version, or made up with valid checksums.
// Never a wrong answer: the true content, or an error.
#include <cstring>

#include <gtest/gtest.h>

#include "blockio/base/checksum.h"
#include "tests/unit/bitmap/bitmap_file_fixture.h"

namespace blockferry::test {
namespace {

constexpr std::uint64_t granules = 32768 + 500;
constexpr std::size_t block = 4096;  // one for each index here

// In pages each byte is like the other: a sanitizer build, many times slower, takes but some of them.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::size_t stride = 13;
#else
constexpr std::size_t stride = 1;
#endif

class DamagedFile : public testing::Test {
 protected:
  /// Generation 4: index 0 is the newest, index 1 the one before, both slots in use.
  void SetUp() override {
    auto file = BitmapFile::create(file_on(medium), granules, granule_bytes, true);
    ASSERT_TRUE(file);
    std::mt19937_64 random(5);
    content = uniform_content(granules, true);
    for (int i = 0; i < 3; ++i) {
      previous = content;
      ASSERT_TRUE((*file)->commit(change_pages(content, granules, random, 1)));
    }
    BitmapPage mixed;
    content[0] = mixed.words[0] = 3;
    std::copy_n(mixed.words, 512, content.begin());
    previous = content;
    ASSERT_TRUE((*file)->commit({mixed}));
    content[1] = mixed.words[1] = 9;
    ASSERT_TRUE((*file)->commit({mixed}));
    generation = (*file)->generation();
    newest = generation % 2 * block;
    medium.sync();
  }

  /// With the newest generation known, an answer must be its content; else it may be the one before.
  void expect_truth_or_error(Medium& damaged) {
    const auto opened = open_and_load(damaged, granules, generation);
    if (opened) {
      ASSERT_EQ(opened->content, content);
      return;
    }
    ASSERT_TRUE(opened.error().code == ErrorCode::state_damaged ||
                opened.error().code == ErrorCode::state_newer);
    ASSERT_FALSE(opened.error().message().empty());
    const auto unaware = open_and_load(damaged, granules, 0);
    ASSERT_TRUE(!unaware || unaware->content == content || unaware->content == previous);
  }

  void put_u32(std::size_t offset, std::uint32_t value) {
    std::memcpy(medium.current.data() + offset, &value, sizeof value);
  }
  void put_u64(std::size_t offset, std::uint64_t value) {
    std::memcpy(medium.current.data() + offset, &value, sizeof value);
  }
  std::uint64_t get_u64(std::size_t offset) {
    std::uint64_t value = 0;
    std::memcpy(&value, medium.current.data() + offset, sizeof value);
    return value;
  }
  /// As if whoever made it up had known the format.
  void fix_index_checksum(std::size_t index) {
    put_u64(index + 40, 0);
    const auto bytes = std::span(medium.current).subspan(index, 48 + pages_of(granules) * 16);
    put_u64(index + 40, crc64(bytes));
  }
  ErrorCode error_of_open() {
    const auto opened = open_and_load(medium, granules, 0);
    return opened ? ErrorCode::internal : opened.error().code;
  }

  Medium medium;
  Content content, previous;
  std::uint64_t generation = 0;
  std::size_t newest = 0;  ///< its index's offset
};

TEST_F(DamagedFile, IsWholeToBeginWith) {
  EXPECT_EQ(open_and_load(medium, granules, generation)->content, content);
  EXPECT_NE(content, previous);
}

TEST_F(DamagedFile, CutOrGrownToAnyLength) {
  const std::size_t whole = medium.current.size();
  for (std::size_t length = 0; length <= whole + 2; ++length) {
    Medium cut = medium;
    cut.current.resize(length);
    const auto opened = open_and_load(cut, granules, generation);
    if (length == whole) {
      ASSERT_TRUE(opened);
    } else {
      ASSERT_FALSE(opened) << length;
      ASSERT_EQ(opened.error().code, ErrorCode::state_damaged);
    }
  }
}

TEST_F(DamagedFile, AnyBitFlipped) {
  for (std::size_t at = 0; at < medium.current.size(); at += (at % block < 128 ? 1 : stride)) {
    const auto flip = std::byte(1U << (at * 5 % 8));
    medium.current[at] ^= flip;
    ASSERT_NO_FATAL_FAILURE(expect_truth_or_error(medium)) << "byte " << at;
    medium.current[at] ^= flip;
  }
}

TEST_F(DamagedFile, AnySectorLostOrExchanged) {
  constexpr std::size_t sector = Medium::sector_bytes;
  for (std::size_t at = 0; at < medium.current.size(); at += sector) {
    Medium damaged = medium;
    std::fill_n(damaged.current.begin() + std::ptrdiff_t(at), sector, std::byte(0));
    ASSERT_NO_FATAL_FAILURE(expect_truth_or_error(damaged)) << "sector at " << at;
  }
  for (std::size_t one = 0; one < medium.current.size(); one += block) {
    for (std::size_t other = 0; other < one; other += block) {
      Medium damaged = medium;
      std::swap_ranges(damaged.current.begin() + std::ptrdiff_t(one),
                       damaged.current.begin() + std::ptrdiff_t(one + block),
                       damaged.current.begin() + std::ptrdiff_t(other));
      ASSERT_NO_FATAL_FAILURE(expect_truth_or_error(damaged)) << one << " and " << other;
    }
  }
}

TEST_F(DamagedFile, TheNewestGenerationLostIsNoticed) {
  std::fill_n(medium.current.begin() + std::ptrdiff_t(newest), block, std::byte(0));
  EXPECT_EQ(open_and_load(medium, granules, generation).error().code, ErrorCode::state_damaged);
  EXPECT_EQ(open_and_load(medium, granules, generation - 1)->content, previous);
}

TEST_F(DamagedFile, AnIndexThatCannotBeReadIsNotTakenForATornOne) {
  for (const std::size_t index : {0UL, block}) {
    medium.fail_reads_in = index;
    EXPECT_EQ(error_of_open(), ErrorCode::io);
  }
}

TEST_F(DamagedFile, APageThatCannotBeReadIsAnError) {
  bool failed = false;
  for (std::size_t page = 2 * block; page < medium.current.size(); page += block) {
    medium.fail_reads_in = page;
    const auto opened = open_and_load(medium, granules, generation);
    if (opened) {
      EXPECT_EQ(opened->content, content);
    } else {
      EXPECT_EQ(opened.error().code, ErrorCode::io);
      failed = true;
    }
  }
  EXPECT_TRUE(failed);
}

TEST_F(DamagedFile, ALaterVersionIsLeftUntouched) {
  for (const std::size_t index : {0UL, block}) {
    Medium before = medium;
    put_u32(index + 8, 2);
    fix_index_checksum(index);
    const Bytes found = medium.current;
    EXPECT_EQ(error_of_open(), ErrorCode::state_newer);
    EXPECT_EQ(medium.current, found);
    EXPECT_EQ(medium.unsynced(), 0U);
    medium = before;
  }
}

TEST_F(DamagedFile, OfAnotherGeometry) {
  for (const auto& [count, bytes] : {std::pair{granules + 1, granule_bytes},
                                     {granules - 1, granule_bytes},
                                     {granules, 2 * granule_bytes},
                                     {std::uint64_t(0), granule_bytes}}) {
    const auto opened = BitmapFile::open(file_on(medium), count, bytes, 0);
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, ErrorCode::state_damaged);
  }
}

TEST_F(DamagedFile, MadeUpWithValidChecksums) {
  const std::size_t last_entry = newest + 48 + 16;
  const std::size_t last_page_slot_0 = 2 * block + 2 * block;
  const Bytes good = medium.current;
  const std::vector<std::pair<const char*, std::function<void()>>> inventions{
      {"a kind that does not exist", [&] { put_u64(last_entry, 4); }},
      {"a kind far beyond", [&] { put_u64(last_entry, UINT64_MAX); }},
      {"version 0", [&] { put_u32(newest + 8, 0); }},
      {"another volume's count", [&] { put_u64(newest + 24, UINT64_MAX); }},
      {"no granule size", [&] { put_u64(newest + 32, 0); }},
      {"generation 0", [&] { put_u64(newest + 16, 0); }},
      {"a generation that no commit can follow", [&] { put_u64(newest + 16, UINT64_MAX - 1); }},
      {"the other index's generation", [&] { put_u64(newest + 16, generation + 1); }},
      {"a page that marks what lies beyond the volume",
       [&] {
         put_u64(last_entry, 2);
         put_u64(last_page_slot_0 + 8 * 511, 1ULL << 63);
         put_u64(last_entry + 8, crc64(std::span(medium.current).subspan(last_page_slot_0, block)));
       }},
      {"a page that marks the granule after the last",
       [&] {
         put_u64(last_entry, 2);
         std::fill_n(medium.current.begin() + std::ptrdiff_t(last_page_slot_0), block, std::byte(0));
         put_u64(last_page_slot_0 + 8 * (500 / 64), 1ULL << (500 % 64));
         put_u64(last_entry + 8, crc64(std::span(medium.current).subspan(last_page_slot_0, block)));
       }},
  };
  for (const auto& [what, invent] : inventions) {
    invent();
    fix_index_checksum(newest);
    const auto opened = open_and_load(medium, granules, generation);
    ASSERT_FALSE(opened) << what;
    EXPECT_EQ(opened.error().code, ErrorCode::state_damaged) << what;
    medium.current = good;
  }
  // The same ways, but true: the last granule's own mark is taken.
  put_u64(last_entry, 2);
  std::fill_n(medium.current.begin() + std::ptrdiff_t(last_page_slot_0), block, std::byte(0));
  put_u64(last_page_slot_0 + 8 * (499 / 64), 1ULL << (499 % 64));
  put_u64(last_entry + 8, crc64(std::span(medium.current).subspan(last_page_slot_0, block)));
  fix_index_checksum(newest);
  EXPECT_TRUE(open_and_load(medium, granules, generation));
  EXPECT_EQ(get_u64(newest + 16), generation);
}

}  // namespace
}  // namespace blockferry::test

// SPDX-License-Identifier: Apache-2.0
// The change bitmap against a plain std::vector<bool>, at sizes around every boundary of its levels.
#include "bitmap/change_bitmap.h"

#include <cstdio>
#include <random>
#include <vector>

#include <gtest/gtest.h>
#include <unistd.h>

#include "blockio/base/units.h"

namespace blockferry {
namespace {

/// What ChangeBitmap must be, one bit at a time.
class Model {
 public:
  explicit Model(std::uint64_t granules) : bits_(granules) {}

  void assign(GranuleRange range, bool value) {
    for (std::uint64_t i = range.first; i < range.end(); ++i) bits_[i] = value;
  }
  bool test(std::uint64_t granule) const { return bits_[granule]; }
  std::uint64_t count(GranuleRange range) const {
    std::uint64_t total = 0;
    for (std::uint64_t i = range.first; i < range.end(); ++i) total += bits_[i] ? 1 : 0;
    return total;
  }
  std::optional<GranuleRange> find(std::uint64_t from, std::uint64_t count_max) const {
    while (from < bits_.size() && !bits_[from]) ++from;
    if (from >= bits_.size() || count_max == 0) return std::nullopt;
    std::uint64_t end = from;
    while (end < bits_.size() && end - from < count_max && bits_[end]) ++end;
    return GranuleRange{from, end - from};
  }
  std::uint64_t size() const { return bits_.size(); }

 private:
  std::vector<bool> bits_;
};

void expect_equal(const ChangeBitmap& bitmap, const Model& model) {
  ASSERT_EQ(bitmap.count(), model.count({0, model.size()}));
  for (std::uint64_t i = 0; i < model.size(); ++i) ASSERT_EQ(bitmap.test(i), model.test(i)) << i;
  std::uint64_t words[512];
  for (std::uint64_t page = 0; page < bitmap.page_count(); ++page) {
    bitmap.read_page(page, words);
    const std::uint64_t start = page * ChangeBitmap::page_bits;
    std::uint64_t in_page = 0;
    for (std::uint64_t i = 0; i < ChangeBitmap::page_bits; ++i) {
      const bool bit = (words[i / 64] >> (i % 64) & 1) != 0;
      ASSERT_EQ(bit, start + i < model.size() && model.test(start + i)) << start + i;
      in_page += bit ? 1 : 0;
    }
    ASSERT_EQ(bitmap.page_has_bits(page), in_page > 0) << page;
  }
}

class AtSize : public testing::TestWithParam<std::uint64_t> {};

TEST_P(AtSize, DoesAsThePlainModel) {
  const std::uint64_t granules = GetParam();
  ChangeBitmap bitmap(granules);
  Model model(granules);
  std::mt19937_64 random(granules);
  const auto below = [&](std::uint64_t end) { return end == 0 ? 0 : random() % end; };
  for (int step = 0; step < 600; ++step) {
    const std::uint64_t first = below(granules + 1);
    // Mostly short runs, now and then a long one.
    const std::uint64_t length_max =
        random() % 8 == 0 ? granules - first : std::min<std::uint64_t>(granules - first, 200);
    const GranuleRange range{first, below(length_max + 1)};
    switch (random() % 5) {
      case 0:
      case 1:
        bitmap.set(range);
        model.assign(range, true);
        break;
      case 2:
        bitmap.clear(range);
        model.assign(range, false);
        break;
      case 3: {
        const std::uint64_t count_max = 1 + below(300);
        const auto claimed = bitmap.claim(first, count_max);
        ASSERT_EQ(claimed, model.find(first, count_max));
        if (claimed) model.assign(*claimed, false);
        break;
      }
      default:
        ASSERT_EQ(bitmap.find(first, range.count), model.find(first, range.count));
        ASSERT_EQ(bitmap.count(range), model.count(range));
    }
    ASSERT_EQ(bitmap.count(), model.count({0, granules}));
    ASSERT_EQ(bitmap.empty(), bitmap.count() == 0);
  }
  expect_equal(bitmap, model);
}

TEST_P(AtSize, SetsAndClearsEverything) {
  const std::uint64_t granules = GetParam();
  ChangeBitmap bitmap(granules);
  EXPECT_TRUE(bitmap.empty());
  EXPECT_EQ(bitmap.find(0, 1), std::nullopt);
  bitmap.set_all();
  EXPECT_EQ(bitmap.count(), granules);
  if (granules > 0) {
    EXPECT_EQ(bitmap.find(0, UINT64_MAX), (GranuleRange{0, granules}));
    EXPECT_EQ(bitmap.claim(granules - 1, UINT64_MAX), (GranuleRange{granules - 1, 1}));
  }
  EXPECT_EQ(bitmap.find(granules, 1), std::nullopt);
  EXPECT_EQ(bitmap.find(0, 0), std::nullopt);
  bitmap.clear_all();
  EXPECT_TRUE(bitmap.empty());
  expect_equal(bitmap, Model(granules));
}

TEST_P(AtSize, PagesCarryEverythingOver) {
  const std::uint64_t granules = GetParam();
  ChangeBitmap from(granules), to(granules);
  Model model(granules);
  std::mt19937_64 random(granules + 1);
  for (std::uint64_t i = 0; i < granules; i += 1 + random() % 90) {
    from.set({i, 1});
    model.assign({i, 1}, true);
  }
  for (std::uint64_t i = 0; i < granules; i += 1 + random() % 9000) {  // some bits are there already
    to.set({i, 1});
    model.assign({i, 1}, true);
  }
  std::uint64_t words[512];
  for (std::uint64_t page = 0; page < from.page_count(); ++page) {
    from.read_page(page, words);
    to.or_page(page, words);
  }
  expect_equal(to, model);
}

INSTANTIATE_TEST_SUITE_P(Sizes, AtSize,
                         testing::Values(0, 1, 2, 63, 64, 65, 127, 4095, 4096, 4097, 32767, 32768, 32769,
                                         70000, 64 * 64 * 64, 64 * 64 * 64 + 1),
                         testing::PrintToStringParamName());

TEST(ChangeBitmap, IgnoresWhatAPageHoldsBeyondTheVolume) {
  ChangeBitmap bitmap(100);
  std::uint64_t words[512] = {~0ULL, ~0ULL};
  bitmap.or_page(0, words);
  EXPECT_EQ(bitmap.count(), 100U);
  EXPECT_EQ(bitmap.find(0, UINT64_MAX), (GranuleRange{0, 100}));
}

TEST(ChangeBitmap, MarksBeyondTheVolumeStopTheProgram) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  ChangeBitmap bitmap(100);
  EXPECT_DEATH(bitmap.set({100, 1}), "beyond the volume");
  EXPECT_DEATH(bitmap.set({1, UINT64_MAX}), "beyond the volume");
  EXPECT_DEATH(bitmap.clear({99, 2}), "beyond the volume");
  EXPECT_DEATH(bitmap.test(100), "beyond the volume");
}

/// Resident memory of this process.
std::uint64_t resident_bytes() {
  unsigned long long total = 0, resident = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr) return 0;
  const int read = std::fscanf(file, "%llu %llu", &total, &resident);
  std::fclose(file);
  return read == 2 ? resident * std::uint64_t(::sysconf(_SC_PAGESIZE)) : 0;
}

TEST(ChangeBitmap, UsesMemoryOnlyWhereBitsAre) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "sanitizers keep memory of their own for each word";
#endif
  constexpr std::uint64_t granules = 64 * TiB / (4 * KiB);
  const std::uint64_t before = resident_bytes();
  ChangeBitmap bitmap(granules);
  for (std::uint64_t i = 0; i < 16; ++i) bitmap.set({i * (granules / 16) + i, 3});
  std::uint64_t found = 0;
  for (auto range = bitmap.find(0, UINT64_MAX); range; range = bitmap.find(range->end(), UINT64_MAX))
    found += range->count;
  EXPECT_EQ(found, 48U);
  bitmap.clear({granules / 4, granules / 2});
  EXPECT_EQ(bitmap.count(), 48U - 8 * 3);
  EXPECT_LT(resident_bytes() - before, 4 * MiB);

  // 2 TiB of dirty volume: 64 MiB of bits, given back at once.
  bitmap.set({0, 2 * TiB / (4 * KiB)});
  EXPECT_GT(resident_bytes() - before, 60 * MiB);
  bitmap.clear_all();
  EXPECT_LT(resident_bytes() - before, 4 * MiB);
  EXPECT_EQ(bitmap.find(0, 1), std::nullopt);
}

}  // namespace
}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// Markers, the claiming owner and a reader at once. What is checked is invariant 1 itself: a marker changes a
// granule's "data" and then marks it; the owner claims, then reads the data. When all is done, the owner must
// have read the last data of every granule.
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "bitmap/change_bitmap.h"

namespace blockferry {
namespace {

constexpr std::uint64_t granules = 64 * 64 * 64 + 1000;  // four levels
constexpr unsigned marker_count = 3;
constexpr unsigned marks_each = 60000;
/// Set before all and never claimed: the bitmap is never empty.
constexpr std::uint64_t sticky = 0;

class Volume {
 public:
  Volume() : data(granules), read(granules) {}

  /// A write that ends, as a tracker sees it.
  void write(GranuleRange range) {
    for (std::uint64_t i = range.first; i < range.end(); ++i) data[i].fetch_add(1, std::memory_order_relaxed);
    dirty.set(range);
  }

  /// The owner's part: claim, then read.
  bool claim_and_read(std::uint64_t& cursor, std::uint64_t count_max) {
    auto range = dirty.claim(cursor, count_max);
    if (!range) {
      cursor = sticky + 1;
      range = dirty.claim(cursor, count_max);
    }
    if (!range) return false;
    for (std::uint64_t i = range->first; i < range->end(); ++i)
      read[i] = data[i].load(std::memory_order_relaxed);
    cursor = range->end();
    return true;
  }

  ChangeBitmap dirty{granules};
  std::vector<std::atomic<std::uint32_t>> data;
  std::vector<std::uint32_t> read;  ///< the owner's
};

/// `hot`: only a few granules, each alone in its summary word, so that summaries rise and fall all the time.
void mark_at_random(Volume& volume, unsigned seed, bool hot) {
  std::mt19937_64 random(seed);
  for (unsigned i = 0; i < marks_each; ++i) {
    if (hot) {
      volume.write({1 + random() % 8 * 32768 + random() % 2, 1});
      continue;
    }
    const std::uint64_t first = 1 + random() % (granules - 1);
    const std::uint64_t length_max = random() % 64 == 0 ? 3000 : 4;
    volume.write({first, 1 + random() % std::min(granules - first, length_max)});
  }
}

void stress(bool hot) {
  Volume volume;
  volume.dirty.set({sticky, 1});
  std::atomic<unsigned> marking = marker_count;
  std::atomic<bool> reading = true;
  std::atomic<std::uint64_t> wrong_looks = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < marker_count; ++i) {
    threads.emplace_back([&, i] {
      mark_at_random(volume, i + 1, hot);
      --marking;
    });
  }
  // Never told that nothing is dirty, never shown more than there is.
  std::thread reader([&] {
    std::uint64_t words[512];
    for (std::uint64_t page = 0; reading; page = (page + 1) % volume.dirty.page_count()) {
      volume.dirty.read_page(page, words);
      const auto found = volume.dirty.find(0, 1);
      if (volume.dirty.empty() || volume.dirty.count() > granules || !found || found->first != sticky)
        ++wrong_looks;
    }
  });
  std::uint64_t cursor = sticky + 1;
  std::uint64_t claims = 0;
  while (marking > 0) claims += volume.claim_and_read(cursor, 256) ? 1 : 0;
  for (auto& thread : threads) thread.join();
  while (volume.claim_and_read(cursor, UINT64_MAX)) ++claims;
  reading = false;
  reader.join();

  EXPECT_GT(claims, 0U);
  EXPECT_EQ(wrong_looks, 0U);
  EXPECT_EQ(volume.dirty.count(), 1U);
  std::uint64_t missed = 0;
  for (std::uint64_t i = 0; i < granules; ++i) missed += volume.read[i] != volume.data[i] ? 1 : 0;
  EXPECT_EQ(missed, 0U);
}

TEST(ChangeBitmapStress, NoMarkIsLostAllOver) {
  stress(false);
}

TEST(ChangeBitmapStress, NoMarkIsLostWhereSummariesRiseAndFall) {
  stress(true);
}

TEST(ChangeBitmapStress, MarkersOfOneWordLoseNothing) {
  ChangeBitmap bitmap(64);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (unsigned bit = i; bit < 64; bit += 4) bitmap.set({bit, 1});
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(bitmap.count(), 64U);
  EXPECT_EQ(bitmap.find(0, UINT64_MAX), (GranuleRange{0, 64}));
}

}  // namespace
}  // namespace blockferry

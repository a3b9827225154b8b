// SPDX-License-Identifier: Apache-2.0
// The change bitmap: one bit a granule, exact, atomic, hierarchical so that a nearly empty one of many TiB is
// scanned in microseconds. Marking is safe from any thread at any time; claiming belongs to one thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace blockferry {

/// A run of granules.
struct GranuleRange {
  std::uint64_t first = 0;
  std::uint64_t count = 0;
  std::uint64_t end() const { return first + count; }
  bool operator==(const GranuleRange&) const = default;
};

class ChangeBitmap {
 public:
  /// The bits of one page: the unit of persistence (bitmap_file.h).
  static constexpr std::uint64_t page_bits = 4096 * 8;

  /// All clear. Memory is reserved, and used only where bits are set.
  explicit ChangeBitmap(std::uint64_t granule_count);
  ~ChangeBitmap();
  ChangeBitmap(const ChangeBitmap&) = delete;
  ChangeBitmap& operator=(const ChangeBitmap&) = delete;

  std::uint64_t granule_count() const;
  std::uint64_t page_count() const;

  void set(GranuleRange range);    ///< any thread
  void clear(GranuleRange range);  ///< owner
  void set_all();                  ///< owner, while nobody marks
  void clear_all();                ///< owner, while nobody marks; gives the memory back
  bool test(std::uint64_t granule) const;
  std::uint64_t count() const;  ///< set bits; exact when nobody marks meanwhile, else never too small; O(1)
  std::uint64_t count(GranuleRange range) const;
  bool empty() const { return count() == 0; }

  /// The first run of set bits at or after `from`, at most `count_max` long. Clears nothing.
  std::optional<GranuleRange> find(std::uint64_t from, std::uint64_t count_max) const;

  /// As find(), and clears it: what is returned was set, and a bit set again meanwhile stays set.
  std::optional<GranuleRange> claim(std::uint64_t from, std::uint64_t count_max);

  /// 512 words: the page's bits, little-endian, bit 0 of word 0 first.
  void read_page(std::uint64_t page, std::uint64_t (&words)[512]) const;
  void or_page(std::uint64_t page, const std::uint64_t (&words)[512]);

  /// Whether any bit of the page is set: one look at the summary.
  bool page_has_bits(std::uint64_t page) const;

 private:
  /// Level 0 holds the granules' bits; a bit of level n+1 says that a word of level n may be other than zero.
  struct Level {
    std::uint64_t* words = nullptr;
    std::uint64_t count = 0;
  };

  std::uint64_t set_words(std::uint64_t first_bit, std::uint64_t bits);
  void raise_summaries(std::uint64_t first_word, std::uint64_t last_word);
  void lower_summaries(std::uint64_t first_word, std::uint64_t last_word);
  std::uint64_t clear_full_words(std::uint64_t word, GranuleRange range);
  void raise_above(std::size_t level, std::uint64_t word);
  std::uint64_t next_set_word(std::uint64_t from) const;
  std::uint64_t run_length(std::uint64_t first, std::uint64_t count_max) const;

  const std::uint64_t granule_count_;
  std::vector<Level> levels_;
  std::atomic<std::uint64_t> set_count_ = 0;
};

}  // namespace blockferry

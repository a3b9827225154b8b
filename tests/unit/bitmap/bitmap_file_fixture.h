// SPDX-License-Identifier: Apache-2.0
// What the tests of BitmapFile share: contents, and the way from a medium to its content.
#pragma once

#include <optional>
#include <random>
#include <vector>

#include "bitmap/bitmap_file.h"
#include "tests/unit/bitmap/volatile_file.h"

namespace blockferry::test {

constexpr std::uint64_t granule_bytes = 4096;

/// Every word of every page.
using Content = std::vector<std::uint64_t>;

inline std::uint64_t pages_of(std::uint64_t granules) {
  return (granules + ChangeBitmap::page_bits - 1) / ChangeBitmap::page_bits;
}

inline Content content_of(const ChangeBitmap& bitmap) {
  Content content;
  std::uint64_t words[512];
  for (std::uint64_t page = 0; page < bitmap.page_count(); ++page) {
    bitmap.read_page(page, words);
    content.insert(content.end(), std::begin(words), std::end(words));
  }
  return content;
}

inline Content uniform_content(std::uint64_t granules, bool set) {
  ChangeBitmap bitmap(granules);
  if (set) bitmap.set_all();
  return content_of(bitmap);
}

inline BitmapPage page_of(const Content& content, std::uint64_t index) {
  BitmapPage page;
  page.index = index;
  std::copy_n(content.begin() + std::ptrdiff_t(index * 512), 512, page.words);
  return page;
}

/// Gives some pages another content: all clear, all set or mixed. Returns what is to be committed.
inline std::vector<BitmapPage> change_pages(Content& content, std::uint64_t granules, std::mt19937_64& random,
                                            double share = 0.6) {
  std::vector<BitmapPage> changed;
  for (std::uint64_t index = 0; index < pages_of(granules); ++index) {
    if (double(random() >> 11) * 0x1p-53 > share) continue;
    ChangeBitmap page(std::min(ChangeBitmap::page_bits, granules - index * ChangeBitmap::page_bits));
    switch (random() % 4) {
      case 0:
        break;
      case 1:
        page.set_all();
        break;
      default:
        for (int i = 0; i < 200; ++i) page.set({random() % page.granule_count(), 1});
    }
    const Content words = content_of(page);
    std::copy(words.begin(), words.end(), content.begin() + std::ptrdiff_t(index * 512));
    changed.push_back(page_of(content, index));
  }
  return changed;
}

struct Opened {
  std::unique_ptr<BitmapFile> file;
  Content content;
};

/// The content that a new process finds.
inline Result<Opened> open_and_load(Medium& medium, std::uint64_t granules,
                                    std::uint64_t generation_min = 0) {
  auto file = BitmapFile::open(file_on(medium), granules, granule_bytes, generation_min);
  if (!file) return fail(file.error());
  ChangeBitmap bitmap(granules);
  if (auto loaded = (*file)->load(bitmap); !loaded) return fail(loaded.error());
  return Opened{std::move(*file), content_of(bitmap)};
}

}  // namespace blockferry::test

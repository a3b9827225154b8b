// SPDX-License-Identifier: Apache-2.0
// Why no set bit is ever hidden, with markers and the claiming owner at work at the same time:
//
//   A marker sets the leaf bit, then the summary bits above it, from the bottom up.
//   The owner, having cleared a leaf word to zero, clears its summary bit, then looks at the leaf word again;
//   if a marker has been there meanwhile, the owner sets the summary bit again. Likewise on every level
//   above.
//
// All of these are sequentially consistent. Either the marker's leaf bit came before the owner's second look,
// then the owner restores the summary; or it came after, then the marker's own summary bit comes after the
// owner's clearing. A summary bit above an empty word may remain; that costs a look and hides nothing. A bit
// whose set() has returned may be hidden only between the owner's clearing and its second look, and so from
// nobody but other readers.
//
// The count of set bits is raised before the bits are set, and lowered after they are cleared: it may be too
// large for a moment, but never too small, so that empty() is never said of a bitmap with a bit in it.
#include "bitmap/change_bitmap.h"

#include <algorithm>
#include <bit>

#include <sys/mman.h>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

constexpr std::uint64_t word_bits = 64;
constexpr std::uint64_t page_words = ChangeBitmap::page_bits / word_bits;
constexpr std::uint64_t none = UINT64_MAX;

std::atomic_ref<std::uint64_t> at(std::uint64_t& word) {
  return std::atomic_ref(word);
}
std::uint64_t load(const std::uint64_t& word) {
  return std::atomic_ref(const_cast<std::uint64_t&>(word)).load(std::memory_order_seq_cst);
}

/// Without the help of newer processors a population count takes as long as all the rest.
std::uint64_t bits_in(std::uint64_t word) {
  return word == ~0ULL ? word_bits : word == 0 ? 0 : std::uint64_t(std::popcount(word));
}

/// The bits of `word` that lie in [first, first + bits).
std::uint64_t mask_in_word(std::uint64_t word, std::uint64_t first, std::uint64_t bits) {
  const std::uint64_t start = word * word_bits;
  if (first <= start && first + bits >= start + word_bits) return ~0ULL;
  const std::uint64_t from = std::max(first, start) - start;
  const std::uint64_t to = std::min(first + bits, start + word_bits) - start;
  return ((1ULL << (to - from)) - 1) << from;
}

std::uint64_t* reserve(std::uint64_t words) {
  void* memory = ::mmap(nullptr, words * sizeof(std::uint64_t), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  BLOCKFERRY_CHECK(memory != MAP_FAILED, "no address space for a change bitmap");
  // One bit shall cost one page of memory, not a huge one. Kernels without huge pages refuse: no harm.
  ::madvise(memory, words * sizeof(std::uint64_t), MADV_NOHUGEPAGE);
  return static_cast<std::uint64_t*>(memory);
}

}  // namespace

ChangeBitmap::ChangeBitmap(std::uint64_t granule_count) : granule_count_(granule_count) {
  std::uint64_t bits = std::max<std::uint64_t>(granule_count, 1);
  do {
    const std::uint64_t words = (bits + word_bits - 1) / word_bits;
    levels_.push_back({reserve(words), words});
    bits = words;
  } while (bits > 1);
}

ChangeBitmap::~ChangeBitmap() {
  for (const auto& level : levels_) ::munmap(level.words, level.count * sizeof(std::uint64_t));
}

std::uint64_t ChangeBitmap::granule_count() const {
  return granule_count_;
}
std::uint64_t ChangeBitmap::page_count() const {
  return (granule_count_ + page_bits - 1) / page_bits;
}
std::uint64_t ChangeBitmap::count() const {
  return std::min(set_count_.load(std::memory_order_seq_cst), granule_count_);
}

void ChangeBitmap::set(GranuleRange range) {
  BLOCKFERRY_CHECK(range.first <= granule_count_ && range.count <= granule_count_ - range.first,
                   "a mark beyond the volume");
  if (range.count == 0) return;
  set_count_ += range.count;
  const std::uint64_t already = range.count - set_words(range.first, range.count);
  if (already != 0) set_count_ -= already;
  raise_summaries(range.first / word_bits, (range.end() - 1) / word_bits);
}

/// Returns how many bits were clear before.
std::uint64_t ChangeBitmap::set_words(std::uint64_t first_bit, std::uint64_t bits) {
  std::uint64_t added = 0;
  const std::uint64_t last = (first_bit + bits - 1) / word_bits;
  for (std::uint64_t word = first_bit / word_bits; word <= last; ++word) {
    const std::uint64_t mask = mask_in_word(word, first_bit, bits);
    // A whole word needs no look at what it was. (fetch_or reads first, which maps the kernel's page of
    // zeroes into fresh memory, only for the write to replace it.)
    auto there = at(levels_[0].words[word]);
    const std::uint64_t before = mask == ~0ULL ? there.exchange(mask) : there.fetch_or(mask);
    added += bits_in(mask & ~before);
  }
  return added;
}

void ChangeBitmap::raise_summaries(std::uint64_t first_word, std::uint64_t last_word) {
  for (std::size_t level = 1; level < levels_.size(); ++level) {
    const std::uint64_t first = first_word / word_bits, last = last_word / word_bits;
    for (std::uint64_t word = first; word <= last; ++word) {
      at(levels_[level].words[word]).fetch_or(mask_in_word(word, first_word, last_word - first_word + 1));
    }
    first_word = first;
    last_word = last;
  }
}

/// Words of level 0 may have become zero: clears what stands above them, and looks again. One look at a
/// summary word serves all the words below it.
void ChangeBitmap::lower_summaries(std::uint64_t first_word, std::uint64_t last_word) {
  for (std::size_t level = 1; level < levels_.size(); ++level) {
    const std::uint64_t* const below = levels_[level - 1].words;
    bool any_empty = false;
    for (std::uint64_t group = first_word / word_bits; group <= last_word / word_bits; ++group) {
      const std::uint64_t first = std::max(first_word, group * word_bits);
      const std::uint64_t last = std::min(last_word, group * word_bits + word_bits - 1);
      std::uint64_t empty = 0;
      for (std::uint64_t word = first; word <= last; ++word)
        empty |= std::uint64_t(load(below[word]) == 0) << (word % word_bits);
      if (empty == 0) continue;
      auto summary = at(levels_[level].words[group]);
      if ((summary.fetch_and(~empty) & ~empty) == 0) any_empty = true;
      for (std::uint64_t word = first; word <= last; ++word) {
        if ((empty >> (word % word_bits) & 1) == 0 || load(below[word]) == 0) continue;
        // A marker came between. It raises its own summaries too, but perhaps it already had.
        raise_above(level, word);
      }
    }
    if (!any_empty) return;
    first_word /= word_bits;
    last_word /= word_bits;
  }
}

void ChangeBitmap::raise_above(std::size_t level, std::uint64_t word) {
  for (; level < levels_.size(); ++level, word /= word_bits)
    at(levels_[level].words[word / word_bits]).fetch_or(1ULL << (word % word_bits));
}

/// How many words from `word` on lie wholly in the range and were full of marks. To those no marker can add
/// one, so that they need not be exchanged: a plain store loses nothing, and the caller's fence orders it.
std::uint64_t ChangeBitmap::clear_full_words(std::uint64_t word, GranuleRange range) {
  std::uint64_t* const words = levels_[0].words;
  const std::uint64_t end = range.end() / word_bits;
  const std::uint64_t first = word;
  if (word * word_bits < range.first) return 0;
  for (; word < end && load(words[word]) == ~0ULL; ++word)
    at(words[word]).store(0, std::memory_order_relaxed);
  return word - first;
}

void ChangeBitmap::clear(GranuleRange range) {
  BLOCKFERRY_CHECK(range.first <= granule_count_ && range.count <= granule_count_ - range.first,
                   "a range beyond the volume");
  if (range.count == 0) return;
  std::uint64_t* const words = levels_[0].words;
  const std::uint64_t last = (range.end() - 1) / word_bits;
  std::uint64_t cleared = 0;
  // By way of the summaries, which spares memory that was never touched. A word whose first mark is under way
  // may be passed over; then that mark came after the clearing.
  std::uint64_t word = next_set_word(range.first / word_bits);
  while (word <= last) {
    // Words that stand side by side share their summaries: those are lowered once.
    const std::uint64_t first = word;
    while (word <= last && (word == first || load(words[word]) != 0)) {
      const std::uint64_t full = clear_full_words(word, range);
      cleared += full * word_bits;
      word += full;
      if (full > 0) continue;
      const std::uint64_t mask = mask_in_word(word, range.first, range.count);
      cleared += bits_in(at(words[word]).fetch_and(~mask) & mask);
      ++word;
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // of the plain stores
    lower_summaries(first, word - 1);
    if (word <= last) word = next_set_word(word);
  }
  set_count_ -= cleared;
}

void ChangeBitmap::set_all() {
  if (granule_count_ == 0) return;
  std::uint64_t bits = granule_count_;
  for (const auto& level : levels_) {
    // All at once, in huge pages: one by one takes longer than the rest. Older kernels know neither: no harm.
    ::madvise(level.words, level.count * sizeof(std::uint64_t), MADV_HUGEPAGE);
    ::madvise(level.words, level.count * sizeof(std::uint64_t), MADV_POPULATE_WRITE);
    std::fill_n(level.words, level.count, ~0ULL);
    if (bits % word_bits != 0) level.words[level.count - 1] = (1ULL << (bits % word_bits)) - 1;
    bits = level.count;
  }
  set_count_ = granule_count_;
}

void ChangeBitmap::clear_all() {
  for (const auto& level : levels_) {
    ::madvise(level.words, level.count * sizeof(std::uint64_t), MADV_DONTNEED);
    ::madvise(level.words, level.count * sizeof(std::uint64_t), MADV_NOHUGEPAGE);
  }
  set_count_ = 0;
}

bool ChangeBitmap::test(std::uint64_t granule) const {
  BLOCKFERRY_CHECK(granule < granule_count_, "a granule beyond the volume");
  return (load(levels_[0].words[granule / word_bits]) >> (granule % word_bits) & 1) != 0;
}

std::uint64_t ChangeBitmap::count(GranuleRange range) const {
  if (range.count == 0) return 0;
  std::uint64_t total = 0;
  const std::uint64_t last = (range.end() - 1) / word_bits;
  for (std::uint64_t word = next_set_word(range.first / word_bits); word <= last;
       word = next_set_word(word + 1)) {
    total += std::uint64_t(
        std::popcount(load(levels_[0].words[word]) & mask_in_word(word, range.first, range.count)));
  }
  return total;
}

/// The first word of level 0, at or after `from`, that may be other than zero: up through the summaries until
/// one has a bit to the right, then down along it.
std::uint64_t ChangeBitmap::next_set_word(std::uint64_t from) const {
  if (from >= levels_[0].count) return none;
  if (load(levels_[0].words[from]) != 0) return from;
  std::uint64_t index = from + 1;  // an index into the words of level - 1
  std::size_t level = 1;
  while (level < levels_.size()) {
    const Level& summary = levels_[level];
    const std::uint64_t word = index / word_bits;
    if (word >= summary.count) return none;
    const std::uint64_t bits = load(summary.words[word]) & (~0ULL << (index % word_bits));
    if (bits == 0) {
      index = word + 1;
      ++level;
      continue;
    }
    index = word * word_bits + std::uint64_t(std::countr_zero(bits));
    if (--level == 0) {
      if (index >= levels_[0].count) return none;
      if (load(levels_[0].words[index]) != 0) return index;
      ++index;  // a summary bit left for a moment
      level = 1;
      continue;
    }
    index *= word_bits;
  }
  return none;
}

std::uint64_t ChangeBitmap::run_length(std::uint64_t first, std::uint64_t count_max) const {
  const std::uint64_t limit = std::min(count_max, granule_count_ - first);
  std::uint64_t length = 0;
  while (length < limit) {
    for (; (first + length) % word_bits == 0 && length + word_bits <= limit; length += word_bits) {
      if (load(levels_[0].words[(first + length) / word_bits]) != ~0ULL) break;
    }
    if (length == limit) break;
    const std::uint64_t bit = first + length;
    const std::uint64_t word = load(levels_[0].words[bit / word_bits]) >> (bit % word_bits);
    const auto ones = std::uint64_t(std::countr_one(word));
    const std::uint64_t room = word_bits - bit % word_bits;
    length += std::min(ones, room);
    if (ones < room) break;
  }
  return std::min(length, limit);
}

std::optional<GranuleRange> ChangeBitmap::find(std::uint64_t from, std::uint64_t count_max) const {
  if (from >= granule_count_ || count_max == 0) return std::nullopt;
  for (std::uint64_t word = next_set_word(from / word_bits); word != none; word = next_set_word(word + 1)) {
    std::uint64_t bits = load(levels_[0].words[word]);
    if (word == from / word_bits) bits &= ~0ULL << (from % word_bits);
    if (bits == 0) continue;
    const std::uint64_t first = word * word_bits + std::uint64_t(std::countr_zero(bits));
    return GranuleRange{first, run_length(first, count_max)};
  }
  return std::nullopt;
}

std::optional<GranuleRange> ChangeBitmap::claim(std::uint64_t from, std::uint64_t count_max) {
  // Only the owner clears, so what find() saw set still is.
  const auto range = find(from, count_max);
  if (range) clear(*range);
  return range;
}

void ChangeBitmap::read_page(std::uint64_t page, std::uint64_t (&words)[512]) const {
  static_assert(page_words == 512);
  for (std::uint64_t i = 0; i < page_words; ++i) {
    const std::uint64_t word = page * page_words + i;
    words[i] = word < levels_[0].count ? load(levels_[0].words[word]) : 0;
  }
}

void ChangeBitmap::or_page(std::uint64_t page, const std::uint64_t (&words)[512]) {
  for (std::uint64_t i = 0; i < page_words; ++i) {
    const std::uint64_t word = page * page_words + i;
    if (words[i] == 0) continue;
    BLOCKFERRY_CHECK(word < levels_[0].count, "a page beyond the volume");
    const std::uint64_t beyond = granule_count_ - word * word_bits;
    const std::uint64_t valid = beyond >= word_bits ? ~0ULL : (1ULL << beyond) - 1;
    const std::uint64_t mask = words[i] & valid;
    set_count_ += std::uint64_t(std::popcount(mask));
    const std::uint64_t before = at(levels_[0].words[word]).fetch_or(mask);
    set_count_ -= std::uint64_t(std::popcount(mask & before));
    raise_summaries(word, word);
  }
}

bool ChangeBitmap::page_has_bits(std::uint64_t page) const {
  const std::uint64_t word = next_set_word(page * page_words);
  return word < (page + 1) * page_words;
}

}  // namespace blockferry

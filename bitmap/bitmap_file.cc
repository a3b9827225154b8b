// SPDX-License-Identifier: Apache-2.0
// The file, little-endian, in units of 4096 bytes:
//
//   index 0 │ index 1 │ page 0 slot 0 │ page 0 slot 1 │ page 1 slot 0 │ …
//
// An index belongs to a generation; generation g lies in index g % 2:
//
//   0     magic "BFBITMP1"                 8 bytes
//   8     version                          u32 (1), reserved u32
//   16    generation                       u64, from 1
//   24    granules                         u64
//   32    granule bytes                    u64
//   40    CRC-64 of the whole index, with this field 0
//   48    for each page of 32768 granules: kind u64 (0 all clear, 1 all set, 2 in slot 0, 3 in slot 1),
//                                          CRC-64 of its 4096 bytes u64 (0 for kinds 0 and 1)
//
// A commit writes changed pages into the slot that the last generation does not use, syncs, then writes the
// other index and syncs. A crash before the second sync leaves the last generation whole, which is the truth
// until the commit has returned. The idea is shadow paging, as databases have done it since System R.
//
// Pages all clear or all set lie nowhere: their slots are holes, so that the file is as sparse as the bitmap.
#include "bitmap/bitmap_file.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "blockio/base/check.h"
#include "blockio/base/checksum.h"
#include "blockio/base/units.h"

namespace blockferry {

namespace {

constexpr std::uint64_t page_bytes = 4096;
constexpr char magic[8] = {'B', 'F', 'B', 'I', 'T', 'M', 'P', '1'};
constexpr std::uint32_t format_version = 1;
constexpr std::uint64_t granule_count_max = 1ULL << 40;
constexpr std::uint64_t generation_max = 1ULL << 62;  // never reached; leaves room to count on

static_assert(std::endian::native == std::endian::little);

enum PageKind : std::uint64_t { all_clear = 0, all_set = 1, in_slot_0 = 2, in_slot_1 = 3 };

struct IndexHeader {
  char magic_bytes[8];
  std::uint32_t version;
  std::uint32_t reserved;
  std::uint64_t generation;
  std::uint64_t granule_count;
  std::uint64_t granule_bytes;
  std::uint64_t checksum;
};
static_assert(sizeof(IndexHeader) == 48);

std::uint64_t checksum_of(const std::uint64_t (&words)[512]) {
  return crc64(std::as_bytes(std::span(words)));
}

std::uint64_t index_checksum(IndexHeader header, std::span<const std::uint64_t> entries) {
  header.checksum = 0;
  return crc64(std::as_bytes(entries), crc64(std::as_bytes(std::span(&header, 1))));
}

bool is_all(const std::uint64_t (&words)[512], std::uint64_t value) {
  return std::all_of(std::begin(words), std::end(words), [&](std::uint64_t word) { return word == value; });
}

/// Whether a bit is set at `granules`, counted from the page's start, or after.
bool has_bits_from(const std::uint64_t (&words)[512], std::uint64_t granules) {
  if (granules >= ChangeBitmap::page_bits) return false;
  const std::uint64_t* const end = std::end(words);
  const std::uint64_t* word = words + granules / 64;
  if ((*word & (~0ULL << (granules % 64))) != 0) return true;
  return std::any_of(word + 1, end, [](std::uint64_t other) { return other != 0; });
}

Error damaged(const char* how) {
  return make_error(ErrorCode::state_damaged, "read", "the change bitmap's file",
                    std::string(how) + "; forget the run and copy in full");
}

}  // namespace

BitmapFile::BitmapFile(std::unique_ptr<StateFile> file, std::uint64_t granule_count,
                       std::uint64_t granule_bytes)
    : file_(std::move(file)),
      granule_count_(granule_count),
      granule_bytes_(granule_bytes),
      page_count_(divide_up(granule_count, ChangeBitmap::page_bits)) {}

std::uint64_t BitmapFile::index_bytes() const {
  return round_up(sizeof(IndexHeader) + page_count_ * 2 * sizeof(std::uint64_t), page_bytes);
}

std::uint64_t BitmapFile::page_offset(std::uint64_t page, unsigned slot) const {
  return 2 * index_bytes() + (2 * page + slot) * page_bytes;
}

Result<std::unique_ptr<BitmapFile>> BitmapFile::create(std::unique_ptr<StateFile> file,
                                                       std::uint64_t granule_count,
                                                       std::uint64_t granule_bytes, bool all_set) {
  if (granule_count > granule_count_max) {
    return fail(make_error(ErrorCode::invalid_argument, "create", "the change bitmap's file",
                           "the volume has too many granules; choose larger ones"));
  }
  std::unique_ptr<BitmapFile> bitmap(new BitmapFile(std::move(file), granule_count, granule_bytes));
  bitmap->entries_.resize(bitmap->page_count_ * 2);
  for (std::uint64_t page = 0; page < bitmap->page_count_; ++page) {
    bitmap->entries_[2 * page] = all_set ? PageKind::all_set : PageKind::all_clear;
  }
  // Whatever an interrupted creation left must not pass for an index.
  if (auto done = bitmap->file_->resize(0); !done) return fail(done.error());
  if (auto done = bitmap->file_->resize(bitmap->page_offset(bitmap->page_count_, 0)); !done)
    return fail(done.error());
  const auto index = bitmap->make_index(1);
  if (auto done = bitmap->file_->write(bitmap->index_bytes(), index); !done) return fail(done.error());
  bitmap->generation_ = 1;
  return bitmap;
}

std::vector<std::byte> BitmapFile::make_index(std::uint64_t generation) const {
  IndexHeader header{{}, format_version, 0, generation, granule_count_, granule_bytes_, 0};
  std::memcpy(header.magic_bytes, magic, sizeof magic);
  header.checksum = index_checksum(header, entries_);
  std::vector<std::byte> index(index_bytes());
  std::memcpy(index.data(), &header, sizeof header);
  if (!entries_.empty())
    std::memcpy(index.data() + sizeof header, entries_.data(), entries_.size() * sizeof(std::uint64_t));
  return index;
}

Result<void> BitmapFile::write_index(std::uint64_t generation) {
  const auto index = make_index(generation);
  index_doubtful_ = true;
  if (auto done = file_->write((generation % 2) * index_bytes(), index); !done) return done;
  if (auto done = file_->sync(); !done) return done;
  index_doubtful_ = false;
  generation_ = generation;
  return {};
}

/// Takes back an index whose commit failed, before another commit writes over the pages that it vouches for.
Result<void> BitmapFile::revoke_index() {
  const std::vector<std::byte> nothing(page_bytes);
  if (auto done = file_->write(((generation_ + 1) % 2) * index_bytes(), nothing); !done) return done;
  if (auto done = file_->sync(); !done) return done;
  index_doubtful_ = false;
  return {};
}

/// The slot's generation and entries, or why there is none.
Result<std::uint64_t> BitmapFile::read_index(unsigned slot, std::vector<std::uint64_t>& entries) {
  IndexHeader header;
  std::vector<std::byte> index(index_bytes());
  if (auto done = file_->read(slot * index_bytes(), index); !done) return fail(done.error());
  std::memcpy(&header, index.data(), sizeof header);
  if (std::memcmp(header.magic_bytes, magic, sizeof magic) != 0) return fail(damaged("it is not one"));
  if (header.version > format_version) {
    return fail(make_error(ErrorCode::state_newer, "read", "the change bitmap's file",
                           "written by a later version of ferryd"));
  }
  if (header.version == 0) return fail(damaged("its version is none"));
  if (header.granule_count != granule_count_ || header.granule_bytes != granule_bytes_) {
    return fail(damaged("it belongs to a volume of another size"));
  }
  if (!entries.empty())
    std::memcpy(entries.data(), index.data() + sizeof header, entries.size() * sizeof(std::uint64_t));
  if (header.checksum != index_checksum(header, entries))
    return fail(damaged("its index fails its checksum"));
  if (header.generation == 0 || header.generation > generation_max || header.generation % 2 != slot)
    return fail(damaged("its index lies in the wrong place"));
  for (std::size_t i = 0; i < entries.size(); i += 2) {
    if (entries[i] > PageKind::in_slot_1) return fail(damaged("its index holds nonsense"));
  }
  return header.generation;
}

Result<std::unique_ptr<BitmapFile>> BitmapFile::open(std::unique_ptr<StateFile> file,
                                                     std::uint64_t granule_count, std::uint64_t granule_bytes,
                                                     std::uint64_t generation_min) {
  if (granule_count > granule_count_max) return fail(damaged("its size is absurd"));
  std::unique_ptr<BitmapFile> bitmap(new BitmapFile(std::move(file), granule_count, granule_bytes));
  auto size = bitmap->file_->size();
  if (!size) return fail(size.error());
  if (*size != bitmap->page_offset(bitmap->page_count_, 0)) return fail(damaged("its length is wrong"));
  bitmap->entries_.resize(bitmap->page_count_ * 2);
  // A killed process may have left a generation that is readable but not durable yet. It must be, before the
  // next commit overwrites what only its predecessor needs: else a power cut finds the old index and the new
  // pages.
  if (auto done = bitmap->file_->sync(); !done) return fail(done.error());
  std::vector<std::uint64_t> other(bitmap->entries_.size());
  const auto first = bitmap->read_index(0, bitmap->entries_);
  const auto second = bitmap->read_index(1, other);
  // A damaged index was cut short by a crash. One that cannot be read, or is a later version's, may be newer.
  for (const auto* index : {&first, &second}) {
    if (!*index && index->error().code != ErrorCode::state_damaged) return fail(index->error());
  }
  if (!first && !second) return fail(first.error());
  if (second && (!first || *second > *first)) bitmap->entries_ = std::move(other);
  bitmap->generation_ = std::max(first.value_or(0), second.value_or(0));
  if (bitmap->generation_ < generation_min) return fail(damaged("its newest generation is lost"));
  return bitmap;
}

Result<void> BitmapFile::load(ChangeBitmap& bitmap) {
  BLOCKFERRY_CHECK(bitmap.granule_count() == granule_count_, "a bitmap of another volume");
  std::uint64_t words[512];
  for (std::uint64_t page = 0; page < page_count_; ++page) {
    const std::uint64_t kind = entries_[2 * page];
    if (kind == PageKind::all_clear) continue;
    const std::uint64_t first = page * ChangeBitmap::page_bits;
    if (kind == PageKind::all_set) {
      bitmap.set({first, std::min(ChangeBitmap::page_bits, granule_count_ - first)});
      continue;
    }
    const auto slot = unsigned(kind - PageKind::in_slot_0);
    if (auto done = file_->read(page_offset(page, slot), std::as_writable_bytes(std::span(words))); !done)
      return done;
    if (checksum_of(words) != entries_[2 * page + 1])
      return fail(damaged("one of its pages fails its checksum"));
    if (has_bits_from(words, granule_count_ - first))
      return fail(damaged("one of its pages marks what lies beyond the volume"));
    bitmap.or_page(page, words);
  }
  return {};
}

/// Notes where the page goes, and returns its kind: never in the slot where the last generation has it.
std::uint64_t BitmapFile::place_page(const BitmapPage& page, std::uint64_t committed_kind) {
  BLOCKFERRY_CHECK(!has_bits_from(page.words, granule_count_ - page.index * ChangeBitmap::page_bits),
                   "a mark beyond the volume");
  std::uint64_t& kind = entries_[2 * page.index];
  std::uint64_t& checksum = entries_[2 * page.index + 1];
  checksum = 0;
  if (is_all(page.words, 0)) return kind = PageKind::all_clear;
  if (is_all(page.words, ~0ULL)) return kind = PageKind::all_set;
  checksum = checksum_of(page.words);
  return kind = committed_kind == PageKind::in_slot_0 ? PageKind::in_slot_1 : PageKind::in_slot_0;
}

Result<void> BitmapFile::commit(const std::vector<BitmapPage>& pages) {
  if (index_doubtful_) {
    if (auto done = revoke_index(); !done) return done;
  }
  const std::vector<std::uint64_t> before = entries_;
  const auto give_up = [&](const Result<void>& why) {
    entries_ = before;
    return why;
  };
  bool wrote = false;
  for (const auto& page : pages) {
    BLOCKFERRY_CHECK(page.index < page_count_, "a page beyond the volume");
    const std::uint64_t kind = place_page(page, before[2 * page.index]);
    if (kind == PageKind::all_clear || kind == PageKind::all_set) continue;
    const std::uint64_t offset = page_offset(page.index, unsigned(kind - PageKind::in_slot_0));
    if (auto done = file_->write(offset, std::as_bytes(std::span(page.words))); !done) return give_up(done);
    wrote = true;
  }
  // The pages before the index that vouches for them.
  if (wrote) {
    if (auto done = file_->sync(); !done) return give_up(done);
  }
  if (auto done = write_index(generation_ + 1); !done) return give_up(done);
  give_space_back(pages, before);
  return {};
}

/// Of pages that became all clear or all set. Only now: until the new index was durable the old one counted.
void BitmapFile::give_space_back(const std::vector<BitmapPage>& pages,
                                 const std::vector<std::uint64_t>& before) {
  for (const auto& page : pages) {
    const bool had_space = before[2 * page.index] >= PageKind::in_slot_0;
    if (!had_space || entries_[2 * page.index] >= PageKind::in_slot_0) continue;
    // What cannot be given back is merely not given back.
    static_cast<void>(file_->punch(page_offset(page.index, 0), 2 * page_bytes));
  }
}

}  // namespace blockferry

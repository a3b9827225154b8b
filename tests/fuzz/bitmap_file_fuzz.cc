// SPDX-License-Identifier: Apache-2.0
// The change bitmap's file, damaged in any way. An input is a true file's history, then changes to its bytes;
// checksums may be made valid again, so that what lies behind them is reached. Whatever opens must load
// within the volume, take a commit, and give exactly that back.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "blockio/base/checksum.h"
#include "tests/unit/bitmap/bitmap_file_fixture.h"

namespace blockferry::test {
namespace {

constexpr std::size_t block = 4096;
constexpr std::size_t header_bytes = 48;
constexpr std::size_t edits_max = 64;

void require(bool condition) {
  if (!condition) std::abort();
}

/// Takes the input apart; beyond its end all is 0.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  bool empty() const { return at_ >= size_; }
  std::uint64_t number(unsigned bytes) {
    std::uint64_t value = 0;
    for (unsigned i = 0; i < bytes; ++i) value |= std::uint64_t(at_ < size_ ? data_[at_++] : 0) << (8 * i);
    return value;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

Content true_history(Input& input, Medium& medium, std::uint64_t granules) {
  const bool all_set = input.number(1) % 2 == 1;
  auto file = BitmapFile::create(file_on(medium), granules, granule_bytes, all_set);
  require(file.has_value());
  Content content = uniform_content(granules, all_set);
  std::mt19937_64 random(input.number(1));
  for (std::uint64_t commits = input.number(1) % 4; commits > 0; --commits)
    require((*file)->commit(change_pages(content, granules, random)).has_value());
  return content;
}

std::uint64_t get(const Bytes& bytes, std::size_t offset) {
  std::uint64_t value = 0;
  if (offset + 8 <= bytes.size()) std::memcpy(&value, bytes.data() + offset, 8);
  return value;
}
void put(Bytes& bytes, std::size_t offset, std::uint64_t value) {
  if (offset + 8 <= bytes.size()) std::memcpy(bytes.data() + offset, &value, 8);
}

void make_checksums_valid(Bytes& bytes, std::uint64_t granules, unsigned index) {
  const std::size_t start = index * block;
  const std::size_t entries_end = start + header_bytes + pages_of(granules) * 16;
  if (entries_end > bytes.size()) return;
  for (std::uint64_t page = 0; page < pages_of(granules); ++page) {
    const std::size_t entry = start + header_bytes + page * 16;
    const std::uint64_t kind = get(bytes, entry);
    const std::size_t slot = 2 * block + (2 * page + (kind == 3 ? 1 : 0)) * block;
    if ((kind == 2 || kind == 3) && slot + block <= bytes.size())
      put(bytes, entry + 8, crc64(std::span(bytes).subspan(slot, block)));
  }
  put(bytes, start + 40, 0);
  put(bytes, start + 40, crc64(std::span(bytes).subspan(start, entries_end - start)));
}

/// Returns whether anything was done.
bool edit(Input& input, Bytes& bytes, std::uint64_t granules) {
  const std::uint64_t repair = input.number(1);
  if (input.empty()) return false;
  for (std::size_t edits = 0; edits < edits_max && !input.empty(); ++edits) {
    const std::uint64_t where = input.number(2), what = input.number(1);
    if (what == 0) {  // another length
      bytes.resize(where);
      continue;
    }
    // Mostly into the headers and entries, where it matters.
    const std::size_t offset = what % 2 == 0 ? where % 128 + (what & 2) / 2 * block : where;
    const unsigned length = unsigned(what >> 2) % 8 + 1;
    const std::uint64_t value = input.number(length);
    for (unsigned i = 0; i < length; ++i) {
      if (offset + i < bytes.size()) bytes[offset + i] = std::byte(value >> (8 * i));
    }
  }
  if ((repair & 1) != 0) make_checksums_valid(bytes, granules, 0);
  if ((repair & 2) != 0) make_checksums_valid(bytes, granules, 1);
  return true;
}

void go_on_from(Opened& opened, Medium& medium, std::uint64_t granules) {
  ChangeBitmap bitmap(granules);
  require(opened.file->load(bitmap).has_value());
  require(bitmap.count() <= granules);
  Content content = content_of(bitmap);
  require(content == opened.content);
  std::mt19937_64 random(granules);
  require(opened.file->commit(change_pages(content, granules, random)).has_value());
  const auto again = open_and_load(medium, granules, opened.file->generation());
  require(again.has_value() && again->content == content);
}

}  // namespace
}  // namespace blockferry::test

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace blockferry::test;
  Input input(data, size);
  const std::uint64_t granules = input.number(3) % 70000;
  Medium medium;
  const Content content = true_history(input, medium, granules);
  const bool edited = edit(input, medium.current, granules);
  auto opened = open_and_load(medium, granules);
  if (!edited) require(opened.has_value() && opened->content == content);
  if (opened) go_on_from(*opened, medium, granules);
  return 0;
}

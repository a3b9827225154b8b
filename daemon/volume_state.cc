// SPDX-License-Identifier: Apache-2.0
#include "daemon/volume_state.h"

#include <algorithm>

#include "blockio/base/check.h"

namespace blockferry {

namespace {

/// A state file that a record speaks of and that is not there is damage, not a name mistyped.
Error must_exist(Error error) {
  if (error.code != ErrorCode::not_found) return error;
  error.code = ErrorCode::state_damaged;
  error.hint = "the run's state is incomplete; forget the run and copy in full";
  return error;
}

constexpr std::uint64_t pages_per_lag_commit = 256;  // bounds memory: 1 MiB at a time

void set_bits(GranuleRange range, BitmapPage& page) {
  const std::uint64_t start = page.index * ChangeBitmap::page_bits;
  const std::uint64_t first = std::max(range.first, start) - start;
  const std::uint64_t end = std::min(range.end(), start + ChangeBitmap::page_bits) - start;
  for (std::uint64_t at = first; at < end;) {
    const std::uint64_t count = std::min(end - at, 64 - at % 64);
    page.words[at / 64] |= (count == 64 ? ~0ULL : (1ULL << count) - 1) << (at % 64);
    at += count;
  }
}

/// In those of the pages, which are in order, that the ranges touch.
template <typename Ranges>
void set_bits(const Ranges& ranges, std::vector<BitmapPage>& pages) {
  for (const GranuleRange& range : ranges) {
    auto page =
        std::lower_bound(pages.begin(), pages.end(), range.first / ChangeBitmap::page_bits,
                         [](const BitmapPage& each, std::uint64_t index) { return each.index < index; });
    for (; page != pages.end() && page->index * ChangeBitmap::page_bits < range.end(); ++page)
      set_bits(range, *page);
  }
}

bool has_bits(const BitmapPage& page) {
  return std::any_of(std::begin(page.words), std::end(page.words),
                     [](std::uint64_t word) { return word != 0; });
}

}  // namespace

VolumeState::VolumeState(const VolumeGeometry& geometry, std::unique_ptr<BitmapFile> bitmap_file,
                         std::unique_ptr<ChecksumTable> checksums)
    : geometry_(geometry),
      bitmap_file_(std::move(bitmap_file)),
      checksums_(std::move(checksums)),
      dirty_(geometry.granule_count()),
      touched_(dirty_.page_count()) {}

Result<std::unique_ptr<VolumeState>> VolumeState::create(StateDirectory& state, const std::string& volume_id,
                                                         const VolumeGeometry& geometry) {
  auto checksums = ChecksumTable::create(state, checksums_file_name(volume_id), geometry);
  if (!checksums) return fail(checksums.error());
  auto file = state.open(bitmap_file_name(volume_id), true);
  if (!file) return fail(file.error());
  auto bitmap = BitmapFile::create(std::move(*file), geometry.granule_count(), geometry.granule_bytes, true);
  if (!bitmap) return fail(bitmap.error());
  std::unique_ptr<VolumeState> volume(new VolumeState(geometry, std::move(*bitmap), std::move(*checksums)));
  volume->dirty_.set_all();
  volume->durable_ = false;
  return volume;
}

Result<std::unique_ptr<VolumeState>> VolumeState::open(StateDirectory& state, const std::string& volume_id,
                                                       const VolumeGeometry& geometry,
                                                       std::uint64_t generation_min) {
  auto checksums = ChecksumTable::open(state, checksums_file_name(volume_id), geometry);
  if (!checksums) return fail(must_exist(checksums.error()));
  auto file = state.open(bitmap_file_name(volume_id), false);
  if (!file) return fail(must_exist(file.error()));
  auto bitmap =
      BitmapFile::open(std::move(*file), geometry.granule_count(), geometry.granule_bytes, generation_min);
  if (!bitmap) return fail(bitmap.error());
  std::unique_ptr<VolumeState> volume(new VolumeState(geometry, std::move(*bitmap), std::move(*checksums)));
  if (auto loaded = volume->bitmap_file_->load(volume->dirty_); !loaded) return fail(loaded.error());
  return volume;
}

Result<void> VolumeState::record_copied(GranuleRange range, std::span<const std::uint64_t> checksums) {
  if (deferring_) {
    deferred_.push_back({range, {checksums.begin(), checksums.end()}});
  } else if (auto recorded = write_record(range, checksums); !recorded) {
    give_back(range);  // it was copied, but without its record it cannot become synced
    return recorded;
  }
  copied_now_.add(range);
  return {};
}

Result<void> VolumeState::write_record(GranuleRange range, std::span<const std::uint64_t> checksums) {
  return checksums.empty() ? checksums_->write_zeroes(range) : checksums_->write(range.first, checksums);
}

/// In the order in which they were made: a granule may have been copied twice.
Result<void> VolumeState::defer_records(bool defer) {
  deferring_ = defer;
  if (defer) return {};
  Result<void> done;
  for (const auto& record : deferred_) {
    if (done) done = write_record(record.range, record.checksums);
    if (!done) give_back(record.range);
  }
  deferred_.clear();
  return done;
}

void VolumeState::touch(GranuleRange range) {
  if (range.count == 0) return;
  const std::uint64_t last = (range.end() - 1) / ChangeBitmap::page_bits;
  for (std::uint64_t page = range.first / ChangeBitmap::page_bits; page <= last; ++page)
    touched_[page] = true;
}

void VolumeState::mark_mismatched(GranuleRange range) {
  dirty_.set(range);
  touch(range);
}

void VolumeState::note_collected(std::uint64_t first, std::uint64_t end) {
  for (std::uint64_t at = first; at < end;) {
    const std::uint64_t page = at / ChangeBitmap::page_bits;
    if (dirty_.page_has_bits(page)) touched_[page] = true;
    at = (page + 1) * ChangeBitmap::page_bits;
  }
}

void VolumeState::begin_checkpoint() {
  if (copied_flushing_.empty()) std::swap(copied_now_, copied_flushing_);
  for (const auto& range : copied_flushing_) touch(range);
}

std::vector<GranuleRange> VolumeState::to_granules(std::span<const ByteRange> ranges) const {
  std::vector<GranuleRange> granules;
  for (const auto& range : ranges) granules.push_back(geometry_.granules_of(range));
  return granules;
}

void VolumeState::read_dirty(std::uint64_t index, std::vector<BitmapPage>& pages) const {
  pages.emplace_back();
  pages.back().index = index;
  if (dirty_.page_has_bits(index)) dirty_.read_page(index, pages.back().words);
}

/// As they must be on disk once copied_flushing is synced.
std::vector<BitmapPage> VolumeState::pages_to_commit(std::span<const ByteRange> in_flight) {
  std::vector<BitmapPage> pages;
  pages.reserve(std::size_t(std::count(touched_.begin(), touched_.end(), true)));
  for (std::uint64_t index = 0; index < touched_.size(); ++index) {
    if (touched_[index]) read_dirty(index, pages);
  }
  set_bits(to_granules(in_flight), pages);
  set_bits(copied_now_, pages);
  committing_ = std::move(touched_);
  touched_.assign(dirty_.page_count(), false);
  return pages;
}

Result<void> VolumeState::commit(const std::vector<BitmapPage>& pages) {
  // The records first: a committed clean granule vouches for its checksum.
  if (auto synced = checksums_->sync(); !synced) return synced;
  if (pages.empty() && durable_) return {};
  auto done = bitmap_file_->commit(pages);
  if (done) durable_ = true;
  return done;
}

void VolumeState::finish_checkpoint(bool committed) {
  if (committed) {
    copied_flushing_.clear();
    return;
  }
  for (std::size_t i = 0; i < committing_.size(); ++i) {
    if (committing_[i]) touched_[i] = true;
  }
  copied_now_.add(copied_flushing_);
  copied_flushing_.clear();
}

void VolumeState::copied_to_dirty() {
  for (auto* copied : {&copied_now_, &copied_flushing_}) {
    for (const auto& range : *copied) dirty_.set(range);
    copied->clear();
  }
}

Result<void> VolumeState::save_lag(StateDirectory& state, const std::string& name,
                                   std::span<const ByteRange> in_flight) {
  auto file = state.open(name, true);
  if (!file) return fail(file.error());
  auto lag = BitmapFile::create(std::move(*file), geometry_.granule_count(), geometry_.granule_bytes, false);
  if (!lag) return fail(lag.error());
  const auto granules = to_granules(in_flight);
  std::vector<BitmapPage> pages;
  for (std::uint64_t index = 0; index < dirty_.page_count(); ++index) {
    read_dirty(index, pages);
    if (pages.size() < pages_per_lag_commit && index + 1 < dirty_.page_count()) continue;
    set_bits(granules, pages);
    set_bits(copied_now_, pages);
    set_bits(copied_flushing_, pages);
    std::erase_if(pages, [](const BitmapPage& page) { return !has_bits(page); });
    if (auto done = (*lag)->commit(pages); !done) return done;
    pages.clear();
  }
  return dirty_.page_count() > 0 ? Result<void>() : (*lag)->commit({});  // the first commit makes it durable
}

Result<void> VolumeState::merge_lag(StateDirectory& state, const std::string& name) {
  auto file = state.open(name, false);
  if (!file) return fail(file.error());
  auto lag = BitmapFile::open(std::move(*file), geometry_.granule_count(), geometry_.granule_bytes, 0);
  if (!lag) return fail(lag.error());
  if (auto done = (*lag)->load(dirty_); !done) return done;
  note_collected(0, geometry_.granule_count());
  return {};
}

}  // namespace blockferry

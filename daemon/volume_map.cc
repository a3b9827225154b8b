// SPDX-License-Identifier: Apache-2.0
#include "daemon/volume_map.h"

#include <algorithm>

namespace blockferry {

namespace {

constexpr unsigned clean_runs_max = 64;  // of a cell that are looked at one by one; the rest counts as data

/// Zeroes among the clean granules only: a dirty granule's record says nothing.
std::uint64_t clean_zeroes(VolumeState& volume, GranuleRange range) {
  std::uint64_t zeroes = 0;
  std::uint64_t at = range.first;
  for (unsigned runs = 0; at < range.end() && runs < clean_runs_max; ++runs) {
    const auto dirty = volume.dirty().find(at, UINT64_MAX);
    const std::uint64_t clean_end = dirty ? std::min(dirty->first, range.end()) : range.end();
    if (clean_end > at) zeroes += volume.checksums().count_zeroes({at, clean_end - at}).value_or(0);
    at = dirty ? std::max(dirty->end(), clean_end) : range.end();
  }
  return zeroes;
}

std::uint64_t bad_granules(const std::vector<ByteRange>& bad_ranges, ByteRange bytes,
                           std::uint64_t granule_bytes) {
  std::uint64_t granules = 0;
  for (const auto& bad : bad_ranges) {
    const std::uint64_t from = std::max(bad.offset, bytes.offset);
    const std::uint64_t to = std::min(bad.end(), bytes.end());
    if (from < to) granules += divide_up(to - from, granule_bytes);
  }
  return granules;
}

}  // namespace

std::vector<VolumeMapCell> map_volume(VolumeState& volume, const std::vector<ByteRange>& bad_ranges,
                                      std::uint32_t cells) {
  std::vector<VolumeMapCell> map;
  const VolumeGeometry& geometry = volume.geometry();
  const std::uint64_t count = geometry.granule_count();
  const std::uint64_t used = std::min<std::uint64_t>(cells, count);
  for (std::uint64_t i = 0; i < used; ++i) {
    // 128 bits: a volume of many TiB times 65536 cells.
    const auto border = [&](std::uint64_t cell) {
      return std::uint64_t(static_cast<unsigned __int128>(count) * cell / used);
    };
    const GranuleRange range{border(i), border(i + 1) - border(i)};
    VolumeMapCell cell;
    cell.dirty = volume.dirty().count(range);
    cell.zero = std::min(clean_zeroes(volume, range), range.count - cell.dirty);
    cell.synced = range.count - cell.dirty - cell.zero;
    // A skipped granule was written as zeroes.
    cell.bad =
        std::min(bad_granules(bad_ranges, geometry.bytes_of(range), geometry.granule_bytes), cell.zero);
    cell.zero -= cell.bad;
    map.push_back(cell);
  }
  return map;
}

}  // namespace blockferry

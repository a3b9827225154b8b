// SPDX-License-Identifier: Apache-2.0
// The recorded checksum of every granule, on disk. A record counts only while its granule is clean in the
// committed bitmap, so records may be written in any order and before anything is synced.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bitmap/checksum_tracker.h"
#include "bitmap/storage.h"
#include "blockio/base/error.h"
#include "blockio/base/units.h"

namespace blockferry {

/// How a volume is cut into granules. The last granule may be short.
struct VolumeGeometry {
  std::uint64_t bytes = 0;
  std::uint64_t granule_bytes = 4096;

  std::uint64_t granule_count() const { return divide_up(bytes, granule_bytes); }
  std::uint64_t granule_length(std::uint64_t granule) const;
  ByteRange bytes_of(GranuleRange range) const;
  /// `range` begins at a granule's start and ends at one or at the volume's end.
  GranuleRange granules_of(ByteRange range) const;
  bool operator==(const VolumeGeometry&) const = default;
};

class ChecksumTable : public RecordedChecksums {
 public:
  /// Durable with the first sync().
  static Result<std::unique_ptr<ChecksumTable>> create(StateDirectory& state, const std::string& name,
                                                       const VolumeGeometry& geometry);
  /// state_damaged where the header or the length is not what it must be.
  static Result<std::unique_ptr<ChecksumTable>> open(StateDirectory& state, const std::string& name,
                                                     const VolumeGeometry& geometry);

  Result<void> read(std::uint64_t first, std::span<std::uint64_t> out) override;
  Result<void> write(std::uint64_t first, std::span<const std::uint64_t> checksums);
  /// Records that these granules hold zeroes; takes no space.
  Result<void> write_zeroes(GranuleRange range);
  /// The first granule at or after `first` that may hold other than zeroes; granule_count() where none does.
  Result<std::uint64_t> next_nonzero(std::uint64_t first);
  /// How many granules of the range are recorded as zeroes, at the resolution of the file's holes for large
  /// ranges.
  Result<std::uint64_t> count_zeroes(GranuleRange range);
  Result<void> sync() { return file_->sync(); }

 private:
  ChecksumTable(std::unique_ptr<StateFile> file, const VolumeGeometry& geometry);
  std::uint64_t zero_checksum(std::uint64_t granule) const;

  std::unique_ptr<StateFile> file_;
  const VolumeGeometry geometry_;
  const std::uint64_t zero_checksum_full_, zero_checksum_last_;
  std::vector<std::uint64_t> scratch_;  ///< write() only
};

}  // namespace blockferry

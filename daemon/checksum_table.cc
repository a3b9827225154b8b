// SPDX-License-Identifier: Apache-2.0
// The file, little-endian:
//
//   0     magic "BFCHKSM1"      8 bytes
//   8     version               u32 (1), reserved u32
//   16    volume bytes          u64
//   24    granule bytes         u64
//   32    CRC-64 of bytes 0-31  u64
//   4096  one u64 a granule: its CRC-64 XOR the CRC-64 of as many zeroes
//
// The XOR makes the record of an all-zero granule 0, so that the file is sparse where the volume is. The
// records carry no checksum of their own: a damaged one shows as a mismatch or costs a needless copy.
#include "daemon/checksum_table.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "blockio/base/check.h"
#include "blockio/base/checksum.h"

namespace blockferry {

namespace {

constexpr std::uint64_t records_offset = 4096;
constexpr char magic[8] = {'B', 'F', 'C', 'H', 'K', 'S', 'M', '1'};
constexpr std::uint32_t format_version = 1;

struct Header {
  char magic_bytes[8];
  std::uint32_t version;
  std::uint32_t reserved;
  std::uint64_t bytes;
  std::uint64_t granule_bytes;
  std::uint64_t checksum;
};
static_assert(sizeof(Header) == 40);

std::uint64_t header_checksum(const Header& header) {
  return crc64(std::as_bytes(std::span(&header, 1)).first(offsetof(Header, checksum)));
}

Error damaged(const std::string& name, const char* how) {
  return make_error(ErrorCode::state_damaged, "open checksum table", name,
                    std::string(how) + "; forget the run and copy in full");
}

}  // namespace

std::uint64_t VolumeGeometry::granule_length(std::uint64_t granule) const {
  return std::min(granule_bytes, bytes - granule * granule_bytes);
}

ByteRange VolumeGeometry::bytes_of(GranuleRange range) const {
  const std::uint64_t offset = range.first * granule_bytes;
  return {offset, std::min(range.count * granule_bytes, bytes - offset)};
}

GranuleRange VolumeGeometry::granules_of(ByteRange range) const {
  return {range.offset / granule_bytes, divide_up(range.bytes, granule_bytes)};
}

ChecksumTable::ChecksumTable(std::unique_ptr<StateFile> file, const VolumeGeometry& geometry)
    : file_(std::move(file)),
      geometry_(geometry),
      zero_checksum_full_(crc64_of_zeroes(geometry.granule_bytes)),
      zero_checksum_last_(
          geometry.bytes == 0 ? 0 : crc64_of_zeroes(geometry.granule_length(geometry.granule_count() - 1))) {}

Result<std::unique_ptr<ChecksumTable>> ChecksumTable::create(StateDirectory& state, const std::string& name,
                                                             const VolumeGeometry& geometry) {
  auto file = state.open(name, true);
  if (!file) return fail(file.error());
  Header header{{}, format_version, 0, geometry.bytes, geometry.granule_bytes, 0};
  std::memcpy(header.magic_bytes, magic, sizeof magic);
  header.checksum = header_checksum(header);
  // Cut to nothing first: a left-over of an interrupted creation must not lend its records.
  if (auto done = (*file)->resize(0); !done) return fail(done.error());
  if (auto done = (*file)->resize(records_offset + geometry.granule_count() * 8); !done)
    return fail(done.error());
  if (auto done = (*file)->write(0, std::as_bytes(std::span(&header, 1))); !done) return fail(done.error());
  return std::unique_ptr<ChecksumTable>(new ChecksumTable(std::move(*file), geometry));
}

Result<std::unique_ptr<ChecksumTable>> ChecksumTable::open(StateDirectory& state, const std::string& name,
                                                           const VolumeGeometry& geometry) {
  auto file = state.open(name, false);
  if (!file) return fail(file.error());
  Header header;
  if (auto done = (*file)->read(0, std::as_writable_bytes(std::span(&header, 1))); !done)
    return fail(done.error());
  if (std::memcmp(header.magic_bytes, magic, sizeof magic) != 0)
    return fail(damaged(name, "not a checksum table"));
  if (header.version > format_version) {
    return fail(make_error(ErrorCode::state_newer, "open checksum table", name,
                           "written by a later version of ferryd"));
  }
  if (header.checksum != header_checksum(header)) return fail(damaged(name, "its header fails its checksum"));
  if (VolumeGeometry{header.bytes, header.granule_bytes} != geometry) {
    return fail(damaged(name, "it belongs to a volume of another size"));
  }
  auto size = (*file)->size();
  if (!size) return fail(size.error());
  if (*size != records_offset + geometry.granule_count() * 8)
    return fail(damaged(name, "its length is wrong"));
  return std::unique_ptr<ChecksumTable>(new ChecksumTable(std::move(*file), geometry));
}

std::uint64_t ChecksumTable::zero_checksum(std::uint64_t granule) const {
  return granule + 1 == geometry_.granule_count() ? zero_checksum_last_ : zero_checksum_full_;
}

Result<void> ChecksumTable::read(std::uint64_t first, std::span<std::uint64_t> out) {
  BLOCKFERRY_CHECK(first + out.size() <= geometry_.granule_count(), "a record beyond the volume");
  if (auto done = file_->read(records_offset + first * 8, std::as_writable_bytes(out)); !done) return done;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] ^= zero_checksum(first + i);
  return {};
}

Result<void> ChecksumTable::write(std::uint64_t first, std::span<const std::uint64_t> checksums) {
  BLOCKFERRY_CHECK(first + checksums.size() <= geometry_.granule_count(), "a record beyond the volume");
  scratch_.assign(checksums.begin(), checksums.end());
  std::uint64_t any = 0;
  for (std::size_t i = 0; i < scratch_.size(); ++i) any |= scratch_[i] ^= zero_checksum(first + i);
  if (any == 0) return write_zeroes({first, checksums.size()});
  return file_->write(records_offset + first * 8, std::as_bytes(std::span(scratch_)));
}

Result<void> ChecksumTable::write_zeroes(GranuleRange range) {
  auto next = next_nonzero(range.first);
  if (!next) return fail(next.error());
  if (*next >= range.end()) return {};
  return file_->punch(records_offset + *next * 8, (range.end() - *next) * 8);
}

Result<std::uint64_t> ChecksumTable::next_nonzero(std::uint64_t first) {
  auto offset = file_->next_data(records_offset + first * 8);
  if (!offset) return offset;
  return std::clamp((*offset - records_offset) / 8, first, geometry_.granule_count());
}

Result<std::uint64_t> ChecksumTable::count_zeroes(GranuleRange range) {
  // A file page holds 512 records; ranges up to this are read, larger ones judged by their holes.
  constexpr std::uint64_t read_max = 16 * 512;
  std::uint64_t zeroes = 0;
  std::array<std::uint64_t, 512> records;
  for (std::uint64_t at = range.first; at < range.end();) {
    auto next = next_nonzero(at);
    if (!next) return next;
    const std::uint64_t data = std::min(*next, range.end());
    zeroes += data - at;
    at = data;
    const std::uint64_t count = std::min<std::uint64_t>(records.size(), range.end() - at);
    if (count > 0 && range.count <= read_max) {
      auto done =
          file_->read(records_offset + at * 8, std::as_writable_bytes(std::span(records).first(count)));
      if (!done) return fail(done.error());
      zeroes += std::uint64_t(std::count(records.begin(), records.begin() + std::ptrdiff_t(count), 0ULL));
    }
    at += count;
  }
  return zeroes;
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
// Preflight of volumes behind NBD servers: their servers are asked, and what they hold is read.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "blockio/nbd_device.h"
#include "daemon/nbd_address.h"
#include "daemon/preflight_rules.h"

namespace blockferry {

namespace {

constexpr Nanoseconds connect_patience = std::chrono::seconds(10), read_patience = std::chrono::seconds(30);
// Where filesystems, volume managers and partition tables have their signatures.
constexpr std::uint64_t head_bytes = 2 * MiB, tail_bytes = 1 * MiB, read_bytes = 1 * MiB;

/// Copies what may bear a signature into a file of the volume's size that is empty elsewhere, for libblkid to
/// look at.
Result<FileDescriptor> signatures_of(NbdConnection& connection) {
  const NbdExport& about = connection.about();
  FileDescriptor file(::memfd_create("signatures", MFD_CLOEXEC));
  if (!file.valid() || ::ftruncate(file.get(), off_t(about.bytes)) != 0)
    return fail(error_from_errno(errno, "make room for", "signatures"));
  const std::uint64_t most = std::min(read_bytes, about.block_bytes_max);
  std::vector<std::byte> buffer(std::max(most / about.block_bytes_min, std::uint64_t(1)) *
                                about.block_bytes_min);
  const std::uint64_t tail = about.bytes - std::min(about.bytes, tail_bytes);
  const std::uint64_t tail_begin = tail / about.block_bytes_min * about.block_bytes_min;
  for (const ByteRange range :
       {ByteRange{0, std::min(about.bytes, head_bytes)}, ByteRange{tail_begin, about.bytes - tail_begin}}) {
    for (std::uint64_t at = range.offset; at < range.end();) {
      const std::span piece(buffer.data(), std::min<std::uint64_t>(buffer.size(), range.end() - at));
      auto done = connection.read(piece, at, read_patience);
      if (!done && connection.alive()) done = connection.read(piece, at, read_patience);  // as a run does
      if (!done) return fail(done.error());
      if (::pwrite(file.get(), piece.data(), piece.size(), off_t(at)) != ssize_t(piece.size()))
        return fail(error_from_errno(errno, "make room for", "signatures"));
      at += piece.size();
    }
  }
  return file;
}

std::string words_of(const Error& error) {
  return error.hint.empty() ? std::strerror(error.errno_value) : error.hint;
}

std::vector<std::string> abilities_of(const NbdExport& about) {
  std::vector<std::string> words;
  words.emplace_back(about.tls ? "encrypted (TLS)" : "not encrypted");
  words.emplace_back(about.tells_holes ? "tells holes, which are not fetched"
                                       : "does not tell holes: all of it is fetched");
  if (about.can_multi_conn) words.emplace_back("takes several connections");
  if (!about.read_only) {
    words.emplace_back(about.can_zero ? "zeroes ranges by itself" : "cannot zero: zeroes are sent as data");
    words.emplace_back(about.can_flush ? "flushes"
                       : about.can_fua ? "cannot flush, but writes through"
                                       : "can neither flush nor write through");
  }
  words.emplace_back(about.read_only ? "read-only" : "can be written");
  if (about.block_bytes_min > 512)
    words.push_back("works in blocks of " + format_size(about.block_bytes_min));
  return words;
}

}  // namespace

bool Preflight::examine_nbd(const std::string& uri, Examined& examined, bool as_target) {
  PreflightVolume& volume = examined.volume;
  volume.kind = "nbd";
  const auto parsed = parse_nbd_uri(uri);
  if (!parsed) {
    refuse(uri, parsed.error().hint);
    return false;
  }
  volume.identity = volume.resolved = nbd_identity(*parsed);
  if (!check_other_runs(examined, as_target)) return false;
  auto connection = NbdConnection::connect(nbd_address(request_, uri), connect_patience);
  if (!connection) {
    refuse(uri, words_of(connection.error()));
    return false;
  }
  examined.nbd = connection->about();
  volume.bytes = examined.nbd.bytes;
  volume.abilities = abilities_of(examined.nbd);
  volume.granule_bytes_min = examined.nbd.block_bytes_min;
  auto signatures = signatures_of(*connection);
  if (signatures) {
    examined.content = content_of("/proc/self/fd/" + std::to_string(signatures->get()));
    volume.content = examined.content.type;
  } else if (as_target && !request_.overwrite) {
    refuse(uri, "the target cannot be read, so nobody can tell what it holds: " +
                    words_of(signatures.error()) + "; --overwrite replaces it all the same");
  } else if (!as_target && request_.on_read_error == OnReadError::fail) {
    refuse(uri, "the source cannot be read: " + words_of(signatures.error()) +
                    "; --on-read-error skip passes over what is unreadable");
  }
  return true;
}

void Preflight::check_nbd_source(const Examined& source) {
  const std::string& uri = source.volume.path;
  if (wants_live(source)) {
    return refuse(uri,
                  "writes to a volume behind an NBD server cannot be tracked: clone it while nobody "
                  "writes to it, or name the volume where it is used");
  }
  check_idle_options();
}

void Preflight::check_nbd_target(const Examined& target) {
  const std::string& uri = target.volume.path;
  const NbdExport& nbd = target.nbd;
  if (nbd.read_only) return refuse(uri, "the target is read-only: its server gives it for reading only");
  if (nbd.can_flush || nbd.can_fua) return;
  const std::string what =
      "its server can neither flush nor write through, so nobody can promise that what "
      "was copied stays there";
  if (request_.force) {
    warn(uri, what);
  } else {
    refuse(uri, what + "; --force copies all the same");
  }
}

/// The server takes nothing smaller, and two writes to the same of its blocks would undo each other.
void Preflight::check_granule(const PreflightVolume& volume) {
  if (request_.granule_bytes == 0 || request_.granule_bytes >= volume.granule_bytes_min) return;
  refuse(volume.path, "its server works in blocks of " + format_size(volume.granule_bytes_min) +
                          ": --granule cannot be less");
}

}  // namespace blockferry

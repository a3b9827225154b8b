// SPDX-License-Identifier: Apache-2.0
// The order of the refusals is the order of this file: the request, the source, each target, the two
// together.
#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "blockio/base/clock.h"
#include "blockio/base/file_descriptor.h"
#include "blockio/base/units.h"
#include "blockio/file_device.h"
#include "daemon/handover.h"
#include "daemon/preflight_rules.h"
#include "daemon/quiesced_filesystems.h"
#include "daemon/quiesced_map.h"
#include "daemon/references.h"
#include "daemon/tracker_pins.h"

namespace blockferry {

namespace {

std::string resolve(const std::string& path) {
  if (const auto uri = parse_nbd_uri(path)) return nbd_identity(*uri);
  char buffer[PATH_MAX];
  if (::realpath(path.c_str(), buffer) != nullptr) return buffer;
  // A file that is yet to be made: its directory, and its name.
  const auto slash = path.rfind('/');
  const std::string directory = slash == 0 ? "/" : path.substr(0, slash);
  if (::realpath(directory.c_str(), buffer) == nullptr) return path;
  const std::string base = buffer;
  return (base == "/" ? "" : base) + path.substr(slash);
}

std::string parent_of(const std::string& path) {
  const auto slash = path.rfind('/');
  return slash == 0 || slash == std::string::npos ? "/" : path.substr(0, slash);
}

bool is_symlink(const std::string& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode);
}

/// An image has no sectors of its own: its GPT stands in the second of those it was made for. MBRs are taken
/// to be made for the common ones.
std::uint32_t table_sector_in_file(const std::string& path, const VolumeContent& content) {
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  for (const std::uint32_t sector : {512u, 4096u}) {
    char signature[8];
    if (fd.valid() && ::pread(fd.get(), signature, sizeof signature, sector) == sizeof signature &&
        std::memcmp(signature, "EFI PART", sizeof signature) == 0)
      return sector;
  }
  return content.partition_table ? 512 : 0;
}

}  // namespace

/// A source in use is live without being told; others when they are to be handed over, or the user says so.
bool Preflight::wants_live(const Examined& source) const {
  if (inconsistent_by_choice()) return false;
  return source.volume.in_use || request_.kind == RunKind::migrate || request_.mode == RunMode::hybrid ||
         request_.tracker == TrackerChoice::ebpf;
}

void Preflight::check_options() {
  const std::string& source = request_.source;
  const bool guest = is_qemu_uri(source);
  if (request_.tracker == TrackerChoice::qemu && !guest)
    refuse(source, "--tracker qemu needs a source in QEMU: qemu:/PATH/TO/QMP-SOCKET?node=NODE");
  if (request_.handover == "qemu" && !guest) refuse(source, "--handover qemu needs a source in QEMU");
  if (request_.handover == "dm-swap" && request_.kind != RunKind::migrate)
    refuse(source, "--handover dm-swap moves the volume: it goes with migrate");
  if (request_.sync_every_ms != 0 && !request_.keep)
    refuse(source, "--sync-every brings a run up to date that keeps tracking: give --keep too");
  if (request_.mode == RunMode::incremental && request_.tracker == TrackerChoice::none)
    refuse(source, "--mode incremental compares checksums: leave --tracker none out");
  if (!request_.resume_cmd.empty() && request_.quiesce_cmd.empty())
    refuse(source, "--resume-cmd undoes what --quiesce-cmd did: give both");
  if (request_.keep && request_.kind == RunKind::migrate)
    refuse(source, "--keep goes with clone: migrate gives the source up");
}

/// Options that mean nothing for a source that nobody uses.
void Preflight::check_idle_options() {
  const auto needs_live = [&](bool asked, const char* option) {
    if (!asked) return;
    refuse(request_.source,
           std::string(option) +
               " needs a live source, and this one is not in use; --mode hybrid treats it as one");
  };
  needs_live(request_.cutover == CutoverChoice::manual, "--cutover manual");
  needs_live(!request_.quiesce_cmd.empty(), "--quiesce-cmd");
  needs_live(!request_.cutover_cmd.empty(), "--cutover-cmd");
  needs_live(!request_.handover.empty(), "--handover");
  needs_live(request_.keep && request_.sync_every_ms != 0, "--sync-every");
}

/// False where nothing more can be said of it; the refusal stands then.
bool Preflight::examine(const std::string& path, Examined& examined, bool as_target) {
  PreflightVolume& volume = examined.volume;
  volume.path = path;
  if (is_nbd_uri(path)) return examine_nbd(path, examined, as_target);
  if (is_qemu_uri(path)) return examine_qemu(path, examined, as_target);
  volume.resolved = resolve(path);
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    volume.kind = "missing";
    const int why = errno;
    if (why == ENOENT && as_target && is_symlink(path)) {
      refuse(path, "it is a symbolic link that leads nowhere; name the file itself");
      return false;
    }
    if (why == ENOENT && as_target) return true;
    refuse(path, why == ENOENT ? "there is no such device or file; `ferryctl devices` lists what there is"
                               : std::string(std::strerror(why)));
    return false;
  }
  if (S_ISDIR(status.st_mode)) {
    refuse(path, "it is a directory; name a block device or a file");
    return false;
  }
  auto info = probe_file_device(path);
  if (!info) {
    refuse(path, info.error().code == ErrorCode::invalid_argument
                     ? info.error().hint
                     : std::string(std::strerror(info.error().errno_value)));
    return false;
  }
  volume.kind = info->kind == DeviceKind::block ? "block" : "file";
  volume.identity = info->identity;
  volume.bytes = info->bytes;
  volume.logical_block_bytes = info->kind == DeviceKind::block ? info->logical_block_bytes : 0;
  node_of_path(path, examined.node);
  // Before anything is read: another run may hold it because it hangs.
  if (!check_other_runs(examined, as_target)) return false;
  examined.use = settled_use_of(examined.node);
  examined.content = content_of(path);
  volume.mounts = examined.use.mounts;
  volume.holders = examined.use.holders;
  volume.holders.insert(volume.holders.end(), examined.use.writers.begin(), examined.use.writers.end());
  volume.content = examined.content.type;
  volume.holders.insert(volume.holders.end(), examined.use.readers.begin(), examined.use.readers.end());
  volume.in_use = as_target ? examined.use.any() : examined.use.may_be_written();
  if (info->kind == DeviceKind::file) {
    examined.table_sector_bytes = table_sector_in_file(path, examined.content);
  } else if (examined.content.partition_table) {
    examined.table_sector_bytes = volume.logical_block_bytes;
  }
  return true;
}

// The source.

void Preflight::check_source(const Examined& source) {
  const std::string& path = source.volume.path;
  check_granule(source.volume);
  if (source.volume.kind == "nbd") return check_nbd_source(source);
  if (source.volume.kind == "qemu") return check_qemu_source(source);
  if (source.volume.kind == "block" && source.volume.bytes == 0)
    return refuse(path, "the device is empty: it has no medium");
  check_source_readable(source);
  if (wants_live(source)) return check_live_source(source);
  check_idle_options();
  if (source.volume.in_use)
    warn(path, source.use.reason() + ": the copy will not be consistent (--tracker none --force)");
}

/// Whether its writes can be tracked, and whether it can be held still for the cutover.
void Preflight::check_live_source(const Examined& source) {
  const std::string& path = source.volume.path;
  const std::string otherwise = "; release it, or take an inconsistent copy with --tracker none --force";
  const std::string in_use = source.volume.in_use ? "the source is " + source.use.reason() + ", and " : "";
  if (request_.mode == RunMode::full || request_.tracker == TrackerChoice::checksum ||
      request_.tracker == TrackerChoice::none) {
    return refuse(
        path, in_use + "only --mode hybrid with --tracker ebpf gives a consistent copy of it" + otherwise);
  }
  if (source.volume.kind != "block") {
    return refuse(path, in_use +
                            "writes to files cannot be tracked: name the block device that is used, as "
                            "/dev/loop0" +
                            otherwise);
  }
  if (const std::string& missing = live_tracking_missing(); !missing.empty())
    return refuse(path, in_use + "this machine cannot track its writes: " + missing + otherwise);
  Handover handover = choose_handover(request_, source.node);
  report_.handover = handover.how;
  if (request_.kind == RunKind::migrate) {
    if (!handover.refused.empty()) return refuse(path, handover.refused);
    if (!handover.warning.empty()) warn(path, handover.warning);
    report_.swap = std::move(handover.swap);
  }
  const std::string why = report_.swap
                              ? suspending_refused(source.node)
                              : quiescing_refused(request_.source, source.node, freeze_options_for(request_));
  if (!why.empty()) return refuse(path, why + otherwise);
  report_.tracker = "ebpf";
  if (request_.mode != RunMode::incremental) report_.mode = "hybrid";
}

void Preflight::check_source_readable(const Examined& source) {
  const PreflightVolume& volume = source.volume;
  const FileDescriptor fd(::open(volume.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid())
    return refuse(volume.path, std::string("the source cannot be read: ") + std::strerror(errno));
  if (request_.on_read_error == OnReadError::skip) return;  // its holes are known of
  std::byte buffer[512];
  for (const std::uint64_t offset :
       {std::uint64_t(0), volume.bytes - std::min<std::uint64_t>(volume.bytes, sizeof buffer)}) {
    if (::pread(fd.get(), buffer, sizeof buffer, off_t(offset)) < 0) {
      return refuse(volume.path, std::string("the source cannot be read at offset ") +
                                     std::to_string(offset) + ": " + std::strerror(errno) +
                                     "; --on-read-error skip passes over what is unreadable");
    }
  }
}

// Targets.

void Preflight::check_target(const Examined& target, const Examined& source) {
  const PreflightVolume& volume = target.volume;
  if (volume.kind == "missing") return check_new_file(target, source);
  if (volume.resolved == source.volume.resolved)
    return refuse(volume.path, "it is the source itself (" + source.volume.path + ")");
  if (source.volume.kind == "qemu") check_target_of_guest(target);
  if (volume.kind == "nbd") {
    check_nbd_target(target);
    check_granule(volume);
  } else {
    check_local_target(target, source);
  }
  check_size(target, source);
  check_content(target);
  check_sectors(target, source);
}

void Preflight::check_local_target(const Examined& target, const Examined& source) {
  const PreflightVolume& volume = target.volume;
  if (target.node == source.node) {
    return refuse(volume.path, "it is the source itself (" + source.volume.path + ")");
  }
  if (source.volume.kind != "nbd" && same_storage(target.node, source.node)) {
    return refuse(volume.path,
                  "it lies on the source, or the source lies on it, or both on the same bytes of a third (" +
                      source.volume.path + ")");
  }
  if (volume.kind == "block" && volume.bytes == 0) {
    return refuse(volume.path, "the device is empty: it has no medium");
  }
  if (volume.in_use) refuse(volume.path, "the target is " + target.use.reason() + "; release it first");
  if (!volume.in_use && volume.kind == "block" && held_exclusively(volume.path)) {
    refuse(
        volume.path,
        "the target is held exclusively by a program or the kernel (a mount, an export); release it first");
  }
  if (!check_writable(target)) return;
  if (volume.kind == "file") check_file_size(target, source);
  if (volume.kind == "file" && volume.bytes == 0) check_room(target, source);
}

/// Files are cut to size.
void Preflight::check_size(const Examined& target, const Examined& source) {
  const PreflightVolume& volume = target.volume;
  if (volume.kind == "file" || volume.bytes >= source.volume.bytes) return;
  refuse(volume.path, "the target is smaller than the source: " + format_size(volume.bytes) + " (" +
                          std::to_string(volume.bytes) + " bytes) for " + format_size(source.volume.bytes) +
                          " (" + std::to_string(source.volume.bytes) + " bytes)");
}

/// Without opening it for writing: closing it again would set off udev's rules for a changed disk.
bool Preflight::check_writable(const Examined& target) {
  const PreflightVolume& volume = target.volume;
  const FileDescriptor fd(::open(volume.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  const int failure = errno;
  int read_only = 0;
  if (::access(volume.path.c_str(), W_OK) != 0 ||
      (fd.valid() && volume.kind == "block" && ::ioctl(fd.get(), BLKROGET, &read_only) == 0 &&
       read_only != 0)) {
    refuse(volume.path, "the target is read-only");
    return false;
  }
  if (!fd.valid()) {
    refuse(volume.path, std::string("the target cannot be opened: ") + std::strerror(failure));
    return false;
  }
  std::byte buffer[512];
  if (!request_.overwrite && ::pread(fd.get(), buffer, sizeof buffer, 0) < 0) {
    refuse(volume.path, std::string("the target cannot be read, so nobody can tell what it holds: ") +
                            std::strerror(errno) + "; --overwrite replaces it all the same");
    return false;
  }
  return true;
}

/// The same target by two names, or two that share bytes.
void Preflight::check_twice(const Examined& target, const std::vector<Examined>& earlier) {
  for (const auto& other : earlier) {
    const bool exist = target.volume.kind != "missing" && other.volume.kind != "missing";
    const bool local = target.volume.kind != "nbd" && other.volume.kind != "nbd";
    if (target.volume.resolved == other.volume.resolved || (exist && local && target.node == other.node))
      return refuse(target.volume.path, "it is named twice as a target");
    if (exist && local && same_storage(target.node, other.node)) {
      return refuse(target.volume.path, "it shares its storage with the target " + other.volume.path);
    }
  }
}

void Preflight::check_new_file(const Examined& target, const Examined& source) {
  const std::string& path = target.volume.resolved;
  if (target.volume.path.ends_with("/"))
    return refuse(target.volume.path, "it names a directory, not a file");
  const std::string parent = parent_of(path);
  struct stat status {};
  const auto below = [&](const char* directory) { return path.starts_with(directory); };
  if ((below("/dev/") && !below("/dev/shm/")) || below("/proc/") || below("/sys/")) {
    return refuse(target.volume.path, "there is no such device; `ferryctl devices` lists what there is");
  }
  if (::stat(parent.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
    return refuse(target.volume.path, "its directory " + parent + " does not exist");
  }
  if (::access(parent.c_str(), W_OK) != 0)
    return refuse(target.volume.path, "the target is read-only: " + parent + " cannot be written");
  VolumeNode directory{false, status.st_dev, status.st_ino};
  if (source.volume.kind != "nbd" && same_storage(directory, source.node)) {
    return refuse(target.volume.path, "it would lie on the source (" + source.volume.path + ")");
  }
  check_room(target, source);
}

/// A target file that takes its space as it is written. Only a warning: much of the source may be zeroes.
void Preflight::check_room(const Examined& target, const Examined& source) {
  struct statvfs room {};
  struct stat from {};
  if (::statvfs(parent_of(target.volume.resolved).c_str(), &room) != 0) return;
  std::uint64_t needed = source.volume.bytes;
  if (source.volume.kind == "file" && ::stat(source.volume.path.c_str(), &from) == 0)
    needed = std::min<std::uint64_t>(needed, std::uint64_t(from.st_blocks) * 512);
  const std::uint64_t free_bytes = std::uint64_t(room.f_bavail) * room.f_frsize;
  if (free_bytes < needed) {
    warn(target.volume.path,
         "up to " + format_size(needed) + " are needed and " + format_size(free_bytes) + " are free");
  }
}

void Preflight::check_file_size(const Examined& target, const Examined& source) {
  const std::uint64_t bytes = target.volume.bytes;
  if (bytes == 0 || bytes == source.volume.bytes || request_.overwrite) return;
  refuse(target.volume.path,
         std::string("the target file is ") + (bytes < source.volume.bytes ? "smaller" : "larger") +
             " than the source: " + std::to_string(bytes) + " bytes for " +
             std::to_string(source.volume.bytes) +
             (bytes < source.volume.bytes ? "; --overwrite lets it grow" : "; --overwrite cuts it to size"));
}

void Preflight::check_content(const Examined& target) {
  if (target.content.type.empty() || request_.overwrite) return;
  refuse(target.volume.path,
         "the target bears " +
             std::string(target.content.partition_table ? "a partition table" : "a signature") + " (" +
             target.content.type + "); --overwrite replaces it");
}

/// Partition tables count in sectors: on sectors of another size they point elsewhere.
void Preflight::check_sectors(const Examined& target, const Examined& source) {
  const std::uint32_t to = target.volume.logical_block_bytes, table = source.table_sector_bytes;
  if (to == 0) return;
  if (table != 0 && table != to && !request_.force) {
    refuse(target.volume.path, "the source's partition table is made for sectors of " +
                                   std::to_string(table) + " bytes, the target has " + std::to_string(to) +
                                   ": the partitions would not be found; --force copies all the same");
  }
  const std::uint32_t from = source.volume.logical_block_bytes;
  if (table == 0 && from != 0 && from < to && !source.content.type.empty()) {
    warn(target.volume.path, "its sectors of " + std::to_string(to) + " bytes are larger than the source's " +
                                 std::to_string(from) + ": some filesystems will not mount there (" +
                                 source.content.type + ")");
  }
}

/// Whether no other run stands against it.
bool Preflight::check_other_runs(const Examined& examined, bool as_target) {
  const bool exists = examined.volume.kind != "missing" && examined.volume.kind != "nbd";
  for (const auto& other : in_use_) {
    if (!as_target && !other.as_target) continue;  // two runs may read one source
    VolumeNode node;
    const bool same = resolve(other.path) == examined.volume.resolved ||
                      (exists && node_of_path(other.path, node) && same_storage(node, examined.node));
    if (!same) continue;
    if (other.run_id.empty()) {
      refuse(examined.volume.path, "it is named twice");
      return false;
    }
    refuse(examined.volume.path, std::string("it is the ") + (other.as_target ? "target" : "source") +
                                     " of run " + other.run_id + "; wait for that run or cancel it");
    return false;
  }
  return true;
}

PreflightReport Preflight::run() {
  report_.mode = request_.mode == RunMode::incremental ? "incremental" : "full";
  report_.tracker = request_.tracker == TrackerChoice::none ? "none" : "checksum";
  check_options();
  Examined source;
  const bool source_known = examine(request_.source, source, false);
  if (source_known) check_source(source);
  report_.source = source.volume;
  std::vector<Examined> earlier;
  for (const auto& path : request_.targets) {
    Examined target;
    if (examine(path, target, true) && source_known) {
      check_twice(target, earlier);
      if (target.volume.kind == "missing") check_other_runs(target, true);
      check_target(target, source);
    }
    report_.targets.push_back(target.volume);
    earlier.push_back(std::move(target));
  }
  // A swapped volume keeps all of its names.
  if (source_known && source.local() && !report_.swap)
    report_.references = references_to(request_.source, source.node);
  return report_;
}

namespace {

Error invalid(const std::string& what, const std::string& why) {
  return make_error(ErrorCode::invalid_argument, "read", what, why);
}

std::optional<Error> check_arguments(const RunRequest& request) {
  std::vector<std::string> paths = request.targets;
  paths.push_back(request.source);
  for (const auto& path : paths) {
    if (is_nbd_uri(path)) {
      if (auto uri = parse_nbd_uri(path); !uri) return uri.error();
      continue;
    }
    if (is_qemu_uri(path)) {
      if (auto uri = parse_qemu_uri(path); !uri) return uri.error();
      continue;
    }
    if (path.find("://") != std::string::npos)
      return invalid(path, "of URIs, qemu:, nbd://, nbds://, nbd+unix:// and nbds+unix:// are known");
    if (path.find('\0') != std::string::npos) return invalid(path, "a path holds no NUL byte");
    if (!path.starts_with("/")) return invalid(path, "an absolute path is needed");
  }
  const std::uint64_t granule = request.granule_bytes;
  if (granule != 0 && (granule < 4 * KiB || granule > 64 * MiB || !std::has_single_bit(granule))) {
    return invalid("--granule", "it is a power of two from 4K to 64M");
  }
  if (request.io_size_bytes % 4096 != 0 || request.io_size_bytes > 64 * MiB) {
    return invalid("--io-size", "it is a multiple of 4K, up to 64M");
  }
  if (request.queue_depth > 1024) return invalid("--queue-depth", "it is at most 1024");
  return std::nullopt;
}

}  // namespace

Result<PreflightReport> preflight(const RunRequest& request, const std::vector<VolumeInUse>& in_use) {
  if (auto error = check_arguments(request)) return fail(*error);
  return Preflight(request, in_use).run();
}

}  // namespace blockferry

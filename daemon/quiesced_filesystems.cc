// SPDX-License-Identifier: Apache-2.0
#include "daemon/quiesced_filesystems.h"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <set>

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "blockio/block_identity.h"
#include "daemon/mounts.h"

namespace blockferry {

namespace {

/// The volume's own number and its partitions', or its disk's.
std::vector<dev_t> devices_of(const VolumeNode& source) {
  std::vector<dev_t> devices{source.device};
  const auto partitions = partitions_of(source.device);
  devices.insert(devices.end(), partitions.begin(), partitions.end());
  if (const dev_t disk = whole_disk_of(source.device); disk != source.device) devices.push_back(disk);
  return devices;
}

bool one_of(const std::string& text, std::initializer_list<const char*> list) {
  return std::any_of(list.begin(), list.end(), [&](const char* each) { return text == each; });
}

bool can_be_frozen(const std::string& type) {
  return one_of(type, {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2", "reiserfs"});
}
bool can_be_fenced(const std::string& type) {
  return one_of(type, {"ext2", "ext3", "ext4", "xfs", "f2fs"});
}

bool has_option(const std::string& options, const std::string& wanted) {
  return ("," + options + ",").find("," + wanted + ",") != std::string::npos;
}

std::string refused_mount(const Mount& mount, const FreezeOptions& options) {
  const std::string where = mount.type + " on " + mount.point;
  if (auto why = unseen_writes_of(mount); !why.empty()) return why;
  if (!can_be_frozen(mount.type))
    return where + " cannot be frozen: give a --quiesce-cmd that unmounts it, and a --resume-cmd";
  if (options.fence && !can_be_fenced(mount.type)) {
    return where +
           " cannot be fenced against its writers: give a --quiesce-cmd that stops them and unmounts it, "
           "and a --resume-cmd";
  }
  return "";
}

}  // namespace

std::string unseen_writes_of(const Mount& mount) {
  const std::string where = mount.type + " on " + mount.point;
  if (one_of(mount.type, {"gfs2", "ocfs2"})) return where + " is used by other machines too: stop it there";
  if (has_option(mount.options, "dax") || has_option(mount.options, "dax=always"))
    return where + " is mounted with dax: it is written past the device; mount it without";
  // Files may be written so one by one.
  if (may_use_dax(mount.superblock) && one_of(mount.type, {"ext4", "xfs"}) &&
      !has_option(mount.options, "dax=never"))
    return where + " may be written past the device: mount it with dax=never";
  return "";
}

std::string swap_file_on(const std::vector<Mount>& mounts) {
  std::ifstream file("/proc/swaps");
  std::string line;
  std::getline(file, line);
  while (std::getline(file, line)) {
    const std::string path = unescape_octal(line.substr(0, line.find_first_of(" \t")));
    struct statx status {};
    if (::statx(AT_FDCWD, path.c_str(), 0, STATX_MNT_ID, &status) != 0 || !S_ISREG(status.stx_mode)) continue;
    const bool here = std::any_of(mounts.begin(), mounts.end(), [&](const Mount& mount) {
      return std::uint64_t(mount.id) == status.stx_mnt_id;
    });
    if (here) return path;
  }
  return "";
}

FreezeOptions freeze_options_for(const RunRequest& request) {
  return {!request.quiesce_cmd.empty(), request.kind == RunKind::migrate};
}

std::string quiescing_refused(const std::string& path, const VolumeNode& source,
                              const FreezeOptions& options) {
  const VolumeUse below = use_below(source);
  if (below.may_be_written())
    return "what it lies on is " + below.reason() + ", where its writes are not seen; release that";
  if (options.by_command) return "";
  const VolumeUse use = settled_use_of(source);
  if (!use.holders.empty()) {
    return "it is " +
           std::string(use.holders.front() == "swap" ? "in use as swap" : "held by " + use.holders.front()) +
           ": release that, name the volume above it, or give a --quiesce-cmd and a --resume-cmd";
  }
  if (!use.writers.empty()) {
    return "it is open for writing in " + use.writers.front() +
           ", which no filesystem can hold still: give a --quiesce-cmd and a --resume-cmd";
  }
  const auto devices = devices_of(source);
  for (const dev_t device : devices) {
    if (btrfs_members(device).size() > 1)
      return "its btrfs lies on several devices, and one of them alone is no copy of it";
  }
  const auto mounts = mounts_of(devices);
  for (const auto& mount : mounts) {
    if (auto why = refused_mount(mount, options); !why.empty()) return why;
  }
  if (const std::string swap = swap_file_on(mounts); !swap.empty())
    return "the swap file " + swap + " on it is written even while it is frozen: swapoff it";
  if (mounts.empty() && held_exclusively(path))
    return "it is held by a program or the kernel in a way that cannot be looked into; release it";
  return "";
}

namespace {

Error cannot(const std::string& operation, const std::string& where, const std::string& why) {
  return make_error(ErrorCode::refused, operation, where, why);
}

class QuiescedFilesystems : public QuiescedVolume {
 public:
  QuiescedFilesystems(std::string path, const FreezeOptions& options)
      : path_(std::move(path)), options_(options) {}

  Result<void> open();
  std::vector<GuardHold> holds() const override;
  Result<void> sync_ahead() override;
  Result<void> settle() override;
  void release_without_guard() override;

 private:
  struct Filesystem {
    FileDescriptor fd;
    std::string point;
    dev_t superblock;
  };
  Result<void> open_filesystems(const VolumeNode& source);
  Result<void> open_nodes(const VolumeNode& source);

  const std::string path_;
  const FreezeOptions options_;
  std::vector<Filesystem> filesystems_;
  std::vector<FileDescriptor> nodes_;  ///< of the source and its partitions
};

Result<void> QuiescedFilesystems::open() {
  VolumeNode source;
  if (!node_of_path(path_, source)) return fail(error_from_errno(errno, "look at", path_));
  if (const std::string why = quiescing_refused(path_, source, options_); !why.empty())
    return fail(cannot("cut over", path_, why));
  Result<void> done = open_nodes(source);
  // With commands the filesystems are theirs: a descriptor of ours would keep them from being unmounted.
  if (done && !options_.by_command) done = open_filesystems(source);
  return done;
}

Result<void> QuiescedFilesystems::open_filesystems(const VolumeNode& source) {
  std::set<dev_t> reached;
  std::set<dev_t> missed;
  std::string unreached;
  for (const auto& mount : mounts_of(devices_of(source))) {
    if (reached.contains(mount.superblock)) continue;
    FileDescriptor fd(::open(mount.reach.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    struct statx status {};
    // Another filesystem may be mounted over it.
    if (!fd.valid() || ::statx(fd.get(), "", AT_EMPTY_PATH, STATX_MNT_ID, &status) != 0 ||
        status.stx_mnt_id != std::uint64_t(mount.id)) {
      missed.insert(mount.superblock);
      unreached = mount.point;
      continue;
    }
    reached.insert(mount.superblock);
    filesystems_.push_back({std::move(fd), mount.point, mount.superblock});
  }
  for (const dev_t superblock : missed) {
    if (!reached.contains(superblock))
      return fail(
          cannot("freeze", unreached, "another filesystem is mounted over it, so it cannot be reached"));
  }
  return {};
}

Result<void> QuiescedFilesystems::open_nodes(const VolumeNode& source) {
  for (const dev_t device : devices_of(source)) {
    const std::string path = device_node(device);
    FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!fd.valid()) return fail(error_from_errno(errno, "open", path));
    nodes_.push_back(std::move(fd));
  }
  return {};
}

std::vector<GuardHold> QuiescedFilesystems::holds() const {
  std::vector<GuardHold> holds;
  for (const auto& filesystem : filesystems_) {
    GuardHold hold;
    hold.kind = options_.fence ? "fenced-filesystem" : "filesystem";
    hold.descriptors = {filesystem.fd.get()};
    hold.key = "filesystem " + std::to_string(filesystem.superblock);
    hold.take_verb = "freeze";
    hold.hand_over_verb = "shut down";
    hold.where = filesystem.point;
    holds.push_back(std::move(hold));
  }
  return holds;
}

Result<void> QuiescedFilesystems::sync_ahead() {
  for (const auto& filesystem : filesystems_) {
    if (::syncfs(filesystem.fd.get()) != 0) return fail(error_from_errno(errno, "sync", filesystem.point));
  }
  return {};
}

/// Block devices' own page cache too: not all that is written goes through a filesystem.
Result<void> QuiescedFilesystems::settle() {
  for (const auto& node : nodes_) {
    if (::fsync(node.get()) != 0) return fail(error_from_errno(errno, "flush", path_));
  }
  return {};
}

void QuiescedFilesystems::release_without_guard() {
  for (const auto& filesystem : filesystems_) ::ioctl(filesystem.fd.get(), FITHAW, 0);
}

}  // namespace

Result<std::unique_ptr<QuiescedVolume>> open_quiesced_filesystems(const std::string& path,
                                                                  const FreezeOptions& options) {
  auto volume = std::make_unique<QuiescedFilesystems>(path, options);
  if (auto done = volume->open(); !done) return fail(done.error());
  return volume;
}

}  // namespace blockferry

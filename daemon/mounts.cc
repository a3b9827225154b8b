// SPDX-License-Identifier: Apache-2.0
#include "daemon/mounts.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <set>

#include <libmount/libmount.h>
#include <limits.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/block_identity.h"

namespace blockferry {

namespace {

namespace fs = std::filesystem;

using Table = std::unique_ptr<libmnt_table, decltype(&mnt_unref_table)>;

std::string text_or_empty(const char* text) {
  return text != nullptr ? text : "";
}

std::string link_text(const std::string& path) {
  char text[PATH_MAX];
  const ssize_t length = ::readlink(path.c_str(), text, sizeof text);
  return length <= 0 ? "" : std::string(text, std::size_t(length));
}

std::vector<std::string> processes() {
  std::vector<std::string> names{"self"};
  std::error_code code;
  for (const auto& entry : fs::directory_iterator("/proc", code)) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") == std::string::npos) names.push_back(name);
  }
  return names;
}

/// Never asks a server: a dead one must not hang preflight.
dev_t block_device_at(const std::string& path) {
  struct statx status {};
  if (::statx(AT_FDCWD, path.c_str(), AT_STATX_DONT_SYNC, STATX_TYPE, &status) != 0) return 0;
  return S_ISBLK(status.stx_mode) ? makedev(status.stx_rdev_major, status.stx_rdev_minor) : 0;
}

/// btrfs mounts carry an anonymous number: there only the source's name tells.
dev_t device_of(libmnt_fs* mounted) {
  const dev_t number = mnt_fs_get_devno(mounted);
  const std::string source = text_or_empty(mnt_fs_get_source(mounted));
  if (major(number) != 0 || !source.starts_with("/dev/")) return number;
  const dev_t named = block_device_at(source);
  return named != 0 ? named : number;
}

/// False where the file cannot be read (any more).
bool add_mounts_in(const std::string& process, const std::vector<dev_t>& devices,
                   std::vector<Mount>& mounts) {
  const Table table(mnt_new_table(), &mnt_unref_table);
  if (table == nullptr || mnt_table_parse_file(table.get(), (process + "/mountinfo").c_str()) != 0)
    return false;
  const std::unique_ptr<libmnt_iter, decltype(&mnt_free_iter)> position(mnt_new_iter(MNT_ITER_FORWARD),
                                                                        &mnt_free_iter);
  libmnt_fs* mounted = nullptr;
  while (mnt_table_next_fs(table.get(), position.get(), &mounted) == 0) {
    if (std::find(devices.begin(), devices.end(), device_of(mounted)) == devices.end()) continue;
    Mount mount;
    mount.point = text_or_empty(mnt_fs_get_target(mounted));
    mount.reach = process + "/root" + mount.point;
    mount.type = text_or_empty(mnt_fs_get_fstype(mounted));
    mount.options = text_or_empty(mnt_fs_get_options(mounted));
    mount.superblock = mnt_fs_get_devno(mounted);
    mount.id = mnt_fs_get_id(mounted);
    const bool known = std::any_of(mounts.begin(), mounts.end(), [&](const Mount& other) {
      return other.point == mount.point && other.superblock == mount.superblock;
    });
    if (!known) mounts.push_back(std::move(mount));
  }
  return !mnt_table_is_empty(table.get());
}

}  // namespace

std::vector<dev_t> btrfs_members(dev_t device) {
  std::error_code code;
  for (const auto& filesystem : fs::directory_iterator("/sys/fs/btrfs", code)) {
    std::vector<dev_t> members;
    for (const auto& member : fs::directory_iterator(filesystem.path() / "devices", code)) {
      unsigned major_number = 0, minor_number = 0;
      if (std::sscanf(read_line(member.path() / "dev").c_str(), "%u:%u", &major_number, &minor_number) == 2)
        members.push_back(makedev(major_number, minor_number));
    }
    if (std::find(members.begin(), members.end(), device) != members.end()) return members;
  }
  return {device};
}

/// As seen from each root of each namespace that a process lives in: a process in a chroot sees only what
/// lies below it.
std::vector<Mount> mounts_of(const std::vector<dev_t>& devices) {
  std::vector<dev_t> all;
  for (const dev_t device : devices) {
    const auto members = btrfs_members(device);
    all.insert(all.end(), members.begin(), members.end());
  }
  std::vector<Mount> mounts;
  if (all.empty()) return mounts;
  std::set<std::string> seen;
  for (const auto& name : processes()) {
    const std::string process = "/proc/" + name;
    const std::string view = link_text(process + "/ns/mnt") + " " + link_text(process + "/root");
    if (view == " " || seen.contains(view)) continue;
    // A process that ended meanwhile does not speak for its namespace; another one there will.
    if (add_mounts_in(process, all, mounts)) seen.insert(view);
  }
  return mounts;
}

}  // namespace blockferry

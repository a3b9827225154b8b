// SPDX-License-Identifier: Apache-2.0
#include "daemon/storage_stack.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/base/clock.h"
#include "blockio/base/file_descriptor.h"
#include "blockio/block_identity.h"
#include "daemon/mounts.h"

namespace blockferry {

namespace {

constexpr unsigned depth_max =
    16;  // of a stack; a loop in it would be a kernel's fault, but must not hang us

std::string sysfs_of(dev_t device) {
  return "/sys/dev/block/" + std::to_string(major(device)) + ":" + std::to_string(minor(device));
}

std::vector<std::string> entries_of(const std::string& path) {
  std::vector<std::string> names;
  DIR* directory = ::opendir(path.c_str());
  if (directory == nullptr) return names;
  while (const dirent* entry = ::readdir(directory)) {
    if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
  }
  ::closedir(directory);
  std::sort(names.begin(), names.end());
  return names;
}

dev_t number_from(const std::string& file) {
  unsigned major_number = 0, minor_number = 0;
  if (std::sscanf(read_line(file).c_str(), "%u:%u", &major_number, &minor_number) != 2) return 0;
  return makedev(major_number, minor_number);
}

std::string name_of(dev_t device) {
  char target[PATH_MAX];
  const ssize_t length = ::readlink(sysfs_of(device).c_str(), target, sizeof target);
  if (length <= 0) return std::to_string(major(device)) + ":" + std::to_string(minor(device));
  const std::string link(target, std::size_t(length));
  return link.substr(link.rfind('/') + 1);
}

std::string friendly_name(const std::string& name) {
  const std::string given = read_line("/sys/class/block/" + name + "/dm/name");
  return given.empty() ? name : name + " (" + given + ")";
}

std::uint64_t bytes_in(const std::string& file, std::uint64_t unit) {
  return std::strtoull(read_line(file).c_str(), nullptr, 10) * unit;
}

/// Never asks a server: a dead one must not hang preflight.
bool node_of_open_file(const std::string& path, VolumeNode& node) {
  struct statx status {};
  if (::statx(AT_FDCWD, path.c_str(), AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO, &status) != 0) return false;
  node = S_ISBLK(status.stx_mode)
             ? VolumeNode{true, makedev(status.stx_rdev_major, status.stx_rdev_minor), 0}
             : VolumeNode{false, makedev(status.stx_dev_major, status.stx_dev_minor), ino_t(status.stx_ino)};
  return true;
}

bool contains(const std::vector<VolumeNode>& nodes, const VolumeNode& node) {
  return std::find(nodes.begin(), nodes.end(), node) != nodes.end();
}

void add_once(std::vector<std::string>& list, const std::string& text) {
  if (std::find(list.begin(), list.end(), text) == list.end()) list.push_back(text);
}

std::vector<std::string> processes() {
  auto names = entries_of("/proc");
  std::erase_if(names, [](const std::string& name) {
    return name.find_first_not_of("0123456789") != std::string::npos;
  });
  return names;
}

/// What a loop device stands on. The path in sysfs may mean another file in our mount namespace, or none any
/// more: it serves only where the device itself cannot be asked.
bool loop_backing(dev_t loop, VolumeNode& node) {
  const std::string path = read_line(sysfs_of(loop) + "/loop/backing_file");
  if (path.empty()) return false;
  const FileDescriptor fd(::open(device_path(loop).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status {};
  loop_info64 info{};
  if (fd.valid() && ::fstat(fd.get(), &status) == 0 && status.st_rdev == loop &&
      ::ioctl(fd.get(), LOOP_GET_STATUS64, &info) == 0) {
    node = info.lo_rdevice != 0 ? VolumeNode{true, dev_t(info.lo_rdevice), 0}
                                : VolumeNode{false, dev_t(info.lo_device), ino_t(info.lo_inode)};
    return true;
  }
  return node_of_path(path, node);
}

// Holders.

/// Swap areas: block devices and files alike, by path.
void add_swap(const std::vector<VolumeNode>& nodes, VolumeUse& use) {
  std::ifstream file("/proc/swaps");
  std::string line;
  std::getline(file, line);
  while (std::getline(file, line)) {
    VolumeNode area;
    if (node_of_path(unescape_octal(line.substr(0, line.find_first_of(" \t"))), area) &&
        contains(nodes, area))
      add_once(use.holders, "swap");
  }
}

/// Loop devices that stand on the volume, or on the same bytes as it does.
void add_loops(const VolumeNode& node, const std::vector<VolumeNode>& backings,
               const std::vector<VolumeNode>& partitions, VolumeUse& use) {
  const auto own = nodes_below(node);
  for (const auto& name : entries_of("/sys/block")) {
    if (!name.starts_with("loop") || read_line("/sys/block/" + name + "/loop/backing_file").empty()) continue;
    const VolumeNode loop{true, number_from("/sys/block/" + name + "/dev"), 0};
    VolumeNode backing;
    if (contains(own, loop) || !loop_backing(loop.device, backing)) continue;
    if (!contains(partitions, backing) && !(contains(backings, backing) && same_storage(loop, node)))
      continue;
    const bool read_only = read_line("/sys/block/" + name + "/ro") == "1";
    add_once(read_only ? use.readers : use.holders, name);
  }
}

// Processes.

bool opened_for_writing(const std::string& process, const std::string& descriptor) {
  std::ifstream file("/proc/" + process + "/fdinfo/" + descriptor);
  for (std::string line; std::getline(file, line);) {
    unsigned flags = 0;
    if (std::sscanf(line.c_str(), "flags: %o", &flags) == 1) return (flags & O_ACCMODE) != O_RDONLY;
  }
  return false;
}

bool process_writes(const std::string& process, const std::vector<VolumeNode>& nodes) {
  const std::string directory = "/proc/" + process + "/fd/";
  for (const auto& descriptor : entries_of(directory)) {
    VolumeNode open;
    if (node_of_open_file(directory + descriptor, open) && contains(nodes, open) &&
        opened_for_writing(process, descriptor))
      return true;
  }
  return false;
}

void add_writers(const std::vector<VolumeNode>& nodes, VolumeUse& use) {
  const std::string self = std::to_string(::getpid());
  for (const auto& process : processes()) {
    if (process == self || !process_writes(process, nodes)) continue;
    use.writers.push_back("process " + process + " (" + read_line("/proc/" + process + "/comm") + ")");
  }
}

// The stack.

void add_below(const StorageExtent& extent, std::vector<StorageExtent>& extents, unsigned depth) {
  if (depth > depth_max || std::find(extents.begin(), extents.end(), extent) != extents.end()) return;
  extents.push_back(extent);
  const VolumeNode& node = extent.node;
  const auto somewhere_in = [&](dev_t device) {
    add_below({{true, device, 0}, 0, UINT64_MAX, false}, extents, depth + 1);
  };
  const std::string sysfs = sysfs_of(node.device);
  const auto at = [&](const VolumeNode& below, std::uint64_t start) {
    const std::uint64_t bytes = bytes_in(sysfs + "/size", 512);
    add_below(
        {below, start + std::min(extent.begin, bytes), start + std::min(extent.end, bytes), extent.exact},
        extents, depth + 1);
  };
  if (!node.block) {
    if (major(node.device) != 0) somewhere_in(node.device);
    return;
  }
  if (is_partition(node.device)) at({true, whole_disk_of(node.device), 0}, bytes_in(sysfs + "/start", 512));
  for (const auto& slave : entries_of(sysfs + "/slaves"))
    somewhere_in(number_from("/sys/class/block/" + slave + "/dev"));
  VolumeNode backing;
  if (loop_backing(node.device, backing)) at(backing, bytes_in(sysfs + "/loop/offset", 1));
}

/// Two that both lie somewhere within are taken to be apart: logical volumes of one group.
bool share_bytes(const StorageExtent& one, const StorageExtent& other) {
  return one.node == other.node && one.begin < other.end && other.begin < one.end &&
         (one.exact || other.exact);
}

}  // namespace

bool node_of_path(const std::string& path, VolumeNode& node) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return false;
  if (S_ISBLK(status.st_mode)) {
    node = {true, status.st_rdev, 0};
  } else {
    node = {false, status.st_dev, status.st_ino};
  }
  return true;
}

std::string device_path(dev_t device) {
  std::string name = name_of(device);
  std::replace(name.begin(), name.end(), '!', '/');  // sysfs writes cciss/c0d0 so
  return "/dev/" + name;
}

bool is_partition(dev_t device) {
  return !read_line(sysfs_of(device) + "/partition").empty();
}

bool may_use_dax(dev_t device) {
  return read_line(sysfs_of(whole_disk_of(device)) + "/queue/dax") == "1";
}

std::vector<dev_t> partitions_of(dev_t disk) {
  std::vector<dev_t> partitions;
  for (const auto& entry : entries_of(sysfs_of(disk) + "/")) {
    const std::string directory = sysfs_of(disk) + "/" + entry;
    if (read_line(directory + "/partition").empty()) continue;
    if (const dev_t number = number_from(directory + "/dev"); number != 0) partitions.push_back(number);
  }
  return partitions;
}

std::vector<dev_t> devices_above(dev_t device) {
  std::vector<dev_t> above{device};
  for (std::size_t i = 0; i < above.size() && i < 4096; ++i) {
    std::vector<dev_t> next = partitions_of(above[i]);
    for (const auto& name : entries_of(sysfs_of(above[i]) + "/holders"))
      next.push_back(number_from("/sys/class/block/" + name + "/dev"));
    for (const dev_t each : next) {
      if (each != 0 && std::find(above.begin(), above.end(), each) == above.end()) above.push_back(each);
    }
  }
  return above;
}

std::vector<StorageExtent> extents_below(const VolumeNode& node) {
  std::vector<StorageExtent> extents;
  add_below({node, 0, UINT64_MAX, true}, extents, 0);
  return extents;
}

std::vector<VolumeNode> nodes_below(const VolumeNode& node) {
  std::vector<VolumeNode> nodes;
  for (const auto& extent : extents_below(node)) {
    if (!contains(nodes, extent.node)) nodes.push_back(extent.node);
  }
  return nodes;
}

bool same_storage(const VolumeNode& one, const VolumeNode& other) {
  const auto below_one = extents_below(one), below_other = extents_below(other);
  return std::any_of(below_one.begin(), below_one.end(), [&](const StorageExtent& extent) {
    return std::any_of(below_other.begin(), below_other.end(),
                       [&](const StorageExtent& against) { return share_bytes(extent, against); });
  });
}

std::string unescape_octal(const std::string& text) {
  const auto digit = [&](std::size_t at, char most) { return text[at] >= '0' && text[at] <= most; };
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size() && digit(i + 1, '3') && digit(i + 2, '7') &&
        digit(i + 3, '7')) {
      plain += char((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

namespace {

void add_users(const std::vector<VolumeNode>& nodes, VolumeUse& use) {
  std::vector<dev_t> devices;
  for (const auto& part : nodes) {
    if (!part.block) continue;
    devices.push_back(part.device);
    for (const auto& name : entries_of(sysfs_of(part.device) + "/holders"))
      add_once(use.holders, friendly_name(name));
  }
  for (const auto& mount : mounts_of(devices)) add_once(use.mounts, mount.point);
  add_swap(nodes, use);
}

}  // namespace

VolumeUse use_of(const VolumeNode& node, bool with_writers) {
  std::vector<VolumeNode> nodes, partitions;
  for (const auto& extent : extents_below(node)) {
    if (extent.exact) nodes.push_back(extent.node);
  }
  if (node.block) {
    for (const dev_t partition : partitions_of(node.device)) partitions.push_back({true, partition, 0});
  }
  const auto below = nodes_below(node);
  nodes.insert(nodes.end(), partitions.begin(), partitions.end());
  VolumeUse use;
  add_users(nodes, use);
  add_loops(node, below, partitions, use);
  if (with_writers) add_writers(nodes, use);
  return use;
}

VolumeUse settled_use_of(const VolumeNode& node) {
  VolumeUse use = use_of(node, true);
  for (int attempt = 0; attempt < 3 && !use.writers.empty(); ++attempt) {
    system_clock().sleep_for(std::chrono::milliseconds(100));
    use = use_of(node, true);
  }
  return use;
}

VolumeUse use_below(const VolumeNode& node) {
  std::vector<VolumeNode> nodes;
  const dev_t disk = node.block ? whole_disk_of(node.device) : 0;
  for (const auto& extent : extents_below(node)) {
    const bool seen = extent.node == node || (extent.node.block && extent.node.device == disk);
    if (extent.exact && !seen) nodes.push_back(extent.node);
  }
  VolumeUse use;
  add_users(nodes, use);
  add_loops(node, nodes, {}, use);
  add_writers(nodes, use);
  return use;
}

bool held_exclusively(const std::string& path) {
  constexpr unsigned tries = 6;
  constexpr Nanoseconds pause = std::chrono::milliseconds(200);
  for (unsigned i = 0; i < tries; ++i) {
    if (i != 0) system_clock().sleep_for(pause);
    const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_EXCL | O_CLOEXEC | O_NONBLOCK));
    if (fd.valid() || errno != EBUSY) return false;
  }
  return true;
}

std::string VolumeUse::reason() const {
  if (!mounts.empty()) return "mounted on " + mounts.front();
  if (!holders.empty()) return holders.front() == "swap" ? "in use as swap" : "held by " + holders.front();
  if (!writers.empty()) return "open for writing in " + writers.front();
  if (!readers.empty()) return "held by " + readers.front() + " (read-only)";
  return "";
}

}  // namespace blockferry

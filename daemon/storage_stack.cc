// SPDX-License-Identifier: Apache-2.0
#include "daemon/storage_stack.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/block_identity.h"

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
  char target[4096];
  const ssize_t length = ::readlink(sysfs_of(device).c_str(), target, sizeof target - 1);
  if (length <= 0) return std::to_string(major(device)) + ":" + std::to_string(minor(device));
  const std::string link(target, std::size_t(length));
  return link.substr(link.rfind('/') + 1);
}

std::string friendly_name(const std::string& name, const std::string& sysfs) {
  const std::string given = read_line(sysfs + "/dm/name");
  return given.empty() ? name : name + " (" + given + ")";
}

/// Mountinfo writes spaces and the like as octal escapes.
std::string unescape(const std::string& text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size() && text[i + 1] >= '0' && text[i + 1] <= '3') {
      plain += char((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

/// One mountinfo file for each mount namespace that a process lives in.
std::vector<std::string> mountinfo_files() {
  std::vector<std::string> files{"/proc/self/mountinfo"};
  std::set<ino_t> seen;
  struct stat status {};
  if (::stat("/proc/self/ns/mnt", &status) == 0) seen.insert(status.st_ino);
  for (const auto& name : entries_of("/proc")) {
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    if (::stat(("/proc/" + name + "/ns/mnt").c_str(), &status) == 0 && seen.insert(status.st_ino).second) {
      files.push_back("/proc/" + name + "/mountinfo");
    }
  }
  return files;
}

/// btrfs mounts carry an anonymous device number; their members stand in sysfs by filesystem, their source in
/// mountinfo.
bool is_mount_of(dev_t device, dev_t mounted, const std::string& source) {
  if (mounted == device) return true;
  struct stat status {};
  return source.starts_with("/dev/") && ::stat(source.c_str(), &status) == 0 && S_ISBLK(status.st_mode) &&
         status.st_rdev == device;
}

/// The device numbers of all members of btrfs filesystems that `device` is a member of, itself included.
std::vector<dev_t> btrfs_members(dev_t device) {
  for (const auto& filesystem : entries_of("/sys/fs/btrfs")) {
    std::vector<dev_t> members;
    for (const auto& member : entries_of("/sys/fs/btrfs/" + filesystem + "/devices")) {
      members.push_back(number_from("/sys/fs/btrfs/" + filesystem + "/devices/" + member + "/dev"));
    }
    if (std::find(members.begin(), members.end(), device) != members.end()) return members;
  }
  return {device};
}

void add_mounts(dev_t device, VolumeUse& use) {
  const auto members = btrfs_members(device);
  for (const auto& path : mountinfo_files()) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
      std::istringstream fields(line);
      std::string id, parent, numbers, root, point, field, type, source;
      fields >> id >> parent >> numbers >> root >> point;
      while (fields >> field && field != "-") {
      }
      fields >> type >> source;
      unsigned major_number = 0, minor_number = 0;
      if (std::sscanf(numbers.c_str(), "%u:%u", &major_number, &minor_number) != 2) continue;
      const dev_t mounted = makedev(major_number, minor_number);
      const bool found = std::any_of(members.begin(), members.end(), [&](dev_t member) {
        return is_mount_of(member, mounted, unescape(source));
      });
      const std::string where = unescape(point);
      if (found && std::find(use.mounts.begin(), use.mounts.end(), where) == use.mounts.end())
        use.mounts.push_back(where);
    }
  }
}

void add_holders(dev_t device, VolumeUse& use) {
  for (const auto& name : entries_of(sysfs_of(device) + "/holders")) {
    use.holders.push_back(friendly_name(name, "/sys/class/block/" + name));
  }
}

/// Swap areas: block devices and files alike, by path.
void add_swap(const VolumeNode& node, VolumeUse& use) {
  std::ifstream file("/proc/swaps");
  std::string line;
  std::getline(file, line);
  while (std::getline(file, line)) {
    VolumeNode area;
    if (node_of_path(unescape(line.substr(0, line.find_first_of(" \t"))), area) && area == node)
      use.holders.push_back("swap");
  }
}

/// Loop devices that stand on the volume.
void add_loops(const VolumeNode& node, VolumeUse& use) {
  for (const auto& name : entries_of("/sys/block")) {
    if (!name.starts_with("loop")) continue;
    const std::string backing = read_line("/sys/block/" + name + "/loop/backing_file");
    VolumeNode below;
    if (!backing.empty() && node_of_path(backing, below) && below == node) use.holders.push_back(name);
  }
}

bool opened_for_writing(const std::string& process, const std::string& descriptor) {
  std::ifstream file("/proc/" + process + "/fdinfo/" + descriptor);
  for (std::string line; std::getline(file, line);) {
    unsigned flags = 0;
    if (std::sscanf(line.c_str(), "flags: %o", &flags) == 1) return (flags & O_ACCMODE) != O_RDONLY;
  }
  return false;
}

void add_writers(const VolumeNode& node, VolumeUse& use) {
  const std::string self = std::to_string(::getpid());
  for (const auto& process : entries_of("/proc")) {
    if (process.find_first_not_of("0123456789") != std::string::npos || process == self) continue;
    const std::string directory = "/proc/" + process + "/fd/";
    for (const auto& descriptor : entries_of(directory)) {
      VolumeNode open;
      if (!node_of_path(directory + descriptor, open) || !(open == node)) continue;
      if (!opened_for_writing(process, descriptor)) continue;
      use.writers.push_back("process " + process + " (" + read_line("/proc/" + process + "/comm") + ")");
      break;
    }
  }
}

void add_below(const VolumeNode& node, std::vector<VolumeNode>& nodes, unsigned depth) {
  if (depth > depth_max || std::find(nodes.begin(), nodes.end(), node) != nodes.end()) return;
  nodes.push_back(node);
  if (!node.block) {
    if (major(node.device) != 0) add_below({true, node.device, 0}, nodes, depth + 1);
    return;
  }
  const std::string sysfs = sysfs_of(node.device);
  if (is_partition(node.device)) add_below({true, whole_disk_of(node.device), 0}, nodes, depth + 1);
  for (const auto& slave : entries_of(sysfs + "/slaves")) {
    add_below({true, number_from("/sys/class/block/" + slave + "/dev"), 0}, nodes, depth + 1);
  }
  VolumeNode backing;
  const std::string file = read_line(sysfs + "/loop/backing_file");
  if (!file.empty() && node_of_path(file, backing)) add_below(backing, nodes, depth + 1);
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
  return "/dev/" + name_of(device);
}

bool is_partition(dev_t device) {
  return !read_line(sysfs_of(device) + "/partition").empty();
}

std::vector<dev_t> partitions_of(dev_t disk) {
  std::vector<dev_t> partitions;
  const std::string name = name_of(disk);
  for (const auto& entry : entries_of(sysfs_of(disk) + "/")) {
    if (!entry.starts_with(name)) continue;
    if (const dev_t number = number_from(sysfs_of(disk) + "/" + entry + "/dev"); number != 0)
      partitions.push_back(number);
  }
  return partitions;
}

std::vector<VolumeNode> nodes_below(const VolumeNode& node) {
  std::vector<VolumeNode> nodes;
  add_below(node, nodes, 0);
  return nodes;
}

bool same_storage(const VolumeNode& one, const VolumeNode& other) {
  const auto contains = [](const std::vector<VolumeNode>& nodes, const VolumeNode& node) {
    return std::find(nodes.begin(), nodes.end(), node) != nodes.end();
  };
  return contains(nodes_below(one), other) || contains(nodes_below(other), one);
}

VolumeUse use_of(const VolumeNode& node, bool with_writers) {
  VolumeUse use;
  std::vector<VolumeNode> nodes{node};
  if (node.block) {
    for (const dev_t partition : partitions_of(node.device)) nodes.push_back({true, partition, 0});
  }
  for (const auto& part : nodes) {
    if (part.block) {
      add_mounts(part.device, use);
      add_holders(part.device, use);
    }
    add_swap(part, use);
    add_loops(part, use);
    if (with_writers) add_writers(part, use);
  }
  return use;
}

std::string VolumeUse::reason() const {
  if (!mounts.empty()) return "mounted on " + mounts.front();
  if (!holders.empty()) return holders.front() == "swap" ? "in use as swap" : "held by " + holders.front();
  if (!writers.empty()) return "open for writing in " + writers.front();
  return "";
}

}  // namespace blockferry

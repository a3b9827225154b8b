// SPDX-License-Identifier: Apache-2.0
#include "blockio/block_identity.h"

#include <fstream>
#include <sstream>
#include <vector>

#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

namespace blockferry {

namespace {

std::string sysfs_directory(dev_t device) {
  return "/sys/dev/block/" + std::to_string(major(device)) + ":" + std::to_string(minor(device));
}

bool exists(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0;
}

std::string resolved(const std::string& path) {
  char buffer[PATH_MAX];
  return ::realpath(path.c_str(), buffer) != nullptr ? buffer : path;
}

/// A name that the hardware or a volume manager gave the disk.
std::string given_name(const std::string& directory) {
  for (const char* file : {"/dm/uuid", "/md/uuid", "/wwid", "/device/wwid", "/device/serial", "/serial"}) {
    if (const std::string name = read_line(directory + file); !name.empty()) return name;
  }
  return "";
}

}  // namespace

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  while (!line.empty() && (line.back() == ' ' || line.back() == '\0')) line.pop_back();
  return line;
}

dev_t whole_disk_of(dev_t device) {
  const std::string directory = sysfs_directory(device);
  if (!exists(directory + "/partition")) return device;
  unsigned major_number = 0, minor_number = 0;
  const std::string numbers = read_line(resolved(directory) + "/../dev");
  if (std::sscanf(numbers.c_str(), "%u:%u", &major_number, &minor_number) != 2) return device;
  return makedev(major_number, minor_number);
}

std::string block_identity(dev_t device, const std::string& path) {
  const std::string directory = sysfs_directory(device);
  const std::string disk = sysfs_directory(whole_disk_of(device));
  const std::string partition = read_line(directory + "/partition");
  const std::string suffix = partition.empty() ? "" : "-part" + partition;
  const std::string backing = read_line(disk + "/loop/backing_file");
  if (!backing.empty()) {
    struct stat status {};
    const std::string range = read_line(disk + "/loop/offset") + "+" + read_line(disk + "/loop/sizelimit");
    if (::stat(backing.c_str(), &status) == 0) {
      return "loop:" + std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino) + ":" + range +
             suffix;
    }
    return "loop:" + backing + ":" + range + suffix;
  }
  if (const std::string name = given_name(disk); !name.empty()) return "disk:" + name + suffix;
  return "path:" + path;  // nothing but its place tells it apart
}

std::optional<std::string> block_change_stamp(dev_t device) {
  const std::string disk = sysfs_directory(whole_disk_of(device));
  if (read_line(disk + "/queue/iostats") != "1") return std::nullopt;
  // Documentation/block/stat.rst: writes, merges, sectors are fields 5 to 7; discards 12 to 14. Flushes
  // change nothing.
  std::istringstream counters(read_line(disk + "/stat"));
  std::vector<std::string> fields;
  for (std::string field; counters >> field;) fields.push_back(field);
  if (fields.size() < 15) return std::nullopt;
  const std::string boot = read_line("/proc/sys/kernel/random/boot_id");
  const std::string sequence = read_line(disk + "/diskseq");
  if (boot.empty() || sequence.empty()) return std::nullopt;
  return "block:" + boot + ":" + sequence + ":" + fields[4] + ":" + fields[6] + ":" + fields[11] + ":" +
         fields[13];
}

}  // namespace blockferry

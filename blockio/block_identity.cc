// SPDX-License-Identifier: Apache-2.0
#include "blockio/block_identity.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include <fcntl.h>
#include <limits.h>
#include <linux/loop.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>

#include "blockio/base/clock.h"
#include "blockio/base/file_descriptor.h"

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

/// This boot's disk of that number, and no other that ever had it.
std::string place_of(const std::string& disk) {
  const std::string boot = read_line("/proc/sys/kernel/random/boot_id");
  const std::string sequence = read_line(disk + "/diskseq");
  return boot.empty() || sequence.empty() ? "" : boot + ":diskseq:" + sequence;
}

bool is_loop(const std::string& disk) {
  return !read_line(disk + "/loop/backing_file").empty();
}

/// The kernel's own word on the backing file: its path in sysfs may mean another file in our mount namespace.
std::optional<loop_info64> loop_status(int fd) {
  loop_info64 status{};
  return ::ioctl(fd, LOOP_GET_STATUS64, &status) == 0 ? std::optional(status) : std::nullopt;
}

std::string backing_identity(const loop_info64& status) {
  return std::to_string(status.lo_device) + ":" + std::to_string(status.lo_inode);
}

/// Documentation/block/stat.rst. Flushes change nothing.
std::optional<WriteCounters> counters_of(const std::string& directory) {
  std::istringstream line(read_line(directory + "/stat"));
  std::vector<std::uint64_t> fields;
  for (std::uint64_t field = 0; line >> field;) fields.push_back(field);
  if (fields.size() < 15) return std::nullopt;
  return WriteCounters{fields[4], fields[6], fields[11], fields[13]};
}

std::vector<std::string> partition_directories(const std::string& disk) {
  std::vector<std::string> directories;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(disk + "/", error)) {
    if (!read_line(entry.path().string() + "/partition").empty())
      directories.push_back(entry.path().string());
  }
  return directories;
}

/// File times move with the kernel's tick, which lasts at most this long (CONFIG_HZ=100).
constexpr Nanoseconds tick_max = std::chrono::milliseconds(10);

bool changed_just_now(const struct stat& status) {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  const Nanoseconds age = std::chrono::seconds(now.tv_sec - status.st_ctim.tv_sec) +
                          Nanoseconds(now.tv_nsec - status.st_ctim.tv_nsec);
  return age < tick_max && age > -tick_max;
}

}  // namespace

std::string file_identity(const struct stat& status) {
  return "file:" + std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino);
}

std::optional<std::string> file_change_stamp(const std::string& path) {
  // Another write within the same tick would leave the same time behind: once the tick is over, none can.
  for (int look = 0; look < 2; ++look) {
    if (look > 0) system_clock().sleep_for(tick_max);
    struct stat status {};
    if (::stat(path.c_str(), &status) != 0) return std::nullopt;
    if (changed_just_now(status)) continue;
    return file_identity(status) + ":" + std::to_string(status.st_size) + ":" +
           std::to_string(status.st_ctim.tv_sec) + "." + std::to_string(status.st_ctim.tv_nsec);
  }
  return std::nullopt;
}

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

std::string device_node(dev_t device) {
  const std::string directory = resolved(sysfs_directory(device));
  std::string name = directory.substr(directory.rfind('/') + 1);
  std::replace(name.begin(), name.end(), '!', '/');  // sysfs cannot say "cciss/c0d0"
  return "/dev/" + name;
}

std::string block_identity(dev_t device, const std::string& path) {
  const std::string directory = sysfs_directory(device);
  const std::string disk = sysfs_directory(whole_disk_of(device));
  const std::string partition = read_line(directory + "/partition");
  const std::string suffix = partition.empty() ? "" : "-part" + partition;
  if (is_loop(disk)) {
    const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (const auto status = loop_status(fd.get())) {
      return "loop:" + backing_identity(*status) + ":" + std::to_string(status->lo_offset) + "+" +
             std::to_string(status->lo_sizelimit) + suffix;
    }
  }
  if (const std::string name = given_name(disk); !name.empty()) return "disk:" + name + suffix;
  if (const std::string place = place_of(disk); !place.empty()) return "boot:" + place + suffix;
  return "path:" + path;  // an old kernel: nothing but its path tells it apart
}

std::optional<WriteCounters> write_counters(dev_t device) {
  const dev_t whole = whole_disk_of(device);
  const std::string disk = sysfs_directory(whole);
  if (device == whole) return counters_of(disk);
  // The disk's counters include all partitions'; they are read one after the other, so while others write
  // there may be no moment at which they agree.
  constexpr unsigned tries = 10;
  for (unsigned i = 0; i < tries; ++i) {
    const auto own = counters_of(sysfs_directory(device)), all = counters_of(disk);
    if (!own || !all) return std::nullopt;
    WriteCounters written = *all;
    for (const auto& directory : partition_directories(disk)) {
      const auto partition = counters_of(directory);
      for (std::size_t k = 0; partition && k < written.size(); ++k) written[k] -= (*partition)[k];
    }
    if (counters_of(disk) != all) continue;
    for (std::size_t k = 0; k < written.size(); ++k) written[k] += (*own)[k];
    return written;
  }
  return std::nullopt;
}

std::optional<std::string> block_change_stamp(dev_t device, int fd) {
  const dev_t whole = whole_disk_of(device);
  const std::string disk = sysfs_directory(whole);
  const std::string place = place_of(disk);
  const auto written = write_counters(device);
  if (place.empty() || !written || read_line(disk + "/queue/iostats") != "1") return std::nullopt;
  std::string stamp = "block:" + place;
  for (const std::uint64_t counter : *written) stamp += ":" + std::to_string(counter);
  if (!is_loop(disk)) return stamp;
  if (device != whole) return std::nullopt;  // a write to another partition changes the backing file too
  // A loop device does not count what is written to its backing file by another way.
  const auto status = loop_status(fd);
  const auto backing = file_change_stamp(read_line(disk + "/loop/backing_file"));
  if (!status || !backing || !backing->starts_with("file:" + backing_identity(*status) + ":"))
    return std::nullopt;
  return stamp + ":" + *backing;
}

}  // namespace blockferry

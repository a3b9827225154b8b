// SPDX-License-Identifier: Apache-2.0
// list_devices(): every volume that can be moved.
#include <algorithm>

#include <dirent.h>
#include <nlohmann/json.hpp>
#include <sys/sysmacros.h>

#include "blockio/block_identity.h"
#include "daemon/preflight.h"
#include "daemon/quiesced_filesystems.h"
#include "daemon/storage_stack.h"
#include "daemon/tracker_pins.h"
#include "daemon/volume_content.h"

namespace blockferry {

namespace {

std::uint64_t number_in(const std::string& file) {
  return std::strtoull(read_line(file).c_str(), nullptr, 10);
}

/// Why a volume in use cannot be tracked, or held still; empty: it can.
std::string live_missing(const VolumeNode& node, const std::string& path) {
  if (!live_tracking_missing().empty()) return live_tracking_missing();
  return quiescing_refused(path, node, FreezeOptions());
}

nlohmann::json text_or_null(const std::string& text) {
  return text.empty() ? nlohmann::json(nullptr) : nlohmann::json(text);
}

nlohmann::json describe(const std::string& name) {
  const std::string sysfs = "/sys/class/block/" + name;
  const std::string path = "/dev/" + name;
  unsigned major_number = 0, minor_number = 0;
  std::sscanf(read_line(sysfs + "/dev").c_str(), "%u:%u", &major_number, &minor_number);
  const dev_t device = makedev(major_number, minor_number);
  const VolumeUse use = use_of({true, device, 0}, false);
  const VolumeContent content = content_of(path);
  const dev_t disk = whole_disk_of(device);
  const std::string missing = use.may_be_written() ? live_missing({true, device, 0}, path) : "";
  const std::string disk_sysfs =
      "/sys/dev/block/" + std::to_string(major(disk)) + ":" + std::to_string(minor(disk));
  return {{"path", path},
          {"bytes", number_in(sysfs + "/size") * 512},
          {"logical_block_bytes", number_in(disk_sysfs + "/queue/logical_block_size")},
          {"mounts", use.mounts},
          {"holders", use.holders},
          {"content", content.type},
          {"identity", block_identity(device, path)},
          {"model", read_line(disk_sysfs + "/device/model")},
          {"read_only", number_in(sysfs + "/ro") != 0},
          {"in_use", use.any()},
          {"tracker", text_or_null(!use.may_be_written() ? "checksum"
                                   : missing.empty()     ? "ebpf"
                                                         : "")},
          {"tracker_missing", text_or_null(missing)}};
}

}  // namespace

Result<nlohmann::json> list_devices() {
  DIR* directory = ::opendir("/sys/class/block");
  if (directory == nullptr) return fail(error_from_errno(errno, "list", "/sys/class/block"));
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(directory)) {
    const std::string name = entry->d_name;
    // Loop and zram devices without anything behind them have no size.
    if (name[0] != '.' && number_in("/sys/class/block/" + name + "/size") > 0) names.push_back(name);
  }
  ::closedir(directory);
  std::sort(names.begin(), names.end());
  nlohmann::json list = nlohmann::json::array();
  for (const auto& name : names) {
    auto device = describe(name);
    if (device["bytes"] > 0) list.push_back(std::move(device));  // else it went meanwhile
  }
  return list;
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
#include "daemon/swap_plan.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <sstream>

#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/block_identity.h"
#include "daemon/lvm.h"

namespace blockferry {

namespace {

std::string number_text(dev_t device) {
  return std::to_string(major(device)) + ":" + std::to_string(minor(device));
}

dev_t number_of_text(const std::string& text) {
  unsigned major_number = 0, minor_number = 0;
  char rest = 0;
  if (std::sscanf(text.c_str(), "%u:%u%c", &major_number, &minor_number, &rest) != 2) return 0;
  return makedev(major_number, minor_number);
}

std::string sysfs_line(dev_t device, const char* file) {
  return read_line("/sys/dev/block/" + number_text(device) + "/" + file);
}

std::uint64_t sectors_of(dev_t device) {
  return std::strtoull(sysfs_line(device, "size").c_str(), nullptr, 10);
}

DiskStretch stretch_of(dev_t disk, std::uint64_t offset_sectors, std::uint64_t sectors) {
  return {block_identity(disk, device_node(disk)), number_text(disk), offset_sectors, sectors};
}

tl::unexpected<Error> cannot_swap(const std::string& why) {
  return fail(make_error(ErrorCode::unsupported, "swap", "the volume", why));
}

Result<Place> place_of_linear(const MapTable& table) {
  Place place;
  for (const auto& line : table) {
    std::istringstream words(line.parameters);
    std::string number;
    std::uint64_t offset = 0;
    if (line.type != "linear" || !(words >> number >> offset) || number_of_text(number) == 0)
      return cannot_swap("a map of type " + line.type + " cannot be swapped");
    place.push_back(stretch_of(number_of_text(number), offset, line.sectors));
  }
  return place;
}

std::vector<std::string> paths_in(const std::string& parameters) {
  std::istringstream words(parameters);
  std::vector<std::string> paths;
  for (std::string word; words >> word;) {
    if (number_of_text(word) != 0) paths.push_back(word);
  }
  return paths;
}

/// "/dev/mapper/NAME" of what a map lies on, where that is a map itself.
std::string map_below(dev_t device) {
  std::error_code none;
  for (const auto& slave :
       std::filesystem::directory_iterator("/sys/dev/block/" + number_text(device) + "/slaves", none)) {
    const std::string name = read_line(slave.path().string() + "/dm/name");
    if (!name.empty()) return "/dev/mapper/" + name;
  }
  return "";
}

Error why_not(dev_t source, const std::string& type) {
  std::string why =
      "a map of type " + type + " cannot be swapped: linear ones and multipath with one path can";
  if (type == "crypt") {
    const std::string below = map_below(source);
    why = "it is encrypted, and would be written in clear: " +
          (below.empty() ? "what lies below it is no device-mapper volume that could be swapped"
                         : "name the volume below it, " + below + ", whose ciphertext is moved");
  }
  return make_error(ErrorCode::unsupported, "swap", "the volume", why);
}

Result<void> plan_multipath(const MapTable& table, dev_t source, dev_t target, SwapPlan& plan) {
  const auto paths = paths_in(table.front().parameters);
  if (paths.size() != 1)
    return cannot_swap("a multipath map of several paths cannot be swapped: leave it one");
  if (map_uuid(source).starts_with("mpath-") && ::access("/run/multipathd.pid", F_OK) == 0)
    return cannot_swap("multipathd would load its own table again: stop it until the swap is committed");
  // The kernel keeps a map to the kind of devices that it began with.
  if (!std::filesystem::exists("/sys/dev/block/" + number_text(target) + "/mq"))
    return cannot_swap("the target is no disk that multipath can lie on (it takes no requests)");
  plan.multipath = table.front().parameters;
  plan.multipath.replace((" " + plan.multipath + " ").find(" " + paths[0] + " "), paths[0].size(), "@");
  plan.old_place = {stretch_of(number_of_text(paths[0]), 0, table.front().sectors)};
  return {};
}

/// Its own logical volume in the same group: their extents are exchanged in the group's metadata, too.
Result<void> plan_lvm(dev_t source, dev_t target, SwapPlan& plan) {
  const auto volume = lvm_volume_of(source), other = lvm_volume_of(target);
  if (!volume) return cannot_swap("it is part of another logical volume: name that one");
  if (!other || lvm_group_id(source) != lvm_group_id(target)) {
    return cannot_swap("it is a logical volume, which can lie only on disks of its own group: vgextend " +
                       volume->group +
                       " DISK, lvcreate a volume of the same size there, and name that one as the target");
  }
  if (sectors_of(source) != sectors_of(target))
    return cannot_swap("the target must have exactly the size of the logical volume");
  const auto table = live_table(target);
  if (!table) return fail(table.error());
  auto place = place_of_linear(*table);
  if (!place) return cannot_swap("the target is no plain logical volume");
  for (const auto& [each, device] : {std::pair(*volume, source), std::pair(*other, target)}) {
    const auto recorded = lvm_table(each);
    const auto live = live_table(device);
    if (!recorded) return fail(recorded.error());
    if (!live || *live != *recorded) {
      return cannot_swap("the map of " + each.group + "/" + each.name +
                         " is not as LVM's metadata says: lvchange --refresh " + each.group + "/" +
                         each.name);
    }
  }
  plan.new_place = std::move(*place);
  plan.group = volume->group;
  plan.volume = volume->name;
  plan.target_volume = other->name;
  return {};
}

std::uint32_t logical_block_of(dev_t device) {
  return std::uint32_t(
      std::strtoul(sysfs_line(whole_disk_of(device), "queue/logical_block_size").c_str(), nullptr, 10));
}

/// Nothing or 0: there is none.
dev_t find_disk(const DiskStretch& stretch) {
  const dev_t before = number_of_text(stretch.number);
  if (before != 0 && block_identity(before, device_node(before)) == stretch.identity) return before;
  dev_t found = 0;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/block", none)) {
    const dev_t device = number_of_text(read_line(entry.path().string() + "/dev"));
    if (device == 0 || block_identity(device, device_node(device)) != stretch.identity) continue;
    if (found != 0) return 0;  // nobody knows which
    found = device;
  }
  return found;
}

}  // namespace

Result<SwapPlan> plan_swap(dev_t source, dev_t target) {
  if (map_name(source).empty()) return cannot_swap("it is no device-mapper volume");
  const auto table = live_table(source);
  if (!table) return fail(table.error());
  if (table->empty()) return cannot_swap("it has no table");
  if (logical_block_of(target) > logical_block_of(source))
    return cannot_swap("the target's sectors are larger than the volume's");
  SwapPlan plan;
  if (table->size() == 1 && table->front().type == "multipath") {
    if (auto done = plan_multipath(*table, source, target, plan); !done) return fail(done.error());
  } else {
    const auto other =
        std::find_if(table->begin(), table->end(), [](const auto& line) { return line.type != "linear"; });
    if (other != table->end()) return fail(why_not(source, other->type));
    auto place = place_of_linear(*table);
    if (!place) return fail(place.error());
    plan.old_place = std::move(*place);
  }
  if (map_uuid(source).starts_with("LVM-")) {
    if (auto done = plan_lvm(source, target, plan); !done) return fail(done.error());
  } else {
    plan.new_place = {stretch_of(target, 0, sectors_of(source))};
  }
  return plan;
}

Result<MapTable> linear_table(const Place& place) {
  MapTable table;
  std::uint64_t start = 0;
  for (const auto& stretch : place) {
    const dev_t disk = find_disk(stretch);
    if (disk == 0) {
      return fail(make_error(ErrorCode::device_gone, "find", stretch.identity,
                             "a disk of the volume is not there any more, or it is there twice"));
    }
    table.push_back(
        {start, stretch.sectors, "linear", number_text(disk) + " " + std::to_string(stretch.offset_sectors)});
    start += stretch.sectors;
  }
  return table;
}

Result<MapTable> volume_table(const SwapPlan& plan, const Place& place) {
  auto table = linear_table(place);
  if (!table || plan.multipath.empty()) return table;
  std::string parameters = plan.multipath;
  const std::string number = table->front().parameters.substr(0, table->front().parameters.find(' '));
  parameters.replace(parameters.find('@'), 1, number);
  return MapTable{{0, table->front().sectors, "multipath", parameters}};
}

Result<bool> lies_on(dev_t map, const SwapPlan& plan, const Place& place) {
  const auto live = live_table(map), wanted = volume_table(plan, place);
  if (!live) return fail(live.error());
  if (!wanted) return fail(wanted.error());
  if (plan.multipath.empty() || live->size() != 1) return *live == *wanted;
  return live->front().type == "multipath" &&
         paths_in(live->front().parameters) == paths_in(wanted->front().parameters);
}

}  // namespace blockferry

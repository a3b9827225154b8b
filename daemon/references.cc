// SPDX-License-Identifier: Apache-2.0
#include "daemon/references.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <memory>
#include <sstream>

#include <blkid.h>
#include <dirent.h>

#include "blockio/block_identity.h"
#include "daemon/volume_content.h"

namespace blockferry {

namespace {

struct Named {
  std::string path;
  VolumeNode node;
  VolumeContent content;
  std::string part_uuid, part_label;  ///< of its entry in the disk's table
};

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return char(std::tolower(c)); });
  return text;
}

/// From the disk's table itself: udev's links are missing in containers.
void read_partition_entry(Named& volume) {
  if (!volume.node.block || !is_partition(volume.node.device)) return;
  const std::unique_ptr<blkid_struct_probe, decltype(&::blkid_free_probe)> probe(
      ::blkid_new_probe_from_filename(volume.path.c_str()), &::blkid_free_probe);
  if (!probe) return;
  ::blkid_probe_enable_superblocks(probe.get(), 0);
  ::blkid_probe_enable_partitions(probe.get(), 1);
  ::blkid_probe_set_partitions_flags(probe.get(), BLKID_PARTS_ENTRY_DETAILS);
  if (::blkid_do_fullprobe(probe.get()) < 0) return;
  const char* value = nullptr;
  if (::blkid_probe_lookup_value(probe.get(), "PART_ENTRY_UUID", &value, nullptr) == 0)
    volume.part_uuid = value;
  if (::blkid_probe_lookup_value(probe.get(), "PART_ENTRY_NAME", &value, nullptr) == 0)
    volume.part_label = value;
}

std::vector<std::string> names_in(const std::string& path) {
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

/// Whether "UUID=…", "LABEL=…", "PARTUUID=…" or a path in a table means this volume.
bool means(const std::string& name, const Named& volume, const std::string& root) {
  VolumeNode node;
  const auto leads_here = [&](const std::string& path) {
    return node_of_path(path, node) && node == volume.node;
  };
  const auto equals = name.find('=');
  if (equals != std::string::npos && !name.starts_with("/")) {
    const std::string tag = name.substr(0, equals);
    std::string value = name.substr(equals + 1);
    std::erase(value, '"');
    if (value.empty()) return false;
    // Hexadecimal digits are written in either case.
    if (tag == "UUID") return lower(value) == lower(volume.content.uuid);
    if (tag == "LABEL") return value == volume.content.label;
    if (tag == "PARTUUID")
      return lower(value) == lower(volume.part_uuid) || leads_here(root + "/dev/disk/by-partuuid/" + value);
    if (tag == "PARTLABEL")
      return value == volume.part_label || leads_here(root + "/dev/disk/by-partlabel/" + value);
    return tag == "ID" && leads_here(root + "/dev/disk/by-id/" + value);
  }
  if (!name.starts_with("/")) return false;
  return name == volume.path || leads_here(name) || (!root.empty() && leads_here(root + name));
}

/// `column` of the table names a device.
void table_lines(const std::string& table, unsigned column, const Named& volume, const std::string& root,
                 std::vector<PreflightFinding>& found) {
  std::ifstream file(root + table);
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string field;
    for (unsigned i = 0; i <= column; ++i) {
      field.clear();
      fields >> field;
    }
    if (line.starts_with("#") || field.empty() || !means(unescape_octal(field), volume, root)) continue;
    found.push_back({volume.path, table + " names it: " + line});
  }
}

void disk_links(const Named& volume, const std::string& root, std::vector<PreflightFinding>& found) {
  if (!volume.node.block) return;
  for (const auto& kind : names_in(root + "/dev/disk")) {
    const std::string directory = root + "/dev/disk/" + kind;
    for (const auto& link : names_in(directory)) {
      VolumeNode node;
      if (!node_of_path(directory + "/" + link, node) || !(node == volume.node)) continue;
      found.push_back({volume.path, "the link /dev/disk/" + kind + "/" + link + " leads to it"});
    }
  }
}

/// `whole_disk`: the table goes along, and with it the names of partitions.
void doubled_names(const Named& volume, bool whole_disk, std::vector<PreflightFinding>& found) {
  const VolumeContent& content = volume.content;
  if (!content.uuid.empty()) {
    found.push_back({volume.path, "the clone will bear the same " + content.type + " UUID " + content.uuid +
                                      "; never mount both by UUID"});
  }
  if (!content.label.empty())
    found.push_back({volume.path, "the clone will bear the same label " + content.label});
  if (!content.table_uuid.empty()) {
    found.push_back(
        {volume.path, "the clone will bear the same partition table identifier " + content.table_uuid});
  }
  if (whole_disk && !volume.part_uuid.empty()) {
    found.push_back({volume.path, "the clone's partition will bear the same PARTUUID " + volume.part_uuid});
  }
}

void holders(const Named& volume, std::vector<PreflightFinding>& found) {
  if (volume.content.type == "LVM2_member") {
    found.push_back(
        {volume.path, "it is an LVM physical volume: hide the old disk from LVM before the clone is seen"});
  }
  if (!volume.node.block) return;
  for (const auto& holder : use_of(volume.node, false).holders) {
    const std::string name = holder.substr(0, holder.find(' '));
    if (name.starts_with("md")) found.push_back({volume.path, "it is a member of the RAID array " + name});
    const std::string uuid = read_line("/sys/class/block/" + name + "/dm/uuid");
    if (uuid.starts_with("mpath-"))
      found.push_back({volume.path, "it is a path of the multipath device " + holder});
    if (uuid.starts_with("LVM-"))
      found.push_back({volume.path, "the logical volume " + holder + " lies on it"});
    if (uuid.starts_with("CRYPT-"))
      found.push_back({volume.path, "the encrypted volume " + holder + " lies on it"});
  }
}

}  // namespace

std::vector<PreflightFinding> references_to(const std::string& path, const VolumeNode& node,
                                            const std::string& root) {
  std::vector<Named> volumes{{path, node, content_of(path), "", ""}};
  if (node.block) {
    for (const dev_t partition : partitions_of(node.device)) {
      const std::string name = device_path(partition);
      volumes.push_back({name, {true, partition, 0}, content_of(name), "", ""});
    }
  }
  std::vector<PreflightFinding> found;
  for (auto& volume : volumes) {
    read_partition_entry(volume);
    table_lines("/etc/fstab", 0, volume, root, found);
    table_lines("/etc/crypttab", 1, volume, root, found);
    disk_links(volume, root, found);
    holders(volume, found);
    doubled_names(volume, !(volume.node == node), found);
  }
  return found;
}

}  // namespace blockferry

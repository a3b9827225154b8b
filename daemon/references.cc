// SPDX-License-Identifier: Apache-2.0
#include "daemon/references.h"

#include <algorithm>
#include <fstream>
#include <sstream>

#include <dirent.h>

#include "blockio/block_identity.h"
#include "daemon/volume_content.h"

namespace blockferry {

namespace {

struct Named {
  std::string path;
  VolumeNode node;
  VolumeContent content;
};

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
  const auto equals = name.find('=');
  if (equals != std::string::npos && !name.starts_with("/")) {
    const std::string tag = name.substr(0, equals);
    std::string value = name.substr(equals + 1);
    std::erase(value, '"');
    if (tag == "UUID") return !value.empty() && value == volume.content.uuid;
    if (tag == "LABEL") return !value.empty() && value == volume.content.label;
    if (tag != "PARTUUID" && tag != "PARTLABEL") return false;
    VolumeNode node;
    return node_of_path(root + "/dev/disk/by-" + (tag == "PARTUUID" ? "partuuid/" : "partlabel/") + value,
                        node) &&
           node == volume.node;
  }
  VolumeNode node;
  return name == volume.path || (name.starts_with("/") && node_of_path(name, node) && node == volume.node);
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
    if (line.starts_with("#") || field.empty() || !means(field, volume, root)) continue;
    found.push_back({volume.path, table + " names it: " + line});
  }
}

void disk_links(const Named& volume, const std::string& root, std::vector<PreflightFinding>& found) {
  for (const auto& kind : names_in(root + "/dev/disk")) {
    const std::string directory = root + "/dev/disk/" + kind;
    for (const auto& link : names_in(directory)) {
      VolumeNode node;
      if (!node_of_path(directory + "/" + link, node) || !(node == volume.node)) continue;
      found.push_back({volume.path, "the link /dev/disk/" + kind + "/" + link + " leads to it"});
    }
  }
}

void doubled_names(const Named& volume, std::vector<PreflightFinding>& found) {
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
}

void holders(const Named& volume, std::vector<PreflightFinding>& found) {
  if (volume.content.type == "LVM2_member") {
    found.push_back(
        {volume.path, "it is an LVM physical volume: hide the old disk from LVM before the clone is seen"});
  }
  if (!volume.node.block) return;
  for (const auto& holder : use_of(volume.node, false).holders) {
    const std::string name = holder.substr(0, holder.find(' '));
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
  std::vector<Named> volumes{{path, node, content_of(path)}};
  if (node.block) {
    for (const dev_t partition : partitions_of(node.device)) {
      const std::string name = device_path(partition);
      volumes.push_back({name, {true, partition, 0}, content_of(name)});
    }
  }
  std::vector<PreflightFinding> found;
  for (const auto& volume : volumes) {
    table_lines("/etc/fstab", 0, volume, root, found);
    table_lines("/etc/crypttab", 1, volume, root, found);
    disk_links(volume, root, found);
    holders(volume, found);
    doubled_names(volume, found);
  }
  return found;
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
#include "daemon/volume_content.h"

#include <memory>

#include <blkid.h>

namespace blockferry {

namespace {

std::string value_of(blkid_probe probe, const char* name) {
  const char* value = nullptr;
  return ::blkid_probe_lookup_value(probe, name, &value, nullptr) == 0 && value != nullptr ? value : "";
}

}  // namespace

VolumeContent content_of(const std::string& path) {
  VolumeContent content;
  const std::unique_ptr<blkid_struct_probe, decltype(&::blkid_free_probe)> probe(
      ::blkid_new_probe_from_filename(path.c_str()), &::blkid_free_probe);
  if (!probe) return content;
  ::blkid_probe_enable_superblocks(probe.get(), 1);
  ::blkid_probe_set_superblocks_flags(probe.get(),
                                      BLKID_SUBLKS_TYPE | BLKID_SUBLKS_UUID | BLKID_SUBLKS_LABEL);
  ::blkid_probe_enable_partitions(probe.get(), 1);
  // 0: found; 1: nothing; -2: several signatures contradict each other, which is content all the same.
  const int outcome = ::blkid_do_safeprobe(probe.get());
  content.table_uuid = value_of(probe.get(), "PTUUID");
  content.partition_table = !value_of(probe.get(), "PTTYPE").empty();
  content.type = value_of(probe.get(), "TYPE");
  if (content.type.empty()) content.type = value_of(probe.get(), "PTTYPE");
  if (content.type.empty() && outcome == -2) content.type = "several signatures";
  content.uuid = value_of(probe.get(), "UUID");
  content.label = value_of(probe.get(), "LABEL");
  return content;
}

}  // namespace blockferry

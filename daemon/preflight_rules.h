// SPDX-License-Identifier: Apache-2.0
// The rules of preflight.h, shared by the files that hold them: preflight.cc (devices and files) and
// preflight_nbd.cc (volumes behind NBD servers), preflight_qemu.cc (disks of guests).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "blockio/nbd_connection.h"
#include "daemon/preflight.h"
#include "daemon/qemu_node.h"
#include "daemon/storage_stack.h"
#include "daemon/volume_content.h"

namespace blockferry {

/// A volume under examination: the report's part and what only preflight needs.
struct Examined {
  PreflightVolume volume;
  VolumeNode node;
  VolumeUse use;
  VolumeContent content;
  std::uint32_t table_sector_bytes = 0;  ///< what its partition table counts in; 0: it has none
  NbdExport nbd;                         ///< of kind "nbd"
  // Of kind "qemu":
  std::shared_ptr<QmpClient> client;
  QemuNode guest_node;

  bool local() const { return volume.kind != "nbd" && volume.kind != "qemu"; }
};

class Preflight {
 public:
  Preflight(const RunRequest& request, const std::vector<VolumeInUse>& in_use)
      : request_(request), in_use_(in_use) {}

  PreflightReport run();

 private:
  bool inconsistent_by_choice() const { return request_.tracker == TrackerChoice::none && request_.force; }
  void refuse(const std::string& device, const std::string& message) {
    report_.refusals.push_back({device, message});
  }
  void warn(const std::string& device, const std::string& message) {
    report_.warnings.push_back({device, message});
  }

  bool wants_live(const Examined& source) const;
  void check_options();
  void check_idle_options();
  bool examine(const std::string& path, Examined& examined, bool as_target);
  void check_source(const Examined& source);
  void check_live_source(const Examined& source);
  void check_source_readable(const Examined& source);
  void check_target(const Examined& target, const Examined& source);
  void check_local_target(const Examined& target, const Examined& source);
  void check_size(const Examined& target, const Examined& source);
  bool check_writable(const Examined& target);
  void check_room(const Examined& target, const Examined& source);
  void check_twice(const Examined& target, const std::vector<Examined>& earlier);
  void check_new_file(const Examined& target, const Examined& source);
  void check_file_size(const Examined& target, const Examined& source);
  void check_content(const Examined& target);
  void check_sectors(const Examined& target, const Examined& source);
  bool check_other_runs(const Examined& examined, bool as_target);

  // preflight_nbd.cc
  bool examine_nbd(const std::string& uri, Examined& examined, bool as_target);
  void check_nbd_source(const Examined& source);
  void check_nbd_target(const Examined& target);
  void check_granule(const PreflightVolume& volume);

  // preflight_qemu.cc
  bool examine_qemu(const std::string& text, Examined& examined, bool as_target);
  void check_qemu_source(const Examined& source);
  void check_bitmap_of_guest(const Examined& source);
  void check_target_of_guest(const Examined& target);

  const RunRequest& request_;
  const std::vector<VolumeInUse>& in_use_;
  PreflightReport report_;
};

}  // namespace blockferry

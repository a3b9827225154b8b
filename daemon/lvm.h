// SPDX-License-Identifier: Apache-2.0
// LVM's own account of where its volumes lie, by LVM's own commands. Two volumes of a group can exchange
// their extents there: `vgcfgbackup`, the segments of the two exchanged in the text, `vgcfgrestore`.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <sys/types.h>

#include "blockio/base/clock.h"
#include "blockio/base/error.h"
#include "blockio/base/file_descriptor.h"
#include "daemon/device_mapper.h"

namespace blockferry {

struct LvmVolume {
  std::string group, name;
};

/// Nothing: it is not LVM's, or a part of another volume.
std::optional<LvmVolume> lvm_volume_of(dev_t device);
/// Names its group, also among groups of the same name.
std::string lvm_group_id(dev_t device);

/// Where the metadata has it, as a table.
Result<MapTable> lvm_table(const LvmVolume& volume);
/// Its map becomes what the metadata says.
Result<void> lvm_refresh(const LvmVolume& volume);

/// A group's metadata as vgcfgbackup writes it, with the segments of two volumes exchanged.
Result<std::string> exchange_segments(std::string_view metadata, const std::string& one,
                                      const std::string& other);

/// Holds the group's lock, so that nothing else changes its metadata between the two commands.
class LvmExchange {
 public:
  /// `key`: of the run; what an earlier process left under it is removed.
  LvmExchange(std::string group, std::string one, std::string other, const std::string& key);
  ~LvmExchange();
  LvmExchange(const LvmExchange&) = delete;
  LvmExchange& operator=(const LvmExchange&) = delete;

  /// Waits a while for other LVM commands to end.
  Result<void> lock();
  /// Precondition: locked. The commands can be run from then on, and it is known that LVM takes the change.
  Result<void> prepare();
  /// Of one of the commands, as measured by prepare().
  Nanoseconds expected_time() const { return expected_time_; }
  /// Whoever has a duplicate of it keeps the lock.
  int lock_descriptor() const { return lock_.get(); }
  /// At once.
  Result<void> change() const;
  std::string change_command() const { return restore_command("new"); }
  std::string undo_command() const { return restore_command("old"); }

 private:
  Result<void> find_disks();
  std::vector<std::string> restore_words(const char* file) const;
  std::string restore_command(const char* file) const;

  const std::string group_, one_, other_, directory_;
  std::string disks_;  ///< of the group, with commas between them
  Nanoseconds expected_time_{0};
  FileDescriptor lock_;
};

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
#include "daemon/quiesced_map.h"

#include <cerrno>
#include <set>
#include <vector>

#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "blockio/block_identity.h"
#include "daemon/lvm.h"
#include "daemon/mounts.h"
#include "daemon/quiesced_filesystems.h"

namespace blockferry {

namespace {

constexpr const char* control_node = "/dev/mapper/control";
constexpr Nanoseconds look_again = std::chrono::milliseconds(5);

std::string number_text(dev_t device) {
  return std::to_string(major(device)) + ":" + std::to_string(minor(device));
}

/// Whatever is mounted from the map, or from what lies on it.
std::vector<Mount> mounts_above(const VolumeNode& volume) {
  return mounts_of(devices_above(volume.device));
}

int ask_kernel(int control, unsigned long request, dev_t map) {
  dm_ioctl command{};
  command.version[0] = DM_VERSION_MAJOR;
  command.data_size = command.data_start = sizeof command;
  command.dev = map;
  return ::ioctl(control, request, &command);
}

void resume_as_it_was(int control, dev_t map) {
  ask_kernel(control, DM_TABLE_CLEAR, map);
  ask_kernel(control, DM_DEV_SUSPEND, map);
}

bool suspended(dev_t map) {
  return read_line("/sys/dev/block/" + number_text(map) + "/dm/suspended") == "1";
}

std::string text_of(const MapTable& table) {
  std::string text;
  for (const auto& line : table) {
    text += (text.empty() ? "" : "\n") + std::to_string(line.start) + " " + std::to_string(line.sectors) +
            " " + line.type + " " + line.parameters;
  }
  return text;
}

class QuiescedMap : public QuiescedVolume {
 public:
  explicit QuiescedMap(std::string path) : path_(std::move(path)) {}

  Result<void> open(const SwapPlan& plan, bool back, const std::string& key);
  std::vector<GuardHold> holds() const override;
  Result<void> sync_ahead() override;
  /// Suspending has flushed it.
  Result<void> settle() override { return {}; }
  void release_without_guard() override;
  Nanoseconds expected_command_time() const override {
    return metadata_ == nullptr ? Nanoseconds(0) : metadata_->expected_time();
  }

 private:
  void open_filesystems(const VolumeNode& volume);

  const std::string path_;
  dev_t map_ = 0;
  std::string table_;
  FileDescriptor control_;
  std::vector<std::pair<std::string, FileDescriptor>> filesystems_;  ///< by their mount points
  std::unique_ptr<LvmExchange> metadata_;
};

Result<void> QuiescedMap::open(const SwapPlan& plan, bool back, const std::string& key) {
  VolumeNode volume;
  if (!node_of_path(path_, volume)) return fail(error_from_errno(errno, "look at", path_));
  if (const std::string why = suspending_refused(volume); !why.empty())
    return fail(make_error(ErrorCode::refused, "cut over", path_, why));
  map_ = volume.device;
  const auto table = volume_table(plan, back ? plan.old_place : plan.new_place);
  if (!table) return fail(table.error());
  table_ = text_of(*table);
  control_ = FileDescriptor(::open(control_node, O_RDWR | O_CLOEXEC));
  if (!control_.valid()) return fail(error_from_errno(errno, "open", control_node));
  open_filesystems(volume);
  if (!plan.lvm()) return {};
  metadata_ = std::make_unique<LvmExchange>(plan.group, plan.volume, plan.target_volume, key);
  auto done = metadata_->lock();
  return done ? metadata_->prepare() : done;
}

/// Only to sync them ahead: suspending freezes them itself.
void QuiescedMap::open_filesystems(const VolumeNode& volume) {
  std::set<dev_t> superblocks;
  for (const auto& mount : mounts_above(volume)) {
    if (superblocks.contains(mount.superblock)) continue;
    FileDescriptor fd(::open(mount.reach.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!fd.valid()) continue;
    superblocks.insert(mount.superblock);
    filesystems_.emplace_back(mount.point, std::move(fd));
  }
}

std::vector<GuardHold> QuiescedMap::holds() const {
  GuardHold map;
  map.kind = "map";
  map.descriptors = {control_.get()};
  map.words = {std::to_string(map_), table_};
  map.key = "map " + number_text(map_);
  map.take_verb = "suspend";
  map.hand_over_verb = "load the new table of";
  map.where = path_;
  std::vector<GuardHold> holds{std::move(map)};
  if (metadata_ == nullptr) return holds;
  GuardHold record;
  record.kind = "record";
  record.descriptors = {metadata_->lock_descriptor()};
  record.words = {metadata_->change_command(), metadata_->undo_command()};
  record.key = "record " + path_;
  record.hand_over_verb = "change LVM's metadata of";
  record.where = path_;
  holds.push_back(std::move(record));
  return holds;
}

Result<void> QuiescedMap::sync_ahead() {
  for (const auto& [point, fd] : filesystems_) {
    if (::syncfs(fd.get()) != 0) return fail(error_from_errno(errno, "sync", point));
  }
  filesystems_.clear();  // a descriptor would keep them from being unmounted
  return {};
}

void QuiescedMap::release_without_guard() {
  if (suspended(map_)) resume_as_it_was(control_.get(), map_);
}

}  // namespace

std::string suspending_refused(const VolumeNode& volume) {
  const VolumeUse use = settled_use_of(volume);
  if (!use.holders.empty() && use.holders.front() == "swap") return "it is in use as swap: swapoff it";
  const auto mounts = mounts_above(volume);
  if (const std::string swap = swap_file_on(mounts); !swap.empty())
    return "memory is swapped to " + swap + " on it, which would have to wait: swapoff it";
  for (const auto& mount : mounts) {
    if (auto why = unseen_writes_of(mount); !why.empty()) return why;
  }
  return "";
}

Result<std::unique_ptr<QuiescedVolume>> open_quiesced_map(const std::string& path, const SwapPlan& plan,
                                                          bool back, const std::string& key) {
  auto volume = std::make_unique<QuiescedMap>(path);
  if (auto done = volume->open(plan, back, key); !done) return fail(done.error());
  return volume;
}

bool is_left_suspended(dev_t map, const std::function<bool()>& guarded, Nanoseconds limit) {
  const Nanoseconds give_up = system_clock().now() + limit;
  while (suspended(map) && guarded() && system_clock().now() < give_up) system_clock().sleep_for(look_again);
  return suspended(map);
}

Result<void> resume_left_suspended(dev_t map) {
  const FileDescriptor control(::open(control_node, O_RDWR | O_CLOEXEC));
  if (!control.valid()) return fail(error_from_errno(errno, "open", control_node));
  resume_as_it_was(control.get(), map);
  return {};
}

}  // namespace blockferry

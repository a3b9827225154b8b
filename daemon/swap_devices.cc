// SPDX-License-Identifier: Apache-2.0
#include "daemon/swap_devices.h"

#include <cerrno>

#include <fcntl.h>

#include "blockio/block_identity.h"
#include "daemon/lvm.h"
#include "daemon/quiesced_map.h"
#include "daemon/storage_stack.h"

namespace blockferry {

namespace {

constexpr Nanoseconds guard_patience = std::chrono::seconds(5);  // beyond the limit of what it holds

Result<dev_t> map_of(const std::string& path) {
  VolumeNode node;
  if (!node_of_path(path, node) || !node.block) return fail(error_from_errno(ENODEV, "look at", path));
  return node.device;
}

Error elsewhere(const RunRecord& record) {
  const RunStatus& status = record.status;
  std::string why = "its table was changed by somebody else: it does not lie where the run has it";
  if (status.swapped) {
    why = "it does not lie on " + status.targets.front().uri +
          " any more, though that alone holds what was written last: stop what uses it, and make it there";
  }
  return make_error(ErrorCode::conflict, "take up", status.source_uri, why);
}

/// The metadata says where the volume lies.
Result<void> settle_metadata(const RunRecord& record, dev_t map) {
  const SwapPlan& plan = *record.swap;
  const LvmVolume volume{plan.group, plan.volume};
  const auto live = live_table(map);
  if (!live) return fail(live.error());
  LvmExchange exchange(plan.group, plan.volume, plan.target_volume, record.status.id);
  // A guard that outlived its ferryd has it as long as it has something to undo; and what it ran, if that was
  // killed, too.
  if (auto done = exchange.lock(); !done) return done;
  auto recorded = lvm_table(volume);
  if (recorded && *recorded != *live) {
    if (auto done = exchange.prepare(); !done) return done;
    if (auto done = exchange.change(); !done) return done;
    recorded = lvm_table(volume);
  }
  if (!recorded) return fail(recorded.error());
  if (*recorded == *live) return {};
  return fail(make_error(ErrorCode::conflict, "settle", record.status.source_uri,
                         "LVM's metadata has it elsewhere than it lies (lvs -o +devices, dmsetup table)"));
}

/// And the other volume's map is what the metadata says of that.
Result<void> settle_lvm(const RunRecord& record, dev_t map) {
  if (auto done = settle_metadata(record, map); !done) return done;
  const LvmVolume other{record.swap->group, record.swap->target_volume};
  const auto target = map_of(record.status.targets.front().uri);
  if (!target) return fail(target.error());
  const auto target_live = live_table(*target), target_recorded = lvm_table(other);
  if (target_live && target_recorded && *target_live == *target_recorded) return {};
  return lvm_refresh(other);
}

}  // namespace

SwapDevices::SwapDevices(const TrackerPins& pins, const RunRecord& record)
    : old_name_(pins.map_name(record.status.id, "old")), new_name_(pins.map_name(record.status.id, "new")) {}

SwapDevices::~SwapDevices() {
  remove_private_map(old_name_);
  remove_private_map(new_name_);
}

Result<void> SwapDevices::open(const RunRecord& record) {
  const SwapPlan& plan = *record.swap;
  const auto old_table = linear_table(plan.old_place), new_table = linear_table(plan.new_place);
  if (!old_table) return fail(old_table.error());
  if (!new_table) return fail(new_table.error());
  if (plan.lvm() && !target_volume_.valid()) {
    const std::string& path = record.status.targets.front().uri;
    target_volume_ = FileDescriptor(::open(path.c_str(), O_RDONLY | O_EXCL | O_CLOEXEC | O_NONBLOCK));
    if (!target_volume_.valid()) return fail(error_from_errno(errno, "open", path));
  }
  const auto old_map = make_private_map(old_name_, *old_table);
  if (!old_map) return fail(old_map.error());
  const auto new_map = make_private_map(new_name_, *new_table);
  if (!new_map) return fail(new_map.error());
  source_ = device_node(record.status.swapped ? *new_map : *old_map);
  target_ = device_node(record.status.swapped ? *old_map : *new_map);
  return {};
}

Result<void> settle_swap(const RunRecord& record) {
  if (record.bitmap_generation == 0) return {};  // preflight has just looked
  const SwapPlan& plan = *record.swap;
  const auto map = map_of(record.status.source_uri);
  if (!map) return fail(map.error());
  const auto here = lies_on(*map, plan, record.status.swapped ? plan.new_place : plan.old_place);
  if (!here) return fail(here.error());
  if (!*here) return fail(elsewhere(record));
  return plan.lvm() ? settle_lvm(record, *map) : Result<void>();
}

/// As the guard does it: nobody writes to the old disk while the metadata says that the volume lies on the
/// new one, lest a power failure came then. But what stands against that does not keep the volume suspended.
Result<void> take_over_suspended(const RunRecord& record, dev_t map) {
  if (record.swap->lvm()) static_cast<void>(settle_metadata(record, map));
  return resume_left_suspended(map);
}

std::optional<bool> swap_came_to_pass(const TrackerPins& pins, const RunRecord& record) {
  const SwapPlan& plan = *record.swap;
  const auto map = map_of(record.status.source_uri);
  if (!map) return std::nullopt;
  const Nanoseconds limit = std::chrono::milliseconds(record.status.request.max_freeze_ms);
  if (is_left_suspended(
          *map, [&] { return pins.is_guarded(record); }, limit + guard_patience)) {
    if (auto done = take_over_suspended(record, *map); !done) return std::nullopt;
  }
  const auto on_old = lies_on(*map, plan, plan.old_place), on_new = lies_on(*map, plan, plan.new_place);
  if (!on_old || !on_new || *on_old == *on_new) return std::nullopt;
  return record.status.swapped ? *on_old : *on_new;
}

}  // namespace blockferry

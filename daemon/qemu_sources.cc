// SPDX-License-Identifier: Apache-2.0
#include "daemon/qemu_sources.h"

#include "blockio/nbd_device.h"
#include "daemon/qemu_bitmap_reader.h"
#include "daemon/qemu_tracker.h"
#include "daemon/quiesced_guest.h"

namespace blockferry {

namespace {

constexpr Nanoseconds retry_pause = std::chrono::milliseconds(100);
// It is on this machine: a server that is gone is gone, and its guest with it.
constexpr Nanoseconds reconnect_for = std::chrono::seconds(2);

/// The disk's export by the name that people know. It goes with this.
class GuestDisk : public Device {
 public:
  GuestDisk(std::shared_ptr<QemuDisk> disk, std::unique_ptr<Device> nbd, const std::string& uri,
            std::string identity)
      : disk_(std::move(disk)), nbd_(std::move(nbd)), info_(nbd_->info()) {
    info_.uri = uri;
    info_.identity = std::move(identity);
  }
  ~GuestDisk() override {
    nbd_.reset();
    static_cast<void>(disk_->remove_exports());
  }

  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override { nbd_->submit(request); }
  Result<DeviceRegion> region_at(std::uint64_t offset) override { return nbd_->region_at(offset); }
  void forget_regions() override { nbd_->forget_regions(); }
  std::optional<std::string> change_stamp() override { return nbd_->change_stamp(); }
  std::uint64_t doubts() override { return nbd_->doubts(); }

 private:
  const std::shared_ptr<QemuDisk> disk_;
  std::unique_ptr<Device> nbd_;
  DeviceInfo info_;
};

}  // namespace

Result<std::shared_ptr<QemuDisk>> QemuSources::disk(const RunRecord& record) {
  const std::lock_guard lock(mutex_);
  auto& kept = disks_[record.status.id];
  if (auto disk = kept.lock()) return disk;
  auto uri = parse_qemu_uri(record.status.source_uri);
  if (!uri) return fail(uri.error());
  auto client = shared_qmp_client(uri->socket);
  auto disk = std::make_shared<QemuDisk>(std::move(client), std::move(*uri), record.status.id,
                                         record.volume_id, directory_);
  kept = disk;
  return disk;
}

Result<std::unique_ptr<Device>> QemuSources::open(FileQueue& queue, const RunRecord& record,
                                                  Nanoseconds patience) {
  const auto disk = this->disk(record);
  if (!disk) return fail(disk.error());
  const Nanoseconds deadline = system_clock().now() + patience;
  auto node = (*disk)->look();
  while (!node && node.error().code == ErrorCode::busy && system_clock().now() < deadline) {
    system_clock().sleep_for(retry_pause);
    node = (*disk)->look();
  }
  if (!node) return fail(node.error());
  const auto unsafe = qemu_export_unsafe((*disk)->client(), *node);
  if (!unsafe) return fail(unsafe.error());
  if (!unsafe->empty())
    return fail(make_error(ErrorCode::refused, "read", record.status.source_uri, *unsafe));
  auto identity = qemu_identity((*disk)->client(), (*disk)->uri());
  if (!identity) return fail(identity.error());
  const auto uri = (*disk)->export_source(node->name);
  if (!uri) return fail(uri.error());
  NbdAddress address;
  address.uri = *uri;
  NbdDeviceOptions options;
  options.reconnect_for = reconnect_for;
  // When QEMU stops a guest, or begins a pass, it waits until its disks' replies are read.
  options.always_threads = true;
  auto nbd = open_nbd_device(queue, address, options);
  if (nbd)
    return std::make_unique<GuestDisk>(*disk, std::move(*nbd), record.status.source_uri,
                                       std::move(*identity));
  static_cast<void>((*disk)->remove_exports());
  return nbd;
}

Result<std::unique_ptr<QuiescedVolume>> QemuSources::quiesced(const RunRecord& record) {
  auto disk = this->disk(record);
  if (!disk) return fail(disk.error());
  const RunRequest& request = record.status.request;
  GuestOptions options;
  options.by_command = !request.quiesce_cmd.empty();
  if (record.status.moves_guest()) options.target = record.status.targets.front().uri;
  options.stays = request.kind == RunKind::migrate && !record.status.moves_guest();
  return open_quiesced_guest(std::move(*disk), options);
}

namespace {

/// Whether QEMU can open it, before hours of copying.
Result<void> try_target(QemuDisk& disk, const std::string& target) {
  const auto node = disk.look();
  if (!node) return fail(node.error());
  Result<void> done = disk.remove_target();  // of an earlier process
  if (done) done = disk.add_target(target, *node);
  return done ? disk.remove_target() : done;
}

}  // namespace

Result<std::unique_ptr<LiveTracker>> QemuSources::attach(const RunRecord& record) {
  auto disk = this->disk(record);
  if (!disk) return fail(disk.error());
  if (record.status.moves_guest()) {
    if (auto done = try_target(**disk, record.status.targets.front().uri); !done) return fail(done.error());
  }
  auto tracker = QemuTracker::attach(std::move(*disk), record.status.granule_bytes, read_qemu_bitmap,
                                     record.tracker_position);
  if (!tracker) return fail(tracker.error());
  return std::move(*tracker);
}

Result<std::unique_ptr<LiveTracker>> QemuSources::adopt(const RunRecord& record) {
  auto disk = this->disk(record);
  if (!disk) return fail(disk.error());
  if (!record.tracker_position) {
    return fail(make_error(ErrorCode::state_damaged, "take up bitmaps of", record.status.source_uri,
                           "an earlier version of ferryd has not written down where they begin"));
  }
  auto tracker = QemuTracker::adopt(std::move(*disk), record.status.granule_bytes, read_qemu_bitmap,
                                    *record.tracker_position);
  if (!tracker) return fail(tracker.error());
  return std::move(*tracker);
}

/// Where QEMU is gone, all of it is.
void QemuSources::remove(const RunRecord& record) {
  if (auto disk = this->disk(record)) static_cast<void>((*disk)->remove_all());
  const std::lock_guard lock(mutex_);
  disks_.erase(record.status.id);
}

void QemuSources::forget(const RunRecord& record) {
  if (auto disk = this->disk(record)) static_cast<void>((*disk)->remove_bitmaps());
  remove(record);
}

std::optional<bool> QemuSources::handed_over(const RunRecord& record) {
  auto disk = this->disk(record);
  if (!disk) return std::nullopt;
  const auto moved = (*disk)->target_in_use();
  return moved ? std::optional<bool>(*moved) : std::nullopt;
}

}  // namespace blockferry

// SPDX-License-Identifier: Apache-2.0
#include "daemon/real_environment.h"

#include <future>

#include "blockio/file_device.h"
#include "blockio/nbd_device.h"
#include "daemon/guarded_quiescer.h"
#include "daemon/nbd_address.h"
#include "daemon/quiesced_filesystems.h"
#include "daemon/quiesced_map.h"
#include "daemon/run_core.h"
#include "daemon/swap_devices.h"

namespace blockferry {

namespace {

class ThreadTask : public BackgroundTask {
 public:
  explicit ThreadTask(std::function<Result<void>()> job)
      : outcome_(std::async(std::launch::async, std::move(job))) {}
  bool wait(Nanoseconds timeout) override { return outcome_.wait_for(timeout) == std::future_status::ready; }
  Result<void> take() override { return outcome_.get(); }

 private:
  std::future<Result<void>> outcome_;
};

class RealEnvironment : public RunEnvironment {
 public:
  RealEnvironment(StateDirectory& state, BufferPool& buffers, LiveSources sources, IoEngine engine,
                  bool after_restart, std::shared_ptr<CutoverGroup> group)
      : state_(state),
        buffers_(buffers),
        sources_(sources),
        engine_(engine),
        after_restart_(after_restart),
        group_(std::move(group)) {}
  ~RealEnvironment() override {
    if (group_ != nullptr) group_->leave(run_id_);
  }

  Clock& clock() override { return system_clock(); }
  StateDirectory& state() override { return state_; }
  BufferPool& buffers() override { return buffers_; }
  Result<RunDevices> open_devices(const RunRecord& record) override;
  void devices_closed() override { swap_.reset(); }
  Result<std::unique_ptr<LiveTracker>> adopt_tracker(const RunRecord& record) override {
    return trackers_of(record).adopt(record);
  }
  Result<std::unique_ptr<LiveTracker>> attach_tracker(const RunRecord& record) override {
    return trackers_of(record).attach(record);
  }
  void remove_tracker(const RunRecord& record) override {
    trackers_of(record).remove(record);
    sources_.pins.remove(record);  // a guest's mark of a hand-over is there, too
  }
  std::optional<bool> handed_over(const RunRecord& record) override {
    if (record.swap) return swap_came_to_pass(sources_.pins, record);
    // QEMU knows better than any mark which disk its guest has.
    return record.status.moves_guest() ? sources_.qemu.handed_over(record)
                                       : sources_.pins.handed_over(record);
  }
  Result<void> settle_swap(const RunRecord& record) override {
    // What an earlier process left of its maps goes with this, also where none is opened any more.
    if (swap_ == nullptr) swap_ = std::make_unique<SwapDevices>(sources_.pins, record);
    return blockferry::settle_swap(record);
  }
  Result<std::unique_ptr<Quiescer>> make_quiescer(const RunRecord& record, bool rehearsal) override;
  std::string cutover_waits_for(const RunRecord& record, bool ready) override;
  std::unique_ptr<BackgroundTask> start(std::function<Result<void>()> job) override {
    return std::make_unique<ThreadTask>(std::move(job));
  }

 private:
  Trackers& trackers_of(const RunRecord& record) {
    if (record.status.tracker == "qemu") return sources_.qemu;
    return sources_.pins;
  }
  Result<std::unique_ptr<Device>> open_source(FileQueue& queue, const RunRecord& record) const;
  Result<std::unique_ptr<Device>> open_target(FileQueue& queue, const RunRecord& record,
                                              const std::string& uri) const;
  Result<std::unique_ptr<Device>> open_nbd(FileQueue& queue, const RunRecord& record, const std::string& uri,
                                           DeviceRole role) const;

  StateDirectory& state_;
  BufferPool& buffers_;
  const LiveSources sources_;
  const IoEngine engine_;
  const bool after_restart_;
  const std::shared_ptr<CutoverGroup> group_;  ///< may be null
  std::string run_id_;                         ///< as told to the group
  std::unique_ptr<SwapDevices> swap_;          ///< of a run that swaps its volume
};

Nanoseconds busy_wait(bool after_restart) {
  return after_restart ? std::chrono::seconds(30) : std::chrono::seconds(2);
}

Result<std::unique_ptr<Device>> RealEnvironment::open_nbd(FileQueue& queue, const RunRecord& record,
                                                          const std::string& uri, DeviceRole role) const {
  NbdDeviceOptions options;
  options.role = role;
  options.patience = busy_wait(after_restart_);
  options.taken_up_again = record.status.restarts > 0;
  options.unsafe = record.status.request.force;
  return open_nbd_device(queue, nbd_address(record.status.request, uri), options);
}

Result<std::unique_ptr<Device>> RealEnvironment::open_source(FileQueue& queue,
                                                             const RunRecord& record) const {
  const std::string& uri = record.status.source_uri;
  if (is_nbd_uri(uri)) return open_nbd(queue, record, uri, DeviceRole::source);
  if (is_qemu_uri(uri)) return sources_.qemu.open(queue, record, busy_wait(after_restart_));
  FileDeviceOptions options;
  options.role = DeviceRole::source;
  options.shared = record.status.live() || (record.status.tracker == "none" && record.status.request.force);
  options.busy_wait = busy_wait(after_restart_);
  if (swap_ != nullptr) options.stands_for = uri;
  return open_file_device(queue, swap_ != nullptr ? swap_->source() : uri, options);
}

Result<std::unique_ptr<Device>> RealEnvironment::open_target(FileQueue& queue, const RunRecord& record,
                                                             const std::string& uri) const {
  if (is_nbd_uri(uri)) return open_nbd(queue, record, uri, DeviceRole::target);
  const bool first_start = record.bitmap_generation == 0;
  FileDeviceOptions options;
  options.role = DeviceRole::target;
  options.file_bytes = record.status.bytes_total;
  options.create = first_start;
  options.resize = first_start && record.status.request.overwrite;
  options.busy_wait = busy_wait(after_restart_);
  if (swap_ != nullptr) options.stands_for = uri;
  return open_file_device(queue, swap_ != nullptr ? swap_->target() : uri, options);
}

Result<RunDevices> RealEnvironment::open_devices(const RunRecord& record) {
  const RunRequest& request = record.status.request;
  auto engine = request.io_engine == "auto" ? Result<IoEngine>(engine_) : parse_io_engine(request.io_engine);
  if (!engine) return fail(engine.error());
  const auto engine_options =
      engine_options_for(request, record.status.granule_bytes, record.status.bytes_total);
  // A job may have a request for each of its runs of zeroes and data, and for each target.
  auto queue = make_file_queue(*engine, (engine_options.depth + engine_options.small_depth) *
                                            unsigned(2 + record.status.targets.size()));
  if (!queue) return fail(queue.error());
  RunDevices devices;
  devices.io_engine = (*queue)->name();
  if (record.swap) {
    if (swap_ == nullptr) swap_ = std::make_unique<SwapDevices>(sources_.pins, record);
    if (auto done = swap_->open(record); !done) return fail(done.error());
  }
  if (!record.verify_only) {
    auto source = open_source(**queue, record);
    if (!source) return fail(source.error());
    devices.source = std::move(*source);
  }
  std::size_t opened = 0;
  for (const auto& target : record.status.targets) {
    auto device = open_target(**queue, record, target.uri);
    devices.targets.push_back(device ? std::move(*device) : nullptr);
    devices.target_errors.push_back(device ? std::nullopt : std::optional<Error>(device.error()));
    opened += device ? 1 : 0;
  }
  if (opened == 0) return fail(*devices.target_errors.front());
  devices.queue = std::move(*queue);
  return devices;
}

Result<std::unique_ptr<QuiescedVolume>> open_quiesced(QemuSources& qemu, const RunRecord& record) {
  const RunStatus& status = record.status;
  if (status.tracker == "qemu") return qemu.quiesced(record);
  if (record.swap) return open_quiesced_map(status.source_uri, *record.swap, status.swapped, status.id);
  return open_quiesced_filesystems(status.source_uri, freeze_options_for(status.request));
}

/// One quiescer for all these volumes. Its commands are told of each, in order.
Result<std::unique_ptr<Quiescer>> make_quiescer_for(LiveSources live, const std::vector<RunRecord>& members) {
  const RunRequest& request = members.front().status.request;
  QuiescerOptions options;
  options.quiesce_cmd = request.quiesce_cmd;
  options.resume_cmd = request.resume_cmd;
  options.cutover_cmd = request.cutover_cmd;
  options.writers_go_on = members.front().status.moves_guest();
  std::vector<std::unique_ptr<QuiescedVolume>> volumes;
  std::string runs, sources, targets;
  for (const auto& member : members) {
    const RunStatus& status = member.status;
    auto volume = open_quiesced(live.qemu, member);
    if (!volume) return fail(volume.error());
    volumes.push_back(std::move(*volume));
    const std::string space = runs.empty() ? "" : " ";
    options.sources += (space.empty() ? "" : ", ") + status.source_uri;
    for (const auto& target : status.targets) options.targets.push_back(target.uri);
    runs += space + status.id;
    sources += space + status.source_uri;
    targets += space + status.targets.front().uri;
  }
  options.environment = {"BLOCKFERRY_RUN=" + runs, "BLOCKFERRY_SOURCE=" + sources,
                         "BLOCKFERRY_TARGET=" + targets};
  if (request.kind == RunKind::migrate || !options.cutover_cmd.empty()) {
    auto directory = live.pins.make_mark_directory(members.front());
    if (!directory) return fail(directory.error());
    options.mark_directory = std::move(*directory);
  }
  return make_guarded_quiescer(std::move(options), std::move(volumes));
}

Result<std::unique_ptr<Quiescer>> RealEnvironment::make_quiescer(const RunRecord& record, bool rehearsal) {
  if (group_ != nullptr) return group_->join(record.status.id, rehearsal);
  return make_quiescer_for(sources_, {record});
}

std::string RealEnvironment::cutover_waits_for(const RunRecord& record, bool ready) {
  if (group_ == nullptr) return "";
  run_id_ = record.status.id;
  return group_->waits_for(run_id_, ready);
}

}  // namespace

std::unique_ptr<RunEnvironment> make_real_environment(StateDirectory& state, BufferPool& buffers,
                                                      LiveSources sources, IoEngine engine,
                                                      bool after_restart,
                                                      std::shared_ptr<CutoverGroup> group) {
  return std::make_unique<RealEnvironment>(state, buffers, sources, engine, after_restart, std::move(group));
}

std::shared_ptr<CutoverGroup> make_cutover_group(LiveSources sources, const std::vector<RunRecord>& members) {
  std::vector<std::string> names;
  names.reserve(members.size());
  for (const auto& member : members) names.push_back(member.status.id);
  return std::make_shared<CutoverGroup>(std::move(names), system_clock(),
                                        [sources, members] { return make_quiescer_for(sources, members); });
}

}  // namespace blockferry

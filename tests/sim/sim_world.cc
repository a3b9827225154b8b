// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_world.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace blockferry::sim {

namespace {

constexpr std::size_t sector_bytes = 512;

}  // namespace

// Bytes with a volatile cache.

void VolatileBytes::apply(std::vector<std::byte>& bytes, const Change& change) {
  if (change.size) {
    bytes.resize(*change.size);
    return;
  }
  if (bytes.size() < change.offset + change.data.size()) bytes.resize(change.offset + change.data.size());
  std::copy(change.data.begin(), change.data.end(), bytes.begin() + std::ptrdiff_t(change.offset));
}

void VolatileBytes::write(std::size_t offset, std::vector<std::byte> data) {
  unsynced_.push_back({offset, std::move(data), std::nullopt});
  apply(current, unsynced_.back());
}

void VolatileBytes::resize(std::size_t size) {
  unsynced_.push_back({0, {}, size});
  apply(current, unsynced_.back());
}

void VolatileBytes::flush() {
  durable_ = current;
  unsynced_.clear();
}

/// Each write for itself: lost, kept, or only some of its sectors kept.
void VolatileBytes::lose_power(std::mt19937_64& random) {
  for (const Change& change : unsynced_) {
    const auto fate = random() % 3;
    if (fate == 0) continue;
    if (fate == 1 || change.size) {
      apply(durable_, change);
      continue;
    }
    for (std::size_t at = 0; at < change.data.size(); at += sector_bytes) {
      if (random() % 2 == 0) continue;
      const std::size_t end = std::min(at + sector_bytes, change.data.size());
      apply(durable_, {change.offset + at,
                       {change.data.begin() + std::ptrdiff_t(at), change.data.begin() + std::ptrdiff_t(end)},
                       std::nullopt});
    }
  }
  unsynced_.clear();
  current = durable_;
}

void World::step() {
  ++steps;
  if (steps == crash_at) throw Crash{};
  if (on_step) on_step();
}

// Disks.

/// What lies in this range is data from now on.
void SimDisk::fill(std::uint64_t begin, std::uint64_t end) {
  std::vector<DeviceRegion> filled;
  std::uint64_t at = 0;
  const auto up_to = [&](std::uint64_t region_end, bool hole) {
    if (region_end > at) filled.push_back({hole, region_end});
    at = std::max(at, region_end);
  };
  for (const auto& region : regions) {
    if (region.hole && begin < region.end && end > at) {
      up_to(std::max(at, begin), true);
      up_to(std::min(region.end, end), false);
    }
    up_to(region.end, region.hole);
  }
  regions = std::move(filled);
}

void SimDisk::poke(std::size_t offset, std::vector<std::byte> data) {
  fill(offset, offset + data.size());
  bytes.write(offset, std::move(data));
  bytes.flush();
  ++generation;
}

namespace {

class SimDevice : public Device {
 public:
  SimDevice(SimQueue& queue, SimDisk& disk) : queue_(queue), disk_(disk) {
    info_.uri = disk.name;
    info_.identity = "sim:" + disk.name;
    info_.kind = DeviceKind::simulated;
    info_.bytes = disk.bytes.current.size();
    info_.zero_run_bytes_min = 8192;
    info_.io_bytes_best = disk.io_bytes_best;
    info_.in_flight_bytes_best = disk.in_flight_bytes_best;
  }
  const DeviceInfo& info() const override { return info_; }
  void submit(IoRequest& request) override {
    request.device = this;
    queue_.submit(disk_, request);
  }
  Result<DeviceRegion> region_at(std::uint64_t offset) override {
    for (const auto& region : disk_.regions) {
      if (offset < region.end) return region;
    }
    return DeviceRegion{false, info_.bytes};
  }
  std::uint64_t doubts() override { return disk_.doubts; }
  std::optional<std::string> change_stamp() override {
    return "generation " + std::to_string(disk_.generation);
  }

 private:
  SimQueue& queue_;
  SimDisk& disk_;
  DeviceInfo info_;
};

}  // namespace

void SimQueue::submit(SimDisk& disk, IoRequest& request) {
  request.submitted_at_ns = world_.time.count();
  pending_.push_back({&disk, &request});
}

std::int64_t SimQueue::perform(SimDisk& disk, const IoRequest& request) {
  auto& bytes = disk.bytes;
  if (request.operation == IoOperation::flush) {
    if (std::exchange(disk.lost, false)) return ++disk.losses_told, -ESTALE;
    if (disk.writes_fail && ++disk.failures > 0) return -EIO;
    bytes.flush();
    return 0;
  }
  const std::size_t size = bytes.current.size();
  if (request.offset >= size) return 0;
  const auto count = std::size_t(std::min<std::uint64_t>(request.bytes, size - request.offset));
  if (request.operation == IoOperation::read) {
    std::memcpy(request.data, bytes.current.data() + request.offset, count);
    return std::int64_t(count);
  }
  if (disk.writes_fail && ++disk.failures > 0) return -EIO;
  if (request.operation == IoOperation::zero && disk.zero_unsupported) return -EOPNOTSUPP;
  std::vector<std::byte> data(count);
  if (request.operation == IoOperation::write) std::memcpy(data.data(), request.data, count);
  if (disk.flip_at && *disk.flip_at >= request.offset && *disk.flip_at < request.offset + count) {
    data[*disk.flip_at - request.offset] ^= std::byte(16);
    disk.flip_at.reset();
  }
  disk.granules_written += (count + 4095) / 4096;
  bytes.write(std::size_t(request.offset), std::move(data));
  return request.operation == IoOperation::zero ? 0 : std::int64_t(count);
}

/// The server of a target loses what was not flushed; requests in flight stay so, to be repeated.
void SimQueue::break_connection(SimDisk& disk) {
  ++disk.breaks;
  bool wrote = false;
  for (const Pending& pending : pending_) {
    const IoRequest& request = *pending.request;
    const bool writes = request.operation == IoOperation::write || request.operation == IoOperation::zero;
    if (pending.disk != &disk || !writes) continue;
    wrote = true;
    if (!disk.late_writes || world_.chance(0.5)) continue;
    const std::size_t size = disk.bytes.current.size();
    std::vector<std::byte> data(std::min<std::size_t>(request.bytes, size - request.offset));
    if (request.operation == IoOperation::write) std::memcpy(data.data(), request.data, data.size());
    disk.late.push_back({world_.steps + world_.below(60), std::size_t(request.offset), std::move(data)});
  }
  if (wrote) ++disk.doubts;
  if (wrote || disk.bytes.has_unsynced()) disk.lost = true;
  disk.bytes.lose_power(world_.random);
}

void SimQueue::land_late_writes(SimDisk& disk) {
  for (auto& write : disk.late) {
    if (write.step > world_.steps) continue;
    disk.bytes.write(write.offset, std::move(write.data));
    ++disk.landed_late;
  }
  std::erase_if(disk.late, [this](const auto& write) { return write.step <= world_.steps; });
}

/// A few of what is in flight, in any order.
void SimQueue::wait(Nanoseconds timeout, std::vector<IoRequest*>& completed) {
  for (auto& [request, result] : posted_) {
    request->result = result;
    completed.push_back(request);
  }
  posted_.clear();
  if (pending_.empty()) return;
  if (timeout.count() == 0 && world_.chance(0.5)) return;
  const std::uint64_t count = 1 + world_.below(pending_.size());
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::size_t chosen = std::size_t(world_.below(pending_.size()));
    const Pending pending = pending_[chosen];
    world_.step();
    if (pending.disk->break_chance > 0 && world_.chance(pending.disk->break_chance))
      break_connection(*pending.disk);
    land_late_writes(*pending.disk);
    pending_.erase(pending_.begin() + std::ptrdiff_t(chosen));
    world_.time += std::chrono::microseconds(50 + world_.below(400));
    pending.request->result = perform(*pending.disk, *pending.request);
    pending.request->completed_at_ns = world_.time.count();
    completed.push_back(pending.request);
  }
}

void SimQueue::abandon(CrashMode) {
  for (const Pending& pending : pending_) {
    const bool changes =
        pending.request->operation == IoOperation::write || pending.request->operation == IoOperation::zero;
    if (changes && world_.chance(0.5)) perform(*pending.disk, *pending.request);
  }
  pending_.clear();
}

// Durable state.

namespace {

class SimStateFile : public StateFile {
 public:
  SimStateFile(World& world, std::shared_ptr<VolatileBytes> bytes)
      : world_(world), bytes_(std::move(bytes)) {}

  Result<std::uint64_t> size() override { return bytes_->current.size(); }
  Result<void> resize(std::uint64_t size) override {
    world_.step();
    bytes_->resize(std::size_t(size));
    return {};
  }
  Result<void> read(std::uint64_t offset, std::span<std::byte> buffer) override {
    for (std::size_t i = 0; i < buffer.size(); ++i) {
      const std::size_t at = std::size_t(offset) + i;
      buffer[i] = at < bytes_->current.size() ? bytes_->current[at] : std::byte(0);
    }
    return {};
  }
  Result<void> write(std::uint64_t offset, std::span<const std::byte> data) override {
    world_.step();
    bytes_->write(std::size_t(offset), {data.begin(), data.end()});
    return {};
  }
  Result<void> sync() override {
    world_.step();
    bytes_->flush();
    return {};
  }
  Result<std::uint64_t> next_data(std::uint64_t offset) override {
    std::uint64_t at = offset;
    while (at < bytes_->current.size() && bytes_->current[std::size_t(at)] == std::byte(0)) ++at;
    // As a filesystem answers: by whole blocks.
    return std::max(offset, at / 4096 * 4096);
  }
  Result<void> punch(std::uint64_t offset, std::uint64_t count) override {
    return write(offset, std::vector<std::byte>(std::size_t(count)));
  }

 private:
  World& world_;
  std::shared_ptr<VolatileBytes> bytes_;
};

Error missing(const std::string& name) {
  return error_from_errno(ENOENT, "open", name);
}

}  // namespace

Result<std::unique_ptr<StateFile>> SimStateDirectory::open(const std::string& name, bool create) {
  auto at = files_.find(name);
  if (at == files_.end() && !create) return fail(missing(name));
  if (at == files_.end()) {
    world_.step();
    at = files_.emplace(name, std::make_shared<VolatileBytes>()).first;
    new_names_.insert(name);
  }
  return std::make_unique<SimStateFile>(world_, at->second);
}

Result<void> SimStateDirectory::replace(const std::string& name, std::span<const std::byte> content) {
  world_.step();
  new_names_.clear();
  world_.step();
  auto bytes = std::make_shared<VolatileBytes>();
  bytes->write(0, {content.begin(), content.end()});
  bytes->flush();
  files_[name] = std::move(bytes);
  world_.step();
  return {};
}

Result<std::vector<std::byte>> SimStateDirectory::read_all(const std::string& name, std::uint64_t) {
  const auto at = files_.find(name);
  if (at == files_.end()) return fail(missing(name));
  return at->second->current;
}

Result<void> SimStateDirectory::remove(const std::string& name) {
  world_.step();
  files_.erase(name);
  return {};
}

Result<std::vector<std::string>> SimStateDirectory::list() {
  std::vector<std::string> names;
  for (const auto& [name, bytes] : files_) names.push_back(name);
  return names;
}

void SimStateDirectory::lose_power() {
  for (const auto& name : new_names_) {
    if (world_.chance(0.5)) files_.erase(name);
  }
  new_names_.clear();
  for (auto& [name, bytes] : files_) bytes->lose_power(world_.random);
}

// A process's environment.

Result<RunDevices> SimEnvironment::open_devices(const RunRecord&) {
  RunDevices devices;
  auto new_queue = std::make_unique<SimQueue>(world_);
  queue = new_queue.get();
  devices.queue = std::move(new_queue);
  devices.source = std::make_unique<SimDevice>(*queue, source_);
  for (SimDisk* target : targets_) {
    devices.targets.push_back(std::make_unique<SimDevice>(*queue, *target));
    devices.target_errors.emplace_back();
  }
  devices.io_engine = "simulated";
  return devices;
}

namespace {

/// A job that is done some time between its start and the moment it is waited for.
class SimTask : public BackgroundTask {
 public:
  SimTask(World& world, std::function<Result<void>()> job) : world_(world), job_(std::move(job)) {}
  bool wait(Nanoseconds timeout) override {
    if (!done_ && (timeout.count() > 0 || world_.chance(0.2))) {
      outcome_ = job_();
      done_ = true;
    }
    return done_;
  }
  Result<void> take() override { return outcome_; }

 private:
  World& world_;
  std::function<Result<void>()> job_;
  bool done_ = false;
  Result<void> outcome_;
};

}  // namespace

std::unique_ptr<BackgroundTask> SimEnvironment::start(std::function<Result<void>()> job) {
  return std::make_unique<SimTask>(world_, std::move(job));
}

void choose_sizes(World& world, std::uint64_t granule_bytes, RunRequest& request, SimDisk& source,
                  SimDisk& target) {
  if (world.chance(0.3)) {
    source.io_bytes_best = 2048 * (1 + world.below(8));  // less than a granule, too
    target.in_flight_bytes_best = granule_bytes * (1 + world.below(8));
  } else {
    request.io_size_bytes = granule_bytes * (1 + world.below(4));
    request.queue_depth = unsigned(1 + world.below(4));
  }
}

}  // namespace blockferry::sim
